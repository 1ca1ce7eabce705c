"""A GPU without a GPU: an address space of bytes, a stream that does nothing until it is waited for, and captured graphs.

It refuses what a GPU would carry out all the same, and be wrong: addresses outside an allocation or in one that has been
freed, copies that overlap. What is allocated holds NaNs. What has been captured is replayed with the addresses of then.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.inference.runtime.tensorrt.device_protocol import DeviceFacts, OutOfDeviceMemoryError

_START, _ALIGNMENT, _GAP = 0x7F0000000000, 256, 4096


class FakeFault(Exception):
    """What would be an illegal access, or a race, or nothing at all until much later."""


class FakeGpu:
    """A `Device`. `counts`: how often each of its methods was called."""

    def __init__(self, facts: DeviceFacts | None = None) -> None:
        self.facts = facts or DeviceFacts(0, "Fake GPU", "8.9", "580.65.06", 8 << 30)
        self.counts: Counter[str] = Counter()
        self._blocks: dict[int, np.ndarray] = {}
        self._freed: dict[int, int] = {}
        self._host: dict[int, np.ndarray] = {}
        self._next = _START
        self._streams: dict[int, list[Callable[[], None]]] = {}
        self._capturing: dict[int, list[Callable[[], None]]] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self.current = False

    # --- the protocol ---

    def free_bytes(self) -> int:
        return self.facts.total_bytes - sum(map(len, self._blocks.values()))

    def make_current(self) -> None:
        self.current = True

    def allocate(self, count: int) -> int:
        self._count("allocate")
        if self._capturing:
            raise FakeFault("an allocation during a capture")
        if count > self.free_bytes():
            raise OutOfDeviceMemoryError
        address = self._next
        self._next += -(-count // _ALIGNMENT) * _ALIGNMENT + _GAP
        self._blocks[address] = np.full(count, 0xFF, np.uint8)  # NaN, in every float type
        return address

    def free(self, address: int) -> None:
        self._count("free")
        for stream in self._streams:  # as cudaFree does
            self.synchronize(stream)
        if address not in self._blocks:
            raise FakeFault(f"{address:#x} is no allocation")
        self._freed[address] = len(self._blocks.pop(address))

    def allocate_host(self, count: int) -> Array:
        self._count("allocate_host")
        array = np.full(count, 0xFF, np.uint8)
        self._host[array.ctypes.data] = array
        return array

    def free_host(self, array: Array) -> None:
        self._count("free_host")
        del self._host[array.ctypes.data]

    def create_stream(self) -> int:
        stream = 1 + max(self._streams, default=0)
        self._streams[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        self._count("synchronize")
        if stream in self._capturing:
            raise FakeFault("a wait for a stream that is captured")
        work = self._streams[stream]
        while work:
            work.pop(0)()

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        self._count("copy_in")
        _contiguous(array)
        self.enqueue(stream, lambda: self.write(address, array))

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        self._count("copy_out")
        _contiguous(array)

        def copy() -> None:
            array.reshape(-1).view(np.uint8)[:] = self.read(address, array.nbytes)

        self.enqueue(stream, copy)

    def copy_blocks(
        self, destination: int, source: int, *, width: int, count: int, to_pitch: int, from_pitch: int, stream: int
    ) -> None:
        self._count("copy_blocks")
        if width > min(to_pitch, from_pitch):
            raise FakeFault(f"blocks of {width} bytes, {to_pitch} and {from_pitch} apart")

        def copy() -> None:
            to, start = (destination, width + (count - 1) * to_pitch), (source, width + (count - 1) * from_pitch)
            if overlap(to, start):
                raise FakeFault(f"a copy of {start} over {to}")
            for i in range(count):
                self.write(destination + i * to_pitch, self.read(source + i * from_pitch, width))

        self.enqueue(stream, copy)

    def fill(self, address: int, value: int, count: int, stream: int) -> None:
        self._count("fill")
        self.enqueue(stream, lambda: self.write(address, np.full(count, value, np.uint8)))

    def begin_capture(self, stream: int) -> None:
        self._count("begin_capture")
        self._capturing[stream] = []

    def end_capture(self, stream: int) -> int:
        graph = 1 + max(self._graphs, default=0)
        self._graphs[graph] = self._capturing.pop(stream)
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._count("launch")
        for work in self._graphs[graph]:
            self.enqueue(stream, work)

    def destroy_graph(self, graph: int) -> None:
        self._count("destroy_graph")
        del self._graphs[graph]

    # --- for the fake TensorRT, and for tests ---

    def capturing(self, stream: int) -> bool:
        return stream in self._capturing

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        if not self.current:
            raise FakeFault("work for a device that is not the thread's")
        (self._capturing if stream in self._capturing else self._streams)[stream].append(work)

    def read(self, address: int, count: int) -> Array:
        block, offset = self._find(address, count)
        return block[offset : offset + count].copy()

    def write(self, address: int, array: Array) -> None:
        block, offset = self._find(address, array.nbytes)
        block[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    @property
    def nothing_left(self) -> bool:
        """Whether all that was taken has been given back."""
        return not (self._blocks or self._host or self._streams or self._graphs)

    def _count(self, method: str) -> None:
        self.counts[method] += 1

    def _find(self, address: int, count: int) -> tuple[Array, int]:
        for start, block in self._blocks.items():
            if start <= address < start + max(1, len(block)):
                if address + count > start + len(block):
                    raise FakeFault(
                        f"{count} bytes at {address:#x}, of which {start + len(block) - address} are allocated"
                    )
                return block, address - start
        used = [start for start, size in self._freed.items() if start <= address < start + size]
        raise FakeFault(f"{address:#x} {'has been freed' if used else 'was never allocated'}")


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two ranges, address and bytes, have bytes in common."""
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


def _contiguous(array: Array) -> None:
    if not array.flags.c_contiguous:
        raise FakeFault("a copy of host memory that is not contiguous")
