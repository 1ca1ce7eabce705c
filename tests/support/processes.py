"""The processes of this machine."""

from collections.abc import Iterator
from pathlib import Path


def command_line(pid: int) -> str:
    """A process's words, each followed by a space; empty if it has ended."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """The processes that a process has started, and those that they have started, with their command lines."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    pending = [pid]
    while pending:
        parent = pending.pop()
        for child in [child for child, of in parents.items() if of == parent]:
            pending.append(child)
            yield child, command_line(child)
