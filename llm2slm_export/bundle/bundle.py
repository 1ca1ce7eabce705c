"""Opening a bundle: its files are checked, and one of its heads is selected."""

from dataclasses import dataclass
from pathlib import Path

from llm2slm_export.bundle.files import file_problems, graph_problems
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.errors import BundleError, UsageError


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked against the manifest's hashes."""

    directory: Path
    manifest: Manifest

    def path(self, relative: str) -> Path:
        """The path of one of the bundle's files."""
        return self.directory / relative

    def select(self, head: str) -> "Bundle":
        """The bundle with another head's manifest.

        Raises:
            UsageError: the bundle has no head of this name.
        """
        manifest = self.manifest
        if head == manifest.head:
            return self
        if head not in manifest.heads:
            raise UsageError(
                f"The bundle {self.directory} has no head {head!r}.",
                f"its heads: {', '.join([manifest.head, *manifest.heads])}",
                remedy="choose one of these",
            )
        return Bundle(self.directory, manifest.heads[head].model_copy(update={"files": manifest.files}))


def open_bundle(directory: Path) -> Bundle:
    """Read the manifest and check the hash of every file. Graphs may only read files that the manifest lists.

    Raises:
        BundleError: as `read_manifest`; or files are missing, truncated, altered or outside the bundle, all of them named.
    """
    manifest = read_manifest(directory)
    problems = file_problems(directory, manifest.files)
    if not problems:
        heads = manifest.by_head.values()
        problems = graph_problems(directory, (entry for head in heads for entry in head.graphs.values()))
    if problems:
        raise BundleError(
            f"The bundle {directory} has changed since it was built.",
            *problems,
            remedy="copy it again, or build it again",
        )
    return Bundle(directory, manifest)
