"""Measurements of this machine, which later runs read: JSON files in the user's cache directory."""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.contract import GraphName
from llm2slm_export.environment.hardware import cache_directory
from llm2slm_export.files.atomic import cached_file
from llm2slm_export.files.bounded_json import MOST_BYTES, JsonError, parse_json
from llm2slm_export.files.regular_file import read_regular

_MOST_ENTRIES = 1000


class MeasurementFile:
    """A file of measurements by key.

    Args:
        name: the file's name in `$XDG_CACHE_HOME/llm2slm-export` (`~/.cache/llm2slm-export` by default).
        valid: whether a measurement is one. The others in the file are ignored.
    """

    def __init__(self, name: str, valid: Callable[[object], bool]) -> None:
        self.path: Path = cache_directory() / name
        self._valid = valid

    def read(self) -> dict[str, Any]:
        """The measurements; empty if the file cannot be read."""
        try:
            entries = parse_json(read_regular(self.path, most_bytes=MOST_BYTES))
        except (OSError, JsonError):
            return {}
        return {key: value for key, value in entries.items() if self._valid(value)} if isinstance(entries, dict) else {}

    def add(self, key: str, value: object) -> bool:
        """Write a measurement beside those of other runs, of which the oldest are dropped.

        Returns:
            False if the cache directory cannot be written.
        """
        entries = {known: old for known, old in self.read().items() if known != key} | {key: value}
        newest = dict(list(entries.items())[-_MOST_ENTRIES:])
        try:
            with cached_file(self.path) as new:
                new.write_text(json.dumps(newest, indent=1) + "\n", encoding="utf-8")
        except OSError:
            return False
        return True


def measurement_key(bundle: Bundle, graphs: Sequence[tuple[Manifest, GraphName]], *, facts: Sequence[object]) -> str:
    """A key of graphs of a bundle's heads, by the hashes of their files, and of other facts that a measurement depends on."""
    hashes = {file.path: file.sha256 for file in bundle.manifest.files}
    entries = [manifest.graphs[name] for manifest, name in graphs]
    known = [*facts, *(hashes[file] for entry in entries for file in (entry.file, *entry.data))]
    names = "+".join(name for _, name in graphs)
    return f"{bundle.manifest.name} {names} {sha256(json.dumps(known).encode()).hexdigest()[:16]}"
