"""Cached results of an evaluation in its work directory, from which an interrupted evaluation resumes."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.files import file_entries
from llm2slm_export.files.atomic import cached_file
from llm2slm_export.files.bounded_json import JsonError, parse_json

# Exceptions of NumPy for unreadable files of any content: it parses the header as Python.
_UNREADABLE = (OSError, ValueError, EOFError, TypeError, OverflowError, MemoryError, SyntaxError, TokenError)


def fingerprint(*facts: object) -> str:
    """A hash of the facts that a result depends on: a directory's file contents, or another object's repr."""
    digest = hashlib.sha256()
    for fact in facts:
        content = [(entry.path, entry.sha256) for entry in file_entries(fact)] if isinstance(fact, Path) else fact
        digest.update(f"{content!r}\n".encode())
    return digest.hexdigest()[:16]


def cached_array(path: Path, make: Callable[[], Array]) -> Array:
    """The array in a file; if the file is missing or unreadable, the array is computed and written first."""
    if path.is_file():
        try:
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except _UNREADABLE as error:
            text = f"{path} is unreadable and is computed again: {next(iter(str(error).splitlines()), '')}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    array = make()
    with cached_file(path) as new, new.open("wb") as file:
        np.save(file, array)
    return array


class JsonlCache:
    """Numbered JSON values, one per line, appended as they are computed.

    Concurrent runs may append to the same file, because they compute the same values.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[int, Any]:
        """The values in the file by number; truncated or invalid lines are skipped."""
        found: dict[int, Any] = {}
        for line in self._path.read_bytes().split(b"\n") if self._path.is_file() else ():
            try:
                entry = parse_json(line)
            except JsonError:
                continue
            if isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int:
                found[entry[0]] = entry[1]
        return found

    def append(self, values: Mapping[int, Any]) -> None:
        """Append values; they are on disk on return."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps([row, value], ensure_ascii=False) for row, value in values.items()]
        # A leading line break, because an interrupted run's last line may lack its own.
        with self._path.open("ab", buffering=0) as file:
            file.write(("\n" + "\n".join(lines) + "\n").encode())
            os.fsync(file.fileno())
