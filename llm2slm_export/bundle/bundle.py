"""A bundle whose files have been checked, opened as one of its heads."""

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
        return self.directory / relative

    def select(self, head: str) -> "Bundle":
        """The bundle as its head of that name.

        Raises:
            UsageError: no head has that name.
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
    """Read the manifest and check every file it names, and that its graphs read no others.

    Raises:
        BundleError: see `read_manifest`; or files that are missing, truncated, altered, or not in the bundle; every one named.
    """
    manifest = read_manifest(directory)
    problems = file_problems(directory, manifest.files)
    if not problems:
        heads = manifest.by_head.values()
        problems = graph_problems(directory, (entry for head in heads for entry in head.graphs.values()))
    if problems:
        raise BundleError(
            f"The bundle {directory} is not what was built.", *problems, remedy="copy it again, or build it again"
        )
    return Bundle(directory, manifest)
