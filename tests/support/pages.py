"""The pages of memory: what there is of a mapping, and how much of it in huge ones."""

import ctypes
import mmap
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from llm2slm_export.inference.runtime.onnxruntime.huge_pages import setting

MEGABYTE = 2**20
BYTES = 32 * MEGABYTE
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if sys.platform == "linux" else 0
_COLLAPSE = 25


def mapped(*, filled: bool = True) -> mmap.mmap:
    """Memory, apart from its neighbours; filled: in pages of 4 KiB."""
    memory = mmap.mmap(-1, BYTES, flags=_PRIVATE)
    memory.madvise(mmap.MADV_DONTDUMP)
    if filled:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.write(b"1" * BYTES)
    return memory


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def page_sizes(address: int, process: int | str = "self") -> tuple[int, int]:
    """Bytes that there are of a mapping of `BYTES`, and those in huge pages."""
    resident = huge = 0
    inside = False
    for line in Path(f"/proc/{process}/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(number, 16) for number in found.groups())
            inside = start < address + BYTES and end > address
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) * 1024
    return resident, huge


@cache
def require_huge_pages() -> None:
    """Skip the test where Linux cannot move memory into huge pages at once."""
    if sys.platform != "linux" or setting() not in ("always", "madvise"):
        pytest.skip("this system has no huge pages to give")
    memory = mapped()
    memory.madvise(mmap.MADV_HUGEPAGE)
    size = 2 * MEGABYTE
    first = -(-address_of(memory) // size) * size
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _COLLAPSE):
        pytest.skip("this Linux moves memory into huge pages by and by, or has none in one piece")
