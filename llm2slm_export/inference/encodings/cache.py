"""Encodings of single prompts, kept for the next time: in memory and, where a directory is given, on disk.

It knows keys and arrays. It knows neither what a key is made of nor what the arrays mean.
"""

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from llm2slm_export.errors import EncodingError, UsageError, printable
from llm2slm_export.files.atomic import clear_abandoned
from llm2slm_export.inference.encodings.safetensors_file import read_tensors, write_tensors
from llm2slm_export.inference.runtime.backend import Array
from llm2slm_export.inference.runtime.forks import ForkSafeLock

DEFAULT_BYTES = 256_000_000
Row = Mapping[str, Array]

_SUFFIX = ".safetensors"
_KEY = "key"
_FILE = re.compile(rf"[0-9a-f]{{64}}{re.escape(_SUFFIX)}")


class EncodingCache:
    """The encodings used last. Threads may share one, and processes its directory.

    Args:
        max_bytes: most memory it takes and, by itself, most space on disk; what was not used for longest goes first.
        directory: where encodings outlive the process; made where it is missing. It holds what was made of prompts, from
            which much of their text can be recovered: keep it as private as the prompts. None: memory only.

    Raises:
        UsageError: a number of bytes that means nothing, or a directory that cannot be made.
    """

    def __init__(self, *, max_bytes: int = DEFAULT_BYTES, directory: str | os.PathLike[str] | None = None) -> None:
        if max_bytes < 1:
            raise UsageError(f"max_bytes is {max_bytes}.", remedy="give at least 1")
        self._max_bytes = max_bytes
        self._directory = Path(directory) if directory is not None else None
        if self._directory is not None:
            try:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"The cache directory {self._directory} cannot be used.",
                    str(error.strerror),
                    remedy="give another one",
                ) from error
        self._rows: OrderedDict[str, Row] = OrderedDict()
        self._lock = ForkSafeLock()

    @property
    def bytes(self) -> int:
        """Memory taken by encodings."""
        with self._lock:
            return sum(map(_bytes_of, self._rows.values()))

    def find(self, key: str, problem: Callable[[Row], str | None] = lambda _: None) -> Row | None:
        """The arrays stored under a key; None where there are none, or where their file cannot be used.

        Args:
            problem: why arrays are not those that the key is for; asked of a file's, which is removed then.
        """
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
                return self._rows[key]
        row = self._read(key, problem)
        if row is not None:
            self._remember({key: row})
        return row

    def store(self, rows: Mapping[str, Row]) -> None:
        """Keep arrays under their keys; those larger than the whole cache are not kept."""
        fitting = {key: row for key, row in rows.items() if _bytes_of(row) <= self._max_bytes}
        self._remember(fitting)
        if self._directory is None or not fitting:
            return
        try:
            for key, row in fitting.items():
                write_tensors(self._directory / f"{key}{_SUFFIX}", row, {_KEY: key}, cached=True)
            self._make_room(self._directory)
        except (EncodingError, OSError) as error:
            _tell(self._directory, error)

    def _remember(self, rows: Mapping[str, Row]) -> None:
        with self._lock:
            self._rows.update(rows)
            size = sum(map(_bytes_of, self._rows.values()))
            while size > self._max_bytes:
                size -= _bytes_of(self._rows.popitem(last=False)[1])

    def _read(self, key: str, problem: Callable[[Row], str | None]) -> Row | None:
        if self._directory is None:
            return None
        path = self._directory / f"{key}{_SUFFIX}"
        try:
            # Not `exists`, which takes a link to nothing for nothing.
            path.lstat()
            row, about = read_tensors(path)
            reason = f"it is the file of {about.get(_KEY, 'no key')[:12]}…" if about.get(_KEY) != key else problem(row)
            if reason is not None:
                raise EncodingError(f"{path} is not what its name says.", reason, remedy="none: it is made again")
            # The time of last use, for every process that makes room.
            with suppress(OSError):
                os.utime(path)
        except FileNotFoundError:
            return None
        except (EncodingError, OSError) as error:
            self._refuse(path, error)
            return None
        return row

    def _refuse(self, path: Path, error: Exception) -> None:
        """A file that cannot be used is a prompt that is read anew, and removed so that it is so once."""
        reason = error.evidence[0] if isinstance(error, EncodingError) and error.evidence else error
        removed = "it is removed"
        try:
            path.unlink(missing_ok=True)
        except OSError as kept:
            removed = f"it cannot be removed: {kept.strerror}"
        warnings.warn(
            printable(f"{path.name} in the encoding cache {self._directory} cannot be used: {reason}; {removed}"),
            RuntimeWarning,
            stacklevel=5,
        )

    def _make_room(self, directory: Path) -> None:
        """Remove the files used longest ago until the rest fits. Another process may be doing the same."""
        files = sorted(_files(directory), key=lambda found: found[1].st_mtime, reverse=True)
        size = 0
        for path, status in files:
            size += status.st_size
            if size > self._max_bytes:
                path.unlink(missing_ok=True)


def _tell(directory: Path, error: Exception) -> None:
    """A cache that cannot keep something costs time, and no response."""
    reason = error.evidence[0] if isinstance(error, EncodingError) and error.evidence else error
    warnings.warn(f"the encoding cache {directory} could not be written: {reason}", RuntimeWarning, stacklevel=2)


def _files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The cache's files in a directory that may hold others; what a writer that died left behind is removed."""
    clear_abandoned(directory, lambda name: _FILE.fullmatch(name) is not None)
    for entry in os.scandir(directory):
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        if _FILE.fullmatch(entry.name):
            yield Path(entry.path), status


def _bytes_of(row: Row) -> int:
    return sum(array.nbytes for array in row.values())
