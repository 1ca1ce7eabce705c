"""Huge pages for the memory that a session allocates, where Linux gives them to those who ask.

A decoder's step reads every weight once. In pages of 4 KiB that is a walk through the page tables every 64 cache lines, and
the processor's prefetching ends with each: in pages of 2 MiB a token took 2 to 6 % less (docs/performance.md). ONNX Runtime
allocates by itself and asks for none, so that what is there once a session is open is moved into them.
"""

import ctypes
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_SMAPS = Path("/proc/self/smaps")
_HUGEPAGE, _COLLAPSE = 14, 25  # of madvise(2); the second one is Linux 6.1's
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+) *(.*)")
# Of a mapping that is filled: of stacks, which are not, huge pages would take memory that nobody uses.
_RESIDENT = 0.9

Interval = tuple[int, int]


@dataclass(frozen=True)
class _Mapping:
    """Private memory of this process that is no file's: addresses, and how many bytes of it there really are."""

    start: int
    end: int
    resident: int


def setting() -> str | None:
    """Who is given huge pages: `always`, `madvise` (those who ask) or `never`; None where the system has none."""
    try:
        said = (SETTINGS / "enabled").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"\[(\w+)\]", said)
    return found[1] if found else None


@contextmanager
def huge_pages() -> Iterator[None]:
    """Move what is allocated inside, and still there at the end, into huge pages.

    A wish: where the system has none to give (`setting`), or no memory in one piece, all is as it was. Linux before 6.1 moves
    them by and by.
    """
    size = _page_size() if setting() in ("always", "madvise") else 0
    if not size:
        yield
        return
    before = [(mapping.start, mapping.end) for mapping in _mappings()]
    yield
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for mapping in _mappings():
        if mapping.resident < _RESIDENT * (mapping.end - mapping.start):
            continue
        for start, end in subtract_intervals((mapping.start, mapping.end), before):
            first, last = -(-start // size) * size, end // size * size
            if first < last:
                for advice in (_HUGEPAGE, _COLLAPSE):
                    madvise(first, last - first, advice)


def subtract_intervals(whole: Interval, others: Iterable[Interval]) -> list[Interval]:
    """What is left of an interval, in order."""
    left = [whole]
    for low, high in others:
        left = [
            part
            for start, end in left
            for part in ((start, min(end, low)), (max(start, high), end))
            if part[0] < part[1]
        ]
    return left


def _page_size() -> int:
    """Bytes of a huge page, 0 where there are none."""
    if sys.platform != "linux":
        return 0
    try:
        return int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _mappings() -> Iterator[_Mapping]:
    """The process's own memory, in order."""
    try:
        lines = _SMAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    own: Interval | None = None
    for line in lines:
        if found := _MAPPING.match(line):
            start, end, access, inode, name = found.groups()
            anonymous = inode == "0" and (not name or name == "[heap]" or name.startswith("[anon"))
            own = (int(start, 16), int(end, 16)) if anonymous and access == "rw-p" else None
        elif own is not None and line.startswith("Rss:"):
            yield _Mapping(*own, resident=int(line.split()[1]) * 1024)
