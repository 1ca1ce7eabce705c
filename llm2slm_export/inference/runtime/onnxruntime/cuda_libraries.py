"""The CUDA libraries that ONNX Runtime's CUDA provider needs, installed or missing.

ONNX Runtime only logs missing ones and falls back to the CPU. The list is read from the provider's ELF file (its NEEDED
entries).
"""

import contextlib
import ctypes
import ctypes.util
import importlib.util
import io
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2slm_export.errors import DeviceError

DRIVER = "libcuda.so.1"
_PROVIDER = "libonnxruntime_providers_cuda.so"
_CUDA_PREFIXES = (
    "libcu",
    "libnv",
)  # libcudart, libcublas, libcurand, libcudnn, libnvrtc; the others are system libraries
# ELF constants of the System V ABI: the section type SHT_DYNAMIC and the dynamic tag DT_NEEDED.
_DYNAMIC, _NEEDED = 6, 1


@dataclass(frozen=True)
class Library:
    """A library that the provider needs.

    Args:
        problem: the loader's message; None: the library loads.
        others: files of other versions of the library, if it does not load.
    """

    name: str
    problem: str | None
    others: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """The command that installs the library."""
        import onnxruntime

        if self.name == DRIVER:
            return f"install NVIDIA's driver ({DRIVER} is part of it)"
        # Both extras: cuBLAS is part of [cudnn].
        return f"pip install 'onnxruntime-gpu[cuda,cudnn]=={onnxruntime.__version__}'"


def needed_libraries(path: Path) -> tuple[str, ...]:
    """The NEEDED entries of a 64-bit little-endian ELF file, in order; empty for any other file."""
    with path.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            return ()
        (table,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        sections = []
        for number in range(count):
            file.seek(table + number * size)
            _, kind, _, _, offset, length, link = struct.unpack("<IIQQQQI", file.read(44))
            sections.append((kind, offset, length, link))
        dynamic = next((section for section in sections if section[0] == _DYNAMIC), None)
        if dynamic is None:
            return ()
        _, offset, length, link = dynamic
        file.seek(offset)
        entries = struct.iter_unpack("<qQ", file.read(length // 16 * 16))
        at = [value for tag, value in entries if tag == _NEEDED]
        file.seek(sections[link][1])
        names = file.read(sections[link][2])
    return tuple(names[start : names.index(b"\0", start)].decode() for start in at)


def cuda_libraries() -> tuple[Library, ...]:
    """The CUDA libraries that ONNX Runtime's provider needs, in its order; empty without a provider.

    Each library is loaded as a check, as the provider would load it.
    """
    path = _provider()
    return (
        tuple(_tried(name) for name in needed_libraries(path) if name.startswith(_CUDA_PREFIXES))
        if path.is_file()
        else ()
    )


def _provider() -> Path:
    import onnxruntime

    return Path(onnxruntime.__file__).parent / "capi" / _PROVIDER


def _tried(name: str) -> Library:
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return Library(name, str(error).removeprefix(f"{name}: "), _others(name))
    return Library(name, None)


def _others(name: str) -> tuple[str, ...]:
    """Files of other versions of a library, in the packages nvidia-* and on the loader's search path."""
    stem = name.partition(".so")[0]
    packages = importlib.util.find_spec("nvidia")
    roots = packages.submodule_search_locations if packages else None
    found = {file.name for root in roots or () for file in Path(root).glob(f"*/lib/{stem}.so.*")}
    found.add(ctypes.util.find_library(stem.removeprefix("lib")) or name)
    return tuple(sorted(found - {name}))


def find_cuda_libraries() -> tuple[Library, ...]:
    """`cuda_libraries` after ONNX Runtime has preloaded the packages nvidia-*."""
    if _provider().is_file():
        _preload()
    return cuda_libraries()


def cuda_releases() -> tuple[str | None, str | None]:
    """The CUDA releases that ONNX Runtime is built for and that its CUDA runtime has, such as `13.0`; None: unknown."""
    import onnxruntime

    runtime, release = _runtime(), ctypes.c_int()
    if runtime is not None:
        runtime.cudaRuntimeGetVersion(ctypes.byref(release))
    return getattr(onnxruntime, "cuda_version", None) or None, _release(release.value)


def _release(number: int) -> str | None:
    """A CUDA version number as text: 13020 → `13.2`, 0 → None."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def require_cuda_libraries(device: str) -> None:
    """Load the provider's CUDA libraries, first from the packages nvidia-* like ONNX Runtime.

    Raises:
        DeviceError: libraries are missing or do not load, all of them named.
    """
    import onnxruntime

    libraries = find_cuda_libraries()
    missing = [library for library in libraries if library.problem is not None]
    if not missing:
        return
    raise DeviceError(
        f"The device {device!r} needs libraries that are missing.",
        f"onnxruntime {onnxruntime.__version__} is built for {_built_for()}, and needs: "
        f"{', '.join(library.name for library in libraries)}",
        *(f"{library.name}: {library.problem}{_beside(library)}" for library in missing),
        remedy=_remedy(missing),
    )


def _preload() -> None:
    """Load CUDA and cuDNN from the packages nvidia-* with ONNX Runtime's own function, without its output."""
    import onnxruntime

    if sys.platform == "linux" and hasattr(onnxruntime, "preload_dlls"):
        # It prints every library that it does not find, needed or not. The callers report the needed ones.
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def _beside(library: Library) -> str:
    return f"; found: {', '.join(library.others)}" if library.others else ""


def _remedy(missing: list[Library]) -> str:
    remedies = list(dict.fromkeys(library.remedy for library in missing))
    if any(library.name != DRIVER for library in missing):
        remedies.append("or put the directory of the libraries on LD_LIBRARY_PATH")
    return "; ".join([*remedies, "or use device 'cpu'"])


def require_cuda_device(device: str, index: int) -> None:
    """Check that the driver has a device, after `require_cuda_libraries`.

    Raises:
        DeviceError: the driver does not support this CUDA release, or has no such device.
    """
    runtime = _runtime()
    if runtime is None:  # ONNX Runtime links it statically, and reports errors itself
        return
    count = ctypes.c_int()
    if status := runtime.cudaGetDeviceCount(ctypes.byref(count)):
        version = ctypes.c_int()
        runtime.cudaDriverGetVersion(ctypes.byref(version))  # 0 without a driver
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        release = _release(version.value)
        supported = f"CUDA {release}" if release else "none"
        raise DeviceError(
            f"The device {device!r} is not available: CUDA finds no device.",
            f"cudaGetDeviceCount: {runtime.cudaGetErrorString(status).decode()} ({status})",
            f"needed: a driver for {_built_for()}; found: {supported}",
            remedy="check `nvidia-smi`, and update the driver if it is older than that CUDA; or use device 'cpu'",
        )
    if index >= count.value:
        raise DeviceError(
            f"There is no device {device!r}.",
            f"CUDA devices here: {', '.join(f'cuda:{number}' for number in range(count.value)) or 'none'}",
            remedy="choose one of these, or device 'cpu'",
        )


def free_bytes(index: int) -> tuple[int, int] | None:
    """Free and total bytes of a device's memory; None without a CUDA runtime."""
    runtime, free, total = _runtime(), ctypes.c_size_t(), ctypes.c_size_t()
    if runtime is None or runtime.cudaSetDevice(index):
        return None
    return None if runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) else (free.value, total.value)


def _runtime() -> Any:
    """The CUDA runtime that the provider uses; None if it links none dynamically, or if it does not load."""
    for library in cuda_libraries():
        if library.name.startswith("libcudart") and library.problem is None:
            return ctypes.CDLL(library.name)
    return None


def _built_for() -> str:
    import onnxruntime

    version = getattr(onnxruntime, "cuda_version", None)
    return f"CUDA {version}" if version else "its own CUDA"
