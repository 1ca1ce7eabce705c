"""What an evaluation has worked out already, kept in its work directory: an interrupted one goes on where it was."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from llm2slm_export.bundle.files import file_entries
from llm2slm_export.files.atomic import cached_file
from llm2slm_export.files.bounded_json import JsonError, parse_json

Array = np.ndarray[Any, Any]
# What NumPy raises that reads a file, whatever is in it: its header is parsed as Python.
_UNREADABLE = (OSError, ValueError, EOFError, TypeError, OverflowError, MemoryError, SyntaxError, TokenError)


def fingerprint(*facts: object) -> str:
    """A name for what a result depends on: of a directory, its files' contents; of anything else, what it prints as."""
    digest = hashlib.sha256()
    for fact in facts:
        told = [(entry.path, entry.sha256) for entry in file_entries(fact)] if isinstance(fact, Path) else fact
        digest.update(f"{told!r}\n".encode())
    return digest.hexdigest()[:16]


def cached_array(path: Path, make: Callable[[], Array]) -> Array:
    """The array in a file, made and written first where there is none, or where the file cannot be read."""
    if path.is_file():
        try:
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except _UNREADABLE as error:
            text = f"{path} cannot be read, and is made again: {next(iter(str(error).splitlines()), '')}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    array = make()
    with cached_file(path) as new, new.open("wb") as file:
        np.save(file, array)
    return array


class JsonlCache:
    """Numbered JSON values, one a line, appended as they come: how far an interrupted run got.

    Two runs may append to the same file: what both have made is the same.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[int, Any]:
        """What is there, by number; a line that was cut short, or holds something else, is not."""
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
        """Add values, on disk when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps([row, value], ensure_ascii=False) for row, value in values.items()]
        # A line break first: an interrupted run's last line may lack its own.
        with self._path.open("ab", buffering=0) as file:
            file.write(("\n" + "\n".join(lines) + "\n").encode())
            os.fsync(file.fileno())
