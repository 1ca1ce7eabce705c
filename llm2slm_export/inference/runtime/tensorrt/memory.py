"""A device's memory, in blocks that are kept for the next time: after the first prompts nothing is allocated any more."""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from llm2slm_export.errors import DeviceError
from llm2slm_export.inference.runtime.backend import Array
from llm2slm_export.inference.runtime.tensorrt.device import GpuDevice, OutOfDeviceMemoryError
from llm2slm_export.inference.runtime.tensorrt.dtypes import STORED, from_stored, item_bytes, to_stored


@dataclass(frozen=True)
class Block:
    """Bytes of a device's memory."""

    address: int
    count: int


class MemoryPool:
    """What has been taken of a device, and the stream on which all of it is used.

    A block may be given back while the stream still has to use it: whoever takes it next does so on the same stream, later.
    """

    def __init__(self, device: GpuDevice) -> None:
        self.device = device
        self.stream = device.create_stream()
        self._all: dict[int, Block] = {}
        self._unused: dict[int, list[Block]] = {}
        # By the garbage collector, in any thread and at any time: nothing else is done then than to note it.
        self._returned: deque[Block] = deque()
        self._host: dict[int, Array] = {}
        # Asked to give blocks back before an allocation is given up.
        self.on_pressure: list[Callable[[], None]] = []

    @property
    def taken_bytes(self) -> int:
        """All that this has allocated, in use or not."""
        return sum(block.count for block in self._all.values())

    def take(self, count: int, purpose: str, remedy: str) -> Block:
        """A block of so many bytes or a few more, with whatever is in it.

        Args:
            purpose: what it is for, to end "There is no room for" with.
            remedy: what lowers it.

        Raises:
            DeviceError: the device has no room, with what was asked and what is free.
        """
        self._collect()
        rounded = _rounded(count)
        if kept := self._unused.get(rounded):
            return kept.pop()
        try:
            address = self.device.allocate(rounded)
        except OutOfDeviceMemoryError:
            for give_back in self.on_pressure:
                give_back()
            self.trim()
            try:
                address = self.device.allocate(rounded)
            except OutOfDeviceMemoryError as error:
                facts = self.device.facts
                raise DeviceError(
                    f"The device 'tensorrt:{facts.index}' has no room for {purpose}.",
                    f"asked for: {_size(count)}",
                    f"free: {_size(self.device.free_bytes())} of {_size(facts.total_bytes)} on {facts.name}; taken by this "
                    f"pair: {_size(self.taken_bytes)}",
                    remedy=remedy,
                ) from error
        block = Block(address, rounded)
        self._all[address] = block
        return block

    def give_back(self, block: Block) -> None:
        """Have a block for the next one who asks. Any thread may."""
        self._returned.append(block)

    def host(self, shape: Sequence[int], dtype: str) -> Array:
        """An array of zeros in host memory that the device copies from and to directly."""
        raw = self.device.allocate_host(max(1, prod(shape) * item_bytes(dtype)))
        array = raw[: prod(shape) * item_bytes(dtype)].view(STORED[dtype]).reshape(shape)
        array[...] = 0
        self._host[array.ctypes.data] = raw
        return array

    def give_back_host(self, array: Array) -> None:
        """Free what `host` gave; nothing may use it any more."""
        self.device.free_host(self._host.pop(array.ctypes.data))

    def trim(self) -> None:
        """Give the device what is not in use."""
        self._collect()
        self.device.synchronize(self.stream)
        for blocks in self._unused.values():
            for block in blocks:
                self.device.free(block.address)
                del self._all[block.address]
        self._unused.clear()

    def close(self) -> None:
        """Give the device everything, in use or not."""
        self.device.synchronize(self.stream)
        for address in self._all:
            self.device.free(address)
        for array in self._host.values():
            self.device.free_host(array)
        self._all.clear()
        self._unused.clear()
        self._host.clear()
        self.device.destroy_stream(self.stream)

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            if block.address in self._all:
                self._unused.setdefault(block.count, []).append(block)


class DeviceTensor:
    """A tensor in a device's memory, which goes back when nothing refers to it any more.

    Args:
        dtype: as the contract names it.
        purpose, remedy: see `MemoryPool.take`.
    """

    def __init__(self, memory: MemoryPool, shape: Sequence[int], dtype: str, *, purpose: str, remedy: str) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self._memory = memory
        self._block = memory.take(max(1, self.count), purpose, remedy)
        weakref.finalize(self, memory.give_back, self._block).atexit = False

    @property
    def address(self) -> int:
        """Where it begins."""
        return self._block.address

    @property
    def count(self) -> int:
        """Its bytes."""
        return prod(self.shape) * item_bytes(self.dtype)

    def clear(self) -> None:
        """Set every byte to 0."""
        if self.count:
            self._memory.device.fill(self.address, 0, self.count, self._memory.stream)

    def write(self, array: Array) -> None:
        """Write an array over its beginning, in its type; waits until that is done."""
        stored = to_stored(array, self.dtype)
        if stored.size:
            self._memory.device.copy_in(self.address, stored, self._memory.stream)
            self._memory.device.synchronize(self._memory.stream)

    def read(self) -> Array:
        """What it holds, floats as float32; waits for it."""
        stored = np.empty(self.shape, STORED[self.dtype])
        if stored.size:
            self._memory.device.copy_out(stored, self.address, self._memory.stream)
            self._memory.device.synchronize(self._memory.stream)
        return from_stored(stored, self.dtype)


def _rounded(count: int) -> int:
    """To an eighth of the next power of two at most, so that blocks are found again; to 512 bytes at least."""
    step = max(512, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
