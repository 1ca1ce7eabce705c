"""Directories and files that appear whole or not at all, and that take the place of nothing but their own kind."""

import ctypes
import errno
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2slm_export.errors import Llm2SlmError, UsageError
from llm2slm_export.files.target import Kind, reasons_against, resolved, state_of
from llm2slm_export.files.workplace import Workplace, abandoned, workplace

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_UNKNOWN_HERE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV}


class Replacement:
    """What is going to be at `path`. Whether it may be is decided here, and again when it takes the name.

    A directory takes the place of one that is of its kind and holds nothing else, with `force`; a file that of one of its
    kind. What an earlier run that was killed has left is removed, or put back where it was.

    Args:
        force: whether what is there may be replaced; a file of its kind always may.
        inputs: what the command reads: no place that is one, holds one, or lies in one is written.
        option: how the user said the path.

    Raises:
        UsageError: with every reason; nothing is changed.
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
                remedy=f"choose another {option}: no more than {kind.what} is replaced, and nothing that is in use",
            )
        if unasked:
            raise UsageError(
                f"{path} exists already.",
                remedy=f"choose another {option}, or add --force to replace it once the new one is complete",
            )
        self._before = state_of(self.target)

    @contextmanager
    def written(self, *, private: bool = False, durable: bool = True) -> Iterator[Path]:
        """Yield an empty directory (of a file: a path) that becomes `path` when the block ends well, and vanishes when not.

        Where the system can exchange two names in one step (Linux), what was there or what is new is at `path` at every
        moment; elsewhere the next run puts back what was there.

        Args:
            private: for its owner alone; otherwise as the umask says.
            durable: wait until the disk has it.

        Raises:
            Llm2SlmError: something appeared there or changed meanwhile: it is kept, and what is new is beside it.
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
                f"what was written is complete, and is at {kept}",
                remedy=f"use it there, or look at both and rename; another {self.option} is in nobody's way",
            ) from None
        except OSError as error:
            kept = rename_free(place.new, self.target.with_name(f"{self.target.name}.new"))
            raise Llm2SlmError(
                f"{self.path} cannot be replaced: {error.strerror}.",
                f"what was written is complete, and is at {kept}",
                remedy=f"use it there, or give another {self.option}",
            ) from error

    def _settle_abandoned(self) -> None:
        if self.target.name:
            for _, place in abandoned(self.target.parent, lambda name: name == self.target.name):
                self._settle(place)

    def _settle(self, place: Workplace) -> None:
        """Remove a working directory; what is in it and was not written there is put back, or kept beside."""
        if os.path.lexists(place.old):
            try:
                rename_new(place.old, self.target)
                _tell(f"{self.target} is what it was: replacing it was interrupted")
            except FileExistsError:
                if self.kind.reasons_to_keep(place.old):
                    kept = rename_free(place.old, self.target.with_name(f"{self.target.name}.old"))
                    _tell(f"what was at {self.target}, and holds what is no part of {self.kind.what}, is at {kept}")
        place.remove()


@contextmanager
def replaced_directory(
    path: Path, kind: Kind, *, force: bool, inputs: Iterable[Path] = (), option: str = "--out"
) -> Iterator[Path]:
    """A `Replacement` that is decided on and written in one go."""
    with Replacement(path, kind, force=force, inputs=inputs, option=option).written() as directory:
        yield directory


@contextmanager
def cached_file(path: Path, *, private: bool = False, durable: bool = False, clear: bool = True) -> Iterator[Path]:
    """Yield a path whose file becomes `path`, a name that no one but this package gives; several runs may write the same.

    Args:
        private, durable: see `Replacement.written`.
        clear: remove what killed runs left of this file.
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
    """Give what is complete the name of a cached file, once the disk has it; for what a cut-off run goes on writing."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def clear_abandoned(directory: Path, wanted: Callable[[str], bool]) -> None:
    """Remove what killed runs left of cached files in a directory, of those whose names are wanted."""
    for _, place in abandoned(directory, wanted):
        place.remove()


def rename_new(path: Path, target: Path) -> None:
    """Give a file or directory a name that nothing has.

    Raises:
        FileExistsError: something has it.
    """
    if _rename(path, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        # A directory takes the place of an empty one, and of nothing else.
        path.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(*error.args) from error
        raise


def _swap(place: Workplace, target: Path) -> None:
    """Put `new` in the place of what is at `target`, which is `old` afterwards, or gone where it is a file."""
    # Under this name a run that finds it judges it before it is removed.
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
    # Some file systems, and systems other than Linux, cannot. Until the second name is given, the next run has `old`.
    target.rename(place.old)
    rename_new(place.new, target)


def _swap_back(place: Workplace, target: Path) -> None:
    if _rename(place.old, target, _RENAME_EXCHANGE):
        place.old.rename(place.new)
    else:
        target.rename(place.new)
        rename_new(place.old, target)


def _rename(path: Path, target: Path, flags: int) -> bool:
    """renameat2; False where system or file system do not know it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    if (code := ctypes.get_errno()) in _UNKNOWN_HERE:
        return False
    raise OSError(code, os.strerror(code), str(path), None, str(target))


def rename_free(path: Path, name: Path) -> Path:
    """Rename `path` to `name`, or to the first of `<name>-2`, `<name>-3`, … that is free.

    Returns:
        where it is.
    """
    for number in itertools.count(1):
        target = name if number == 1 else name.with_name(f"{name.name}-{number}")
        try:
            rename_new(path, target)
        except FileExistsError:
            continue
        return target
    raise AssertionError("unreachable")


def _tell(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
