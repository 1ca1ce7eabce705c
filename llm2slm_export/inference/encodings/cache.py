"""A cache of single prompts' encodings, in memory and optionally on disk. It maps keys to named arrays."""

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from llm2slm_export.arrays import Array
from llm2slm_export.errors import EncodingError, UsageError, printable
from llm2slm_export.files.atomic import clear_abandoned
from llm2slm_export.inference.encodings.safetensors_file import read_tensors, write_tensors
from llm2slm_export.inference.runtime.forks import ForkSafeLock

DEFAULT_BYTES = 256_000_000
Row = Mapping[str, Array]

_SUFFIX = ".safetensors"
_KEY = "key"
_FILE = re.compile(rf"[0-9a-f]{{64}}{re.escape(_SUFFIX)}")


class EncodingCache:
    """A least-recently-used cache of encodings. Threads may share it, and processes may share its directory.

    Args:
        max_bytes: maximum bytes in memory, and separately on disk. The least recently used encodings are removed first.
        directory: directory of encodings that outlive the process, created if missing; None: memory only. Much of a
            prompt's text can be recovered from its encoding: keep the directory as private as the prompts.

    Raises:
        UsageError: `max_bytes` is below 1, or the directory cannot be created.
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
        """Bytes of the encodings in memory."""
        with self._lock:
            return sum(map(_bytes_of, self._rows.values()))

    def find(self, key: str, problem: Callable[[Row], str | None] = lambda _: None) -> Row | None:
        """The arrays stored under a key; None if there are none, or if their file is unusable.

        Args:
            problem: the reason why arrays do not fit the key, or None. It checks arrays read from a file; an unusable file
                is removed with a warning.
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
        """Store arrays under their keys, except those larger than the cache."""
        fitting = {key: row for key, row in rows.items() if _bytes_of(row) <= self._max_bytes}
        self._remember(fitting)
        if self._directory is None or not fitting:
            return
        try:
            for key, row in fitting.items():
                write_tensors(self._directory / f"{key}{_SUFFIX}", row, {_KEY: key}, cached=True)
            self._make_room(self._directory)
        except (EncodingError, OSError) as error:
            _warn_not_written(self._directory, error)

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
            # Not `exists`, which is False for a dangling link.
            path.lstat()
            row, about = read_tensors(path)
            reason = f"it is the file of {about.get(_KEY, 'no key')[:12]}…" if about.get(_KEY) != key else problem(row)
            if reason is not None:
                raise EncodingError(
                    f"{path} does not match its file name.",
                    reason,
                    remedy="nothing to do: the entry is computed again",
                )
            # The file's time is that of its last use, for every process that evicts files.
            with suppress(OSError):
                os.utime(path)
        except FileNotFoundError:
            return None
        except (EncodingError, OSError) as error:
            self._discard(path, error)
            return None
        return row

    def _discard(self, path: Path, error: Exception) -> None:
        """Remove an unusable file with a warning. Its prompt is encoded again."""
        reason = error.evidence[0] if isinstance(error, EncodingError) and error.evidence else error
        removed = "it is removed"
        try:
            path.unlink(missing_ok=True)
        except OSError as failure:
            removed = f"it cannot be removed: {failure.strerror}"
        warnings.warn(
            printable(f"{path.name} in the encoding cache {self._directory} cannot be used: {reason}; {removed}"),
            RuntimeWarning,
            stacklevel=5,
        )

    def _make_room(self, directory: Path) -> None:
        """Remove the least recently used files until the rest fits. Another process may do the same concurrently."""
        files = sorted(_files(directory), key=lambda found: found[1].st_mtime, reverse=True)
        size = 0
        for path, status in files:
            size += status.st_size
            if size > self._max_bytes:
                path.unlink(missing_ok=True)


def _warn_not_written(directory: Path, error: Exception) -> None:
    """Warn that encodings could not be stored. Responses are not affected."""
    reason = error.evidence[0] if isinstance(error, EncodingError) and error.evidence else error
    warnings.warn(f"the encoding cache {directory} could not be written: {reason}", RuntimeWarning, stacklevel=2)


def _files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The cache's files in its directory, which may hold others. Leftovers of killed runs are removed."""
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
