"""Working directories with a lock that ends with its process, so that leftovers of killed runs can be recognized."""

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from tempfile import gettempdir

_MARK = ".partial-"
_ENTRY = re.compile(rf"\.(?P<name>.+){re.escape(_MARK)}[0-9a-f]{{16}}", re.DOTALL)
_LOCK = "lock"


@dataclass(frozen=True)
class Workplace:
    """A working directory `.<name>.partial-<number>` beside the target, with four names in it.

    `new`: the version being written. `old`: the version being replaced, until it is checked. `gone`: entries being
    removed. `lock`: held by the process that works here.
    """

    directory: Path

    @property
    def new(self) -> Path:
        return self.directory / "new"

    @property
    def old(self) -> Path:
        return self.directory / "old"

    @property
    def gone(self) -> Path:
        return self.directory / "gone"

    @property
    def lock(self) -> Path:
        return self.directory / _LOCK

    def remove(self) -> None:
        """Remove the directory and its content."""
        # A run that is killed here leaves a partial `old`. Under the name `gone` the next run does not restore it.
        for path in (self.gone, self.new, self.old):
            with suppress(OSError):
                path.rename(self.gone)
            _remove(self.gone)
        # The lock goes last: without it the next run cannot tell that the rest has no owner.
        if not any(os.path.lexists(path) for path in (self.gone, self.new, self.old)):
            shutil.rmtree(self.directory, ignore_errors=True)

    def settle_modes(self, *, private: bool = False) -> None:
        """Set the permissions of the files of `new` by the umask. Some libraries write files readable by the owner only.

        Args:
            private: make them readable by their owner only.
        """
        # The lock was created under the umask. Reading the umask itself would change it for every thread.
        mode = 0o600 if private else stat.S_IMODE(self.lock.stat().st_mode)
        for path in (self.new, *self.new.rglob("*")):
            if path.is_file() and not path.is_symlink():
                path.chmod(mode)

    def sync(self) -> None:
        """Wait until `new` is on disk."""
        for path in (*self.new.rglob("*"), self.new):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def workplace(target: Path, settle: Callable[[Workplace], None] = Workplace.remove) -> Iterator[Workplace]:
    """A working directory beside `target`, whose parent exists.

    Args:
        settle: called at the end, also after an exception, while the lock is held. It removes the working directory.
    """
    while (made := _make(target)) is None:
        pass
    place, lock = made
    try:
        yield place
    finally:
        try:
            settle(place)
        finally:
            os.close(lock)


def _make(target: Path) -> tuple[Workplace, int] | None:
    """A new working directory and its lock; None if a run that removes leftovers took it first."""
    place = Workplace(target.with_name(f".{target.name}{_MARK}{token_hex(8)}"))
    place.directory.mkdir(mode=0o700)
    lock = None
    try:
        lock = os.open(place.lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        with suppress(NotImplementedError):
            _acquire(lock)
        if os.path.samestat(os.fstat(lock), place.lock.stat()):
            return place, lock
    except (BlockingIOError, FileNotFoundError):
        pass
    if lock is not None:
        os.close(lock)
    return None


def _acquire(lock: int) -> None:
    """Acquire a lock without waiting.

    Raises:
        BlockingIOError: another process holds it.
        NotImplementedError: the file system has no locks, so it is unknown whether a working directory is in use.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        raise NotImplementedError from error


def abandoned(directory: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Workplace]]:
    """The abandoned working directories in a directory, each with its target's name.

    Each is locked while the caller handles it.

    Args:
        wanted: whether working directories of a target with this name are wanted.
    """
    try:
        found = sorted(directory.iterdir())
    except OSError:
        return
    for path in found:
        match = _ENTRY.fullmatch(path.name)
        if match is None or not wanted(match["name"]):
            continue
        place = Workplace(path)
        try:
            lock = os.open(place.lock, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            # The run was killed before it had a lock, or is about to take one. In that case it creates another directory.
            with suppress(OSError):
                place.directory.rmdir()
            continue
        try:
            with suppress(BlockingIOError, NotImplementedError):
                _acquire(lock)
                yield match["name"], place
        finally:
            os.close(lock)


@contextmanager
def occupied(directory: Path) -> Iterator[None]:
    """Lock a directory against other processes. A directory created for this is removed at the end if it is empty.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    while (descriptor := _occupy(directory)) is None:
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            for path in missing:
                path.rmdir()
        os.close(descriptor)


def _occupy(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock; None if the directory was removed before it was locked."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        with suppress(NotImplementedError):
            _acquire(descriptor)
        if os.path.samestat(os.fstat(descriptor), directory.stat()):
            return descriptor
    except FileNotFoundError:
        pass
    except BlockingIOError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary directory in the system's temporary directory. Leftovers of killed runs are removed."""
    target = Path(gettempdir()) / "llm2slm-export"
    for _, place in abandoned(target.parent, lambda name: name == target.name):
        place.remove()
    with workplace(target) as place:
        place.new.mkdir()
        yield place.new
