"""A pool of device memory. Freed blocks are reused, so that nothing is allocated after the first prompts."""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.errors import DeviceError
from llm2slm_export.inference.runtime.tensorrt.device_protocol import GpuDevice, OutOfDeviceMemoryError
from llm2slm_export.inference.runtime.tensorrt.dtypes import STORED, from_stored, item_bytes, to_stored


@dataclass(frozen=True)
class Block:
    """A block of device memory: its address and size in bytes."""

    address: int
    count: int


class MemoryPool:
    """The allocated blocks of a device, and the stream on which all of them are used.

    A block may be returned while the stream still uses it, because its next use is later on the same stream.
    """

    def __init__(self, device: GpuDevice) -> None:
        self.device = device
        self.stream = device.create_stream()
        self._all: dict[int, Block] = {}
        self._unused: dict[int, list[Block]] = {}
        # Blocks returned by the garbage collector, which runs in any thread at any time. `_collect` processes them.
        self._returned: deque[Block] = deque()
        self._host: dict[int, Array] = {}
        # Callbacks that release blocks before an allocation fails.
        self.on_pressure: list[Callable[[], None]] = []

    @property
    def taken_bytes(self) -> int:
        """Bytes allocated by this pool, in use or not."""
        return sum(block.count for block in self._all.values())

    def take(self, count: int, purpose: str, remedy: str) -> Block:
        """Take an uninitialized block of at least `count` bytes.

        Args:
            purpose: the use of the block, for the error "… has no room for PURPOSE".
            remedy: the remedy of that error.

        Raises:
            DeviceError: there is too little memory, with the requested and free bytes.
        """
        self._collect()
        rounded = _rounded(count)
        if free := self._unused.get(rounded):
            return free.pop()
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
                    f"requested: {_size(count)}",
                    f"free: {_size(self.device.free_bytes())} of {_size(facts.total_bytes)} on {facts.name}; used by this "
                    f"pair: {_size(self.taken_bytes)}",
                    remedy=remedy,
                ) from error
        block = Block(address, rounded)
        self._all[address] = block
        return block

    def give_back(self, block: Block) -> None:
        """Return a block to the pool. Thread-safe."""
        self._returned.append(block)

    def host(self, shape: Sequence[int], dtype: str) -> Array:
        """Allocate an array of zeros in pinned host memory."""
        raw = self.device.allocate_host(max(1, prod(shape) * item_bytes(dtype)))
        array = raw[: prod(shape) * item_bytes(dtype)].view(STORED[dtype]).reshape(shape)
        array[...] = 0
        self._host[array.ctypes.data] = raw
        return array

    def give_back_host(self, array: Array) -> None:
        """Free an array of `host`, which must not be in use."""
        self.device.free_host(self._host.pop(array.ctypes.data))

    def trim(self) -> None:
        """Free unused blocks."""
        self._collect()
        self.device.synchronize(self.stream)
        for blocks in self._unused.values():
            for block in blocks:
                self.device.free(block.address)
                del self._all[block.address]
        self._unused.clear()

    def close(self) -> None:
        """Free all memory, in use or not, and destroy the stream."""
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
    """A tensor in device memory. Its block returns to the pool when the tensor is garbage-collected.

    Args:
        dtype: the type's contract name.
        purpose, remedy: see `MemoryPool.take`.
    """

    def __init__(self, memory: MemoryPool, shape: Sequence[int], dtype: str, *, purpose: str, remedy: str) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self._memory = memory
        self._block = memory.take(max(1, self.count), purpose, remedy)
        weakref.finalize(self, memory.give_back, self._block).atexit = False

    @property
    def address(self) -> int:
        """Its device address."""
        return self._block.address

    @property
    def count(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * item_bytes(self.dtype)

    def clear(self) -> None:
        """Set all bytes to 0."""
        if self.count:
            self._memory.device.fill(self.address, 0, self.count, self._memory.stream)

    def write(self, array: Array) -> None:
        """Convert an array to the tensor's type and write it to the beginning of the tensor. Waits for the copy."""
        stored = to_stored(array, self.dtype)
        if stored.size:
            self._memory.device.copy_in(self.address, stored, self._memory.stream)
            self._memory.device.synchronize(self._memory.stream)

    def read(self) -> Array:
        """Copy the tensor to host memory, floats as float32. Waits for the copy."""
        stored = np.empty(self.shape, STORED[self.dtype])
        if stored.size:
            self._memory.device.copy_out(stored, self.address, self._memory.stream)
            self._memory.device.synchronize(self._memory.stream)
        return from_stored(stored, self.dtype)


def _rounded(count: int) -> int:
    """Round a size up, by at most an eighth, to multiples of at least 512 bytes, so that blocks can be reused."""
    step = max(512, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
