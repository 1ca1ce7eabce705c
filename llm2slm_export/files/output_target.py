"""The target of a write: its present content, and the reasons why it must not be replaced."""

import os
import pwd
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MAX_NAMED = 5
_LONGEST_NAME = 220  # bytes; the working directory's name is longer, and file systems allow 255
# The content of a path: of each entry its relative path, its type, its size and its modification time.
State = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Kind:
    """A kind of output. A command only replaces outputs of the same kind.

    Args:
        what: its name with an article, for messages.
        foreign: the reasons why a path is not of this kind, or the foreign entries in it; empty if there are none.
        is_file: whether it is a file, whose path may be a link; otherwise it is a directory.
    """

    what: str
    foreign: Callable[[Path], Iterable[str]]
    is_file: bool = False

    def reasons_to_keep(self, path: Path) -> list[str]:
        """The result of `foreign` for a file or directory; empty if it is empty, because nothing is lost."""
        empty = not any(path.iterdir()) if path.is_dir() else not path.stat().st_size
        return [] if empty else list(self.foreign(path))


def resolved(path: Path, *, follow: bool) -> Path:
    """The real path of `path`. Links in its parents are followed, and with `follow` also a link at its end."""
    if follow or path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def reasons_against(target: Path, kind: Kind, inputs: Iterable[Path] = ()) -> list[str]:
    """All reasons why a target must not be written.

    Args:
        target: from `resolved`.
        inputs: paths that the command reads. Missing ones are ignored: they are hub ids or aliases.
    """
    return [
        *_parent_reasons(target),
        *(() if kind.is_file else _location_reasons(target)),
        *_input_reasons(target, inputs),
        *_content_reasons(target, kind),
    ]


def state_of(path: Path) -> State | None:
    """The state of a path; None if it does not exist. Equal states have equal sizes and modification times."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return (_entry("", status), *(_entry(name, found) for name, found in _entries(path, status)))


def foreign_entries(directory: Path, known: Callable[[str, bool], bool]) -> list[str]:
    """The foreign entries of a directory as reasons, at most five and the number of the others.

    Args:
        known: whether a relative path, with / as separator, belongs to the directory; the second argument is True for a
            directory. Links and devices are always foreign.
    """
    found: list[str] = []

    def look(prefix: str) -> None:
        for entry in _listed(directory / prefix):
            relative, is_directory = f"{prefix}{entry.name}", entry.is_dir(follow_symlinks=False)
            if not ((is_directory or entry.is_file(follow_symlinks=False)) and known(relative, is_directory)):
                found.append(f"{relative}{'/' if is_directory else ''}")
            elif is_directory:
                look(f"{relative}/")

    look("")
    named = [f"{name} is no part of it" for name in found[:_MAX_NAMED]]
    return [*named, *([f"and {len(found) - _MAX_NAMED} more"] if len(found) > _MAX_NAMED else ())]


def _parent_reasons(target: Path) -> Iterator[str]:
    """Reasons why the target's parents cannot be created, or its name is too long."""
    if (length := len(os.fsencode(target.name))) > _LONGEST_NAME:
        yield f"its name has {length} bytes, at most {_LONGEST_NAME} are allowed"
    there = next((parent for parent in target.parents if os.path.lexists(parent)), target)
    if there == target:
        return
    if not there.is_dir():
        yield f"{there} is not a directory"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"{there} cannot be written to"


def _location_reasons(target: Path) -> Iterator[str]:
    if target.parent == target:
        yield "it is the root of the file system"
    working = Path(os.path.realpath(Path.cwd()))
    if _same(target, working):
        yield "it is the working directory"
    elif _holds(target, working):
        yield f"it holds the working directory, {working}"
    homes = [Path(os.path.realpath(home)) for home in dict.fromkeys(_homes())]
    if any(_same(target, home) for home in homes):
        yield "it is a home directory"
    elif holding := [str(home) for home in homes if _holds(target, home)]:
        yield f"it holds home directories: {', '.join(holding[:_MAX_NAMED])}"
    if os.path.lexists(target / ".git"):
        yield "it is the root of a repository: it holds .git"


def _homes() -> Iterator[str]:
    with suppress(RuntimeError):  # neither $HOME nor an account
        yield str(Path.home())
    # Some accounts' homes are /nonexistent, or a system directory, which must not be overwritten either.
    yield from (entry.pw_dir for entry in pwd.getpwall() if Path(entry.pw_dir).is_dir())


def _input_reasons(target: Path, inputs: Iterable[Path]) -> Iterator[str]:
    for given in dict.fromkeys(inputs):
        real = Path(os.path.realpath(given))
        if not real.exists():
            continue
        if _same(target, real):
            yield f"it is {given}, which is read"
        elif _holds(target, real):
            yield f"it holds {given}, which is read"
        elif real.is_dir() and _holds(real, target):
            yield f"it lies in {given}, which is read"


def _content_reasons(target: Path, kind: Kind) -> Iterator[str]:
    try:
        status = target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(status.st_mode):
        yield f"it is a link to {os.fspath(target.readlink())}"
    elif kind.is_file and not stat.S_ISREG(status.st_mode):
        yield "it is a directory" if stat.S_ISDIR(status.st_mode) else "it is not a file"
    elif not kind.is_file and not stat.S_ISDIR(status.st_mode):
        yield "it is a file" if stat.S_ISREG(status.st_mode) else "it is not a directory"
    else:
        yield from kind.reasons_to_keep(target)


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are the same file. Some file systems treat two spellings as one name."""
    try:
        return one.samefile(other)
    except OSError:
        return one == other


def _holds(directory: Path, path: Path) -> bool:
    return any(_same(directory, parent) for parent in path.parents)


def _entries(directory: Path, status: os.stat_result) -> Iterator[tuple[str, os.stat_result]]:
    if not stat.S_ISDIR(status.st_mode):
        return
    pending = [""]
    while pending:
        prefix = pending.pop()
        for entry in _listed(directory / prefix):
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield f"{prefix}{entry.name}", found
            if stat.S_ISDIR(found.st_mode):
                pending.append(f"{prefix}{entry.name}/")


def _listed(directory: Path) -> list[os.DirEntry[str]]:
    """The entries of a directory, sorted by name; empty if another run has just removed it."""
    try:
        return sorted(os.scandir(directory), key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def _entry(name: str, status: os.stat_result) -> tuple[str, int, int, int]:
    kind = stat.S_IFMT(status.st_mode)
    # On some file systems a rename changes a directory's time and size. Its entries are listed separately.
    return (name, kind, 0, 0) if stat.S_ISDIR(kind) else (name, kind, status.st_size, status.st_mtime_ns)
