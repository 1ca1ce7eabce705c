"""What an evaluation has worked out already, kept in its work directory: an interrupted one goes on where it was."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm2slm_export.bundle import file_entries

Array = np.ndarray[Any, Any]


def fingerprint(*facts: object) -> str:
    """A name for what a result depends on: of a directory, its files' contents; of anything else, what it prints as."""
    digest = hashlib.sha256()
    for fact in facts:
        if isinstance(fact, Path):
            digest.update("".join(f"{entry.path} {entry.sha256}\n" for entry in file_entries(fact)).encode())
        else:
            digest.update(repr(fact).encode())
    return digest.hexdigest()[:16]


def keep_array(path: Path, make: Callable[[], Array]) -> Array:
    """The array in a file, made and written first where there is none."""
    if not path.is_file():
        array = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, array)
        os.replace(partial, path)
    return np.load(path)  # type: ignore[no-any-return]


class KeptLines:
    """JSON values, one a line, appended as they come: how far an interrupted run got."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Any]:
        """What is there; a last line that was cut short is not, and is removed."""
        if not self._path.is_file():
            return []
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self._path, len(whole))
        return [json.loads(line) for line in whole.decode("utf-8").splitlines()]

    def append(self, values: Sequence[Any]) -> None:
        """Add values, on disk when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
            file.flush()
            os.fsync(file.fileno())
