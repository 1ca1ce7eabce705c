"""A GPU, through cuda-python's bindings of the CUDA runtime (`cuda.bindings.runtime`)."""

import ctypes
from typing import Any

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.environment.nvidia_driver import driver_version
from llm2slm_export.errors import DeviceError, MissingExtraError
from llm2slm_export.inference.runtime.tensorrt.device_protocol import DeviceFacts, OutOfDeviceMemoryError


def cuda_runtime() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        MissingExtraError: it is not installed.
        DeviceError: it is installed, but does not load.
    """
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "Running TensorRT engines needs cuda-bindings.",
            f"not installed: {error.name}",
            remedy="pip install 'llm2slm-export[tensorrt]', or [tensorrt-rtx] for engines of TensorRT-RTX",
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise DeviceError(
            "cuda-bindings is installed, but does not load.",
            str(error),
            remedy="pip install --force-reinstall cuda-bindings, or see `llm2slm-export doctor`",
        ) from error
    return runtime


class CudaDevice:
    """The `GpuDevice` of the CUDA runtime.

    Args:
        index: the GPU's CUDA index.
        cuda: the module `cuda.bindings.runtime`, or a test double.

    Raises:
        DeviceError: there is no driver, it is too old for the bindings, or there is no such GPU.
    """

    def __init__(self, index: int, *, cuda: Any) -> None:
        self._cuda, self._index = cuda, index
        self._check_present(index)
        self.make_current()
        properties = self._call(cuda.cudaGetDeviceProperties, index)
        name = properties.name
        self._facts = DeviceFacts(
            index=index,
            name=name.decode().rstrip("\0") if isinstance(name, bytes) else str(name),
            compute_capability=f"{properties.major}.{properties.minor}",
            driver=driver_version(),
            total_bytes=int(properties.totalGlobalMem),
        )

    @property
    def facts(self) -> DeviceFacts:
        """The facts of this device."""
        return self._facts

    def free_bytes(self) -> int:
        """The free memory in bytes."""
        free, _ = self._call(self._cuda.cudaMemGetInfo)
        return int(free)

    def make_current(self) -> None:
        """Make this the current device of the calling thread."""
        self._call(self._cuda.cudaSetDevice, self._index)

    def allocate(self, count: int) -> int:
        """Allocate `count` bytes. Returns their address."""
        error, address = self._cuda.cudaMalloc(count)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfDeviceMemoryError(f"cudaMalloc: {count} bytes")
        self._check(error, "cudaMalloc")
        return int(address)

    def free(self, address: int) -> None:
        """Free an allocation. CUDA waits until it is no longer in use."""
        self._call(self._cuda.cudaFree, address)

    def allocate_host(self, count: int) -> Array:
        """Allocate `count` bytes of pinned host memory, uint8."""
        address = self._call(self._cuda.cudaMallocHost, count)
        return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(int(address)))

    def free_host(self, array: Array) -> None:
        """Free pinned host memory."""
        self._call(self._cuda.cudaFreeHost, array.ctypes.data)

    def create_stream(self) -> int:
        """Create a stream that does not synchronize with the default stream."""
        return int(self._call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call(self._cuda.cudaStreamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        """Wait until a stream is idle."""
        self._call(self._cuda.cudaStreamSynchronize, stream)

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        """Copy from host to device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, kind, stream)

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        """Copy from device to host."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, kind, stream)

    def copy_blocks(
        self, destination: int, source: int, *, width: int, count: int, to_pitch: int, from_pitch: int, stream: int
    ) -> None:
        """Copy `count` blocks of `width` bytes from device to device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if width == to_pitch == from_pitch:  # contiguous: one copy, without the limit on pitches (cudaDevAttrMaxPitch)
            self._call(self._cuda.cudaMemcpyAsync, destination, source, width * count, kind, stream)
            return
        self._call(
            self._cuda.cudaMemcpy2DAsync, destination, to_pitch, source, from_pitch, width, count, kind, stream
        )  # fmt: skip

    def fill(self, address: int, value: int, count: int, stream: int) -> None:
        """Set bytes to a value."""
        self._call(self._cuda.cudaMemsetAsync, address, value, count, stream)

    def begin_capture(self, stream: int) -> None:
        """Start capturing the stream's work. Other threads may still allocate memory."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture, stream, mode)

    def end_capture(self, stream: int) -> int:
        """End the capture. Returns an executable graph."""
        graph = self._call(self._cuda.cudaStreamEndCapture, stream)
        try:
            return int(self._call(self._cuda.cudaGraphInstantiate, graph, 0))
        finally:
            self._call(self._cuda.cudaGraphDestroy, graph)

    def launch(self, graph: int, stream: int) -> None:
        """Launch a captured graph on a stream."""
        self._call(self._cuda.cudaGraphLaunch, graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Destroy a captured graph."""
        self._call(self._cuda.cudaGraphExecDestroy, graph)

    def _check_present(self, index: int) -> None:
        cuda = self._cuda
        error, count = cuda.cudaGetDeviceCount()
        _, built = cuda.cudaRuntimeGetVersion()
        _, driver = cuda.cudaDriverGetVersion()
        found = [
            f"cuda-bindings: of CUDA {_release(built)}",
            f"driver: {driver_version() or 'none found'}" + (f", for CUDA {_release(driver)}" if driver else ""),
        ]
        if error == cuda.cudaError_t.cudaErrorInsufficientDriver:
            raise DeviceError(
                f"The device 'tensorrt:{index}' needs an NVIDIA driver for CUDA {built // 1000} or newer.",
                *found,
                remedy="install or update the NVIDIA driver"
                + (f", or pip install 'cuda-bindings<{driver // 1000 + 1}'" if driver else "")
                + "; `llm2slm-export doctor` shows the whole matrix",
            )
        if error == cuda.cudaError_t.cudaErrorNoDevice:
            count, error = 0, cuda.cudaError_t.cudaSuccess
        self._check(error, "cudaGetDeviceCount")
        if index >= count:
            raise DeviceError(
                f"There is no device 'tensorrt:{index}'.", f"NVIDIA GPUs found: {count}", *found,
                remedy="choose one of " + ", ".join(f"tensorrt:{i}" for i in range(count)) if count
                else "run on a machine with an NVIDIA GPU, or use device 'cpu'",
            )  # fmt: skip

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call a function and check its error. Returns its other results."""
        error, *values = function(*arguments)
        self._check(error, function.__name__)
        return values[0] if len(values) == 1 else tuple(values)

    def _check(self, error: Any, name: str) -> None:
        if error != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(error)
            raise DeviceError(
                f"CUDA failed in {name}.",
                f"{getattr(error, 'name', error)}: {text.decode() if isinstance(text, bytes) else text}",
                remedy="load the bundle again; if it fails again, see `llm2slm-export doctor`",
            )


def _release(number: int) -> str:
    """A CUDA version number as text: 13000 → `13.0`."""
    return f"{number // 1000}.{number % 1000 // 10}"
