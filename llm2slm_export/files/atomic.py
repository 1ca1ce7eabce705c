"""Atomic writes: a directory or file appears complete or not at all, and only replaces one of its own kind."""

import ctypes
import errno
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2slm_export.errors import Llm2SlmError, UsageError
from llm2slm_export.files.output_target import Kind, reasons_against, resolved, state_of
from llm2slm_export.files.workplace import Workplace, abandoned, workplace

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV}


class Replacement:
    """A directory or file that is going to be written to `path`, checked now and again before it takes the name.

    With `force` a directory replaces one of its kind that holds no foreign files. A file always replaces one of its kind.
    Leftovers of killed runs are removed; a directory that such a run was replacing is restored.

    Args:
        force: whether an existing directory may be replaced.
        inputs: paths that the command reads. A target that is, contains or lies in one of them is refused.
        option: the command-line option of the path, for messages.

    Raises:
        UsageError: the path cannot be written, with every reason. Nothing has been changed.
    """

    def __init__(
        self, path: Path, kind: Kind, *, force: bool = False, inputs: Iterable[Path] = (), option: str = "--out"
    ) -> None:
        self.path, self.kind, self.option = path, kind, option
        self.target = resolved(path, follow=kind.is_file)
        self._settle_abandoned()
        reasons, exists = reasons_against(self.target, kind, inputs), os.path.lexists(self.target)
        unasked = exists and not (force or kind.is_file)
        if reasons:
            raise UsageError(
                f"{path} cannot be {'replaced' if exists else 'written'}.",
                *(["it exists already, and --force is not given"] if unasked else []),
                *reasons,
                remedy=f"choose another {option}: only {kind.what} that is not in use is replaced",
            )
        if unasked:
            raise UsageError(
                f"{path} exists already.",
                remedy=f"choose another {option}, or add --force to replace it when the new one is complete",
            )
        self._before = state_of(self.target)

    @contextmanager
    def written(self, *, private: bool = False, durable: bool = True) -> Iterator[Path]:
        """Yield an empty directory (or the path of a file) that becomes `path` on success and is removed on an exception.

        On Linux two names are exchanged in one step, so the old or the new version is at `path` at all times. On other
        systems the next run restores the old version after an interruption.

        Args:
            private: make files readable by their owner only; otherwise the umask decides.
            durable: wait until the data is on disk.

        Raises:
            Llm2SlmError: `path` appeared or changed meanwhile. It is kept, and the new version is beside it.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with workplace(self.target, self._settle) as place:
            if not self.kind.is_file:
                place.new.mkdir()
            yield place.new
            place.settle_modes(private=private)
            if durable:
                place.sync()
            self._take_place(place)

    def _take_place(self, place: Workplace) -> None:
        try:
            now = state_of(self.target)
            if now is None:
                rename_new(place.new, self.target)
            elif now != self._before:
                raise FileExistsError
            else:
                _swap(place, self.target)
                if os.path.lexists(place.old) and state_of(place.old) != self._before:
                    _swap_back(place, self.target)
                    raise FileExistsError
        except FileExistsError:
            kept = rename_free(place.new, self.target.with_name(f"{self.target.name}.new"))
            what = "changed" if self._before is not None else "appeared"
            raise Llm2SlmError(
                f"{self.path} {what} while this command ran, and is kept.",
                f"the new version is complete, at {kept}",
                remedy=f"use it there, or compare the two and rename; or choose another {self.option}",
            ) from None
        except OSError as error:
            kept = rename_free(place.new, self.target.with_name(f"{self.target.name}.new"))
            raise Llm2SlmError(
                f"{self.path} cannot be replaced: {error.strerror}.",
                f"the new version is complete, at {kept}",
                remedy=f"use it there, or give another {self.option}",
            ) from error

    def _settle_abandoned(self) -> None:
        if self.target.name:
            for _, place in abandoned(self.target.parent, lambda name: name == self.target.name):
                self._settle(place)

    def _settle(self, place: Workplace) -> None:
        """Remove a working directory. A replaced version in it is restored, or kept beside the target."""
        if os.path.lexists(place.old):
            try:
                rename_new(place.old, self.target)
                _warn(f"{self.target} has been restored: replacing it was interrupted")
            except FileExistsError:
                if self.kind.reasons_to_keep(place.old):
                    kept = rename_free(place.old, self.target.with_name(f"{self.target.name}.old"))
                    _warn(
                        f"the former {self.target}, which holds files that are not part of {self.kind.what}, is at {kept}"
                    )
        place.remove()


@contextmanager
def replaced_directory(
    path: Path, kind: Kind, *, force: bool, inputs: Iterable[Path] = (), option: str = "--out"
) -> Iterator[Path]:
    """A `Replacement` that is checked and written in one step."""
    with Replacement(path, kind, force=force, inputs=inputs, option=option).written() as directory:
        yield directory


@contextmanager
def cached_file(path: Path, *, private: bool = False, durable: bool = False, clear: bool = True) -> Iterator[Path]:
    """Yield a path whose file becomes `path` on success. Only this package writes `path`; concurrent runs may do so.

    Args:
        private, durable: see `Replacement.written`.
        clear: remove leftovers of killed runs of this file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if clear:
        clear_abandoned(path.parent, lambda name: name == path.name)
    with workplace(path) as place:
        yield place.new
        place.settle_modes(private=private)
        if durable:
            place.sync()
        os.replace(place.new, path)


def rename_cached(partial: Path, path: Path) -> None:
    """Rename a complete partial file to a cached file, after its data is on disk. A later run can resume a partial file."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def clear_abandoned(directory: Path, wanted: Callable[[str], bool]) -> None:
    """Remove leftovers of killed runs from a directory of cached files, for files whose names are wanted."""
    for _, place in abandoned(directory, wanted):
        place.remove()


def rename_new(path: Path, target: Path) -> None:
    """Rename a file or directory without replacing anything.

    Raises:
        FileExistsError: `target` exists.
    """
    if _rename(path, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        # rename(2) replaces an empty directory, but no other.
        path.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(*error.args) from error
        raise


def _swap(place: Workplace, target: Path) -> None:
    """Replace `target` by `new`. The former target becomes `old`; a former file may be deleted instead."""
    # A later run checks `old` before it removes it, so the former target must have that name during the exchange.
    place.new.rename(place.old)
    exchanged = False
    try:
        exchanged = _rename(place.old, target, _RENAME_EXCHANGE)
    finally:
        if not exchanged:
            place.old.rename(place.new)
    if exchanged:
        return
    if not target.is_dir():
        os.replace(place.new, target)
        return
    # No exchange on this file system, or not Linux. Between the two renames the next run can restore `old`.
    target.rename(place.old)
    rename_new(place.new, target)


def _swap_back(place: Workplace, target: Path) -> None:
    if _rename(place.old, target, _RENAME_EXCHANGE):
        place.old.rename(place.new)
    else:
        target.rename(place.new)
        rename_new(place.old, target)


def _rename(path: Path, target: Path, flags: int) -> bool:
    """Call renameat2. Returns False if the system or the file system does not support it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    if (code := ctypes.get_errno()) in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(path), None, str(target))


def rename_free(path: Path, name: Path) -> Path:
    """Rename `path` to `name`, or to the first free name of `<name>-2`, `<name>-3`, …

    Returns:
        The new path.
    """
    for number in itertools.count(1):
        target = name if number == 1 else name.with_name(f"{name.name}-{number}")
        try:
            rename_new(path, target)
        except FileExistsError:
            continue
        return target
    raise AssertionError("unreachable")


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
