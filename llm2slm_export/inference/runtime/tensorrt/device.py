"""A GPU as the TensorRT backend needs it: its facts, memory, copies in the order of a stream, and captured graphs.

Addresses and handles are integers, as TensorRT takes them. Nothing here imports a GPU's libraries.
"""

from dataclasses import dataclass
from typing import Protocol

from llm2slm_export.inference.runtime.backend import Array


@dataclass(frozen=True)
class DeviceFacts:
    """What an engine was compiled for, of a device: `compute_capability` as `8.9`, `driver` as `580.65.06` (None: nothing
    tells it)."""

    index: int
    name: str
    compute_capability: str
    driver: str | None
    total_bytes: int


class OutOfDeviceMemoryError(Exception):
    """The device has no room for an allocation. The backend says what it was for, and what lowers it."""


class GpuDevice(Protocol):
    """One GPU. What takes a stream returns at once, and is done after all that the stream was given before.

    Host memory given to a copy must stay as it is until the stream has been waited for.
    """

    @property
    def facts(self) -> DeviceFacts:
        """Which device it is."""
        ...

    def free_bytes(self) -> int:
        """Memory that nobody has taken."""
        ...

    def make_current(self) -> None:
        """Have this thread's calls, TensorRT's among them, go to this device."""
        ...

    def allocate(self, count: int) -> int:
        """The address of so many bytes, a multiple of 256.

        Raises:
            OutOfDeviceMemoryError: there is no room.
        """
        ...

    def free(self, address: int) -> None:
        """Give an allocation back, once the device has done what it was given."""
        ...

    def allocate_host(self, count: int) -> Array:
        """So many bytes, uint8, of host memory that the device copies from and to without another copy between."""
        ...

    def free_host(self, array: Array) -> None:
        """Give it back."""
        ...

    def create_stream(self) -> int:
        """A new stream, which waits for no other."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Give it back."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done all that it was given."""
        ...

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        """From host memory, contiguous."""
        ...

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        """Into host memory, contiguous."""
        ...

    def copy_blocks(
        self, destination: int, source: int, *, width: int, count: int, to_pitch: int, from_pitch: int, stream: int
    ) -> None:
        """From device to device: `count` blocks of `width` bytes that begin so many bytes apart. They must not overlap."""
        ...

    def fill(self, address: int, value: int, count: int, stream: int) -> None:
        """Set so many bytes to a value."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Keep what the stream is given from here on, and do none of it."""
        ...

    def end_capture(self, stream: int) -> int:
        """What was kept, ready to be launched again and again: a handle."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Give the stream all that was captured, with the addresses of then."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Give it back."""
        ...
