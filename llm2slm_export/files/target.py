"""A place that a command is about to write: what is there, and why it must not be replaced."""

import os
import pwd
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MOST_NAMED = 5
_LONGEST_NAME = 220  # bytes; the working directory's name is longer, and file systems take 255
# What is at a place: of every entry its path, its type, and a file's size and time.
State = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Kind:
    """What a command writes, and the only thing it replaces.

    Args:
        what: in words, with its article.
        foreign: says of what is at a path why it is not that, or what it holds besides; nothing where it is that alone.
        is_file: a file, whose place may be a link to it; otherwise a directory.
    """

    what: str
    foreign: Callable[[Path], Iterable[str]]
    is_file: bool = False

    def reasons_to_keep(self, path: Path) -> list[str]:
        """What `foreign` says of a file or directory; nothing of an empty one, with which nothing is lost."""
        empty = not any(path.iterdir()) if path.is_dir() else not path.stat().st_size
        return [] if empty else list(self.foreign(path))


def resolved(path: Path, *, follow: bool) -> Path:
    """The place that a path means: links on the way to it are followed, and, if asked for, one at its end."""
    if follow or path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def reasons_against(target: Path, kind: Kind, inputs: Iterable[Path] = ()) -> list[str]:
    """Why a place must not be written, all reasons.

    Args:
        target: from `resolved`.
        inputs: what the command reads; those that do not exist are names of something else.
    """
    return [
        *_of_the_way(target),
        *(() if kind.is_file else _of_the_place(target)),
        *_of_inputs(target, inputs),
        *_of_what_is_there(target, kind),
    ]


def state_of(path: Path) -> State | None:
    """What is at a path; None where nothing is. Two that are equal are of the same content, as far as times tell."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return (_entry("", status), *(_entry(name, found) for name, found in _entries(path, status)))


def foreign_entries(directory: Path, known: Callable[[str, bool], bool]) -> list[str]:
    """The first entries of a directory that are none of its own, as reasons.

    Args:
        known: whether a relative path, with / between its parts, is the directory's own; its second argument says whether it
            is a directory. Links and devices never are.
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
    named = [f"{name} is no part of it" for name in found[:_MOST_NAMED]]
    return [*named, *([f"and {len(found) - _MOST_NAMED} more"] if len(found) > _MOST_NAMED else ())]


def _of_the_way(target: Path) -> Iterator[str]:
    """Whether the directories that lead to a place can be made."""
    if (length := len(os.fsencode(target.name))) > _LONGEST_NAME:
        yield f"its name has {length} bytes, and {_LONGEST_NAME} are the most"
    there = next((parent for parent in target.parents if os.path.lexists(parent)), target)
    if there == target:
        return
    if not there.is_dir():
        yield f"{there} is not a directory"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"{there} cannot be written to"


def _of_the_place(target: Path) -> Iterator[str]:
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
        yield f"it holds home directories: {', '.join(holding[:_MOST_NAMED])}"
    if os.path.lexists(target / ".git"):
        yield "it is the root of a repository: it holds .git"


def _homes() -> Iterator[str]:
    with suppress(RuntimeError):  # neither $HOME nor an account
        yield str(Path.home())
    # Some accounts' homes are /nonexistent, or a directory of the system, which no one writes over either.
    yield from (entry.pw_dir for entry in pwd.getpwall() if Path(entry.pw_dir).is_dir())


def _of_inputs(target: Path, inputs: Iterable[Path]) -> Iterator[str]:
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


def _of_what_is_there(target: Path, kind: Kind) -> Iterator[str]:
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
    """Whether two paths are one file: names alone do not tell where a file system takes two spellings for one."""
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
    """The entries of a directory; none where another run has just taken it away."""
    try:
        return sorted(os.scandir(directory), key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def _entry(name: str, status: os.stat_result) -> tuple[str, int, int, int]:
    kind = stat.S_IFMT(status.st_mode)
    # A directory's time and size change with its name on some file systems; what is in it is listed.
    return (name, kind, 0, 0) if stat.S_ISDIR(kind) else (name, kind, status.st_size, status.st_mtime_ns)
