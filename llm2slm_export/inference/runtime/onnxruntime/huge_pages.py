"""Transparent huge pages for the memory of an ONNX Runtime session, on Linux.

A decoder step reads every weight once. With 4 KiB pages it needs a page-table walk every 64 cache lines, and hardware
prefetching stops at each page. With 2 MiB pages a token took 1 to 6 % less time
(docs/notebook/threads-and-huge-pages.md). ONNX Runtime does not request huge pages, so its memory is moved into them after
a session is opened.
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
_HUGEPAGE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE and, since Linux 6.1, MADV_COLLAPSE
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+) *(.*)")
# Only mappings with this resident share are moved: in sparse ones, such as stacks, huge pages would waste memory.
_RESIDENT = 0.9

Interval = tuple[int, int]


@dataclass(frozen=True)
class _Mapping:
    """A private anonymous mapping of this process: its addresses and resident bytes."""

    start: int
    end: int
    resident: int


def setting() -> str | None:
    """The system's setting for transparent huge pages: `always`, `madvise` or `never`; None: not supported."""
    try:
        text = (SETTINGS / "enabled").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else None


@contextmanager
def huge_pages() -> Iterator[None]:
    """Move the memory that is allocated in this context, and not freed in it, into huge pages.

    This is best effort: nothing changes if the system does not support them (`setting`) or lacks contiguous memory. Linux
    before 6.1 moves the memory gradually.
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
    """The parts of an interval outside all `others`, in order."""
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
    """The size of a huge page in bytes; 0 if they are not supported."""
    if sys.platform != "linux":
        return 0
    try:
        return int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _mappings() -> Iterator[_Mapping]:
    """The private anonymous mappings of this process, in order."""
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
