"""The protocol of a GPU for the TensorRT backend: facts, memory, copies on a stream, and captured graphs.

Addresses and handles are integers, as in TensorRT's API. No GPU library is imported here.
"""

from dataclasses import dataclass
from typing import Protocol

from llm2slm_export.arrays import Array


@dataclass(frozen=True)
class DeviceFacts:
    """The facts of a GPU that decide which engines it runs.

    Args:
        index: CUDA index.
        compute_capability: such as `8.9`.
        driver: version of the NVIDIA driver, such as `580.65.06`; None: unknown.
        total_bytes: device memory.
    """

    index: int
    name: str
    compute_capability: str
    driver: str | None
    total_bytes: int


class OutOfDeviceMemoryError(Exception):
    """The device has too little memory for an allocation. `MemoryPool` adds the purpose and the remedy."""


class GpuDevice(Protocol):
    """A GPU. Methods with a stream are asynchronous, and run after the stream's earlier work.

    Host memory passed to a copy must not change until the stream has been synchronized.
    """

    @property
    def facts(self) -> DeviceFacts:
        """The facts of this device."""
        ...

    def free_bytes(self) -> int:
        """The free memory in bytes."""
        ...

    def make_current(self) -> None:
        """Make this the current device of the calling thread, also for TensorRT."""
        ...

    def allocate(self, count: int) -> int:
        """Allocate `count` bytes. Returns their address, a multiple of 256.

        Raises:
            OutOfDeviceMemoryError: there is too little memory.
        """
        ...

    def free(self, address: int) -> None:
        """Free an allocation, after the device has finished its work."""
        ...

    def allocate_host(self, count: int) -> Array:
        """Allocate `count` bytes of host memory, uint8, that the device copies from and to directly (pinned)."""
        ...

    def free_host(self, array: Array) -> None:
        """Free pinned host memory."""
        ...

    def create_stream(self) -> int:
        """Create a stream that does not synchronize with others."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until a stream is idle."""
        ...

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        """Copy a contiguous array from host to device."""
        ...

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        """Copy from device to a contiguous array in host memory."""
        ...

    def copy_blocks(
        self, destination: int, source: int, *, width: int, count: int, to_pitch: int, from_pitch: int, stream: int
    ) -> None:
        """Copy `count` blocks of `width` bytes from device to device. Blocks start a pitch apart and must not overlap."""
        ...

    def fill(self, address: int, value: int, count: int, stream: int) -> None:
        """Set `count` bytes to a value."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Start capturing the stream's work instead of running it."""
        ...

    def end_capture(self, stream: int) -> int:
        """End the capture. Returns the handle of an executable graph."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Launch a captured graph on a stream, with the addresses of the capture."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Destroy a captured graph."""
        ...
