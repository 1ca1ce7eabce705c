"""The CUDA libraries that ONNX Runtime's CUDA provider needs: which there are here, and which are missing.

ONNX Runtime says so in its log alone, and goes on with the CPU; here its provider's own list (the NEEDED entries of an ELF
file) is looked through.
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
_OURS = ("libcu", "libnv")  # libcudart, libcublas, libcurand, libcudnn, libnvrtc: everything else comes with the system
# Section types, and the dynamic tag of a library that has to be loaded (the System V ABI's chapter on ELF).
_DYNAMIC, _NEEDED = 6, 1


@dataclass(frozen=True)
class Library:
    """A library the provider needs; `problem`: what the loader says of it, None where it loads; `others`: what is here of it
    in other versions, where it does not."""

    name: str
    problem: str | None
    others: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """What to type where it does not load."""
        import onnxruntime

        if self.name == DRIVER:
            return f"install NVIDIA's driver ({DRIVER} is part of it)"
        # Both extras: cuBLAS comes with the one of cuDNN.
        return f"pip install 'onnxruntime-gpu[cuda,cudnn]=={onnxruntime.__version__}'"


def needed_libraries(path: Path) -> tuple[str, ...]:
    """What a 64-bit little-endian ELF file names as needed, in its order; nothing of any other file."""
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
    """The CUDA libraries that the installed ONNX Runtime's provider needs, tried in its order; none without a provider.

    Trying one loads it, as the provider would.
    """
    path = _provider()
    return tuple(_tried(name) for name in needed_libraries(path) if name.startswith(_OURS)) if path.is_file() else ()


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
    """The files of a library in any version but the one in its name: in the packages nvidia-*, and where the loader looks."""
    stem = name.partition(".so")[0]
    packages = importlib.util.find_spec("nvidia")
    roots = packages.submodule_search_locations if packages else None
    found = {file.name for root in roots or () for file in Path(root).glob(f"*/lib/{stem}.so.*")}
    found.add(ctypes.util.find_library(stem.removeprefix("lib")) or name)
    return tuple(sorted(found - {name}))


def find_cuda_libraries() -> tuple[Library, ...]:
    """The same, after ONNX Runtime's own search in the packages nvidia-*."""
    if _provider().is_file():
        _preload()
    return cuda_libraries()


def cuda_releases() -> tuple[str | None, str | None]:
    """The CUDA release that ONNX Runtime is built for, and that of the CUDA runtime which loads here: `13.0`; None: unknown."""
    import onnxruntime

    runtime, release = _runtime(), ctypes.c_int()
    if runtime is not None:
        runtime.cudaRuntimeGetVersion(ctypes.byref(release))
    return getattr(onnxruntime, "cuda_version", None) or None, _release(release.value)


def _release(number: int) -> str | None:
    """A release as CUDA counts it: 13020 is 13.2, and 0 is none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def require_cuda_libraries(device: str) -> None:
    """Load the provider's CUDA libraries: ONNX Runtime's own search first, in the packages nvidia-*.

    Raises:
        DeviceError: with every library that is missing or does not load.
    """
    import onnxruntime

    libraries = find_cuda_libraries()
    missing = [library for library in libraries if library.problem is not None]
    if not missing:
        return
    raise DeviceError(
        f"The device {device!r} needs libraries that are not here.",
        f"onnxruntime {onnxruntime.__version__} is built for {_built_for()}, and needs: "
        f"{', '.join(library.name for library in libraries)}",
        *(f"{library.name}: {library.problem}{_beside(library)}" for library in missing),
        remedy=_remedy(missing),
    )


def _preload() -> None:
    """Load CUDA and cuDNN from the packages nvidia-* where they are installed, as ONNX Runtime does it; quietly."""
    import onnxruntime

    if sys.platform == "linux" and hasattr(onnxruntime, "preload_dlls"):
        # It prints what it does not find, part of which nothing here needs; what is missing is said by its name below.
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def _beside(library: Library) -> str:
    return f"; found: {', '.join(library.others)}" if library.others else ""


def _remedy(missing: list[Library]) -> str:
    said = list(dict.fromkeys(library.remedy for library in missing))
    if any(library.name != DRIVER for library in missing):
        said.append("or put the directory of the libraries on LD_LIBRARY_PATH")
    return "; ".join([*said, "or use device 'cpu'"])


def require_cuda_device(device: str, index: int) -> None:
    """Ask the driver for a device; the libraries are there (`require_cuda_libraries`).

    Raises:
        DeviceError: the driver does not work with this CUDA, or has no such device.
    """
    runtime = _runtime()
    if runtime is None:  # an ONNX Runtime that links it statically: its own error will have to do
        return
    count = ctypes.c_int()
    if status := runtime.cudaGetDeviceCount(ctypes.byref(count)):
        version = ctypes.c_int()
        runtime.cudaDriverGetVersion(ctypes.byref(version))  # 0 without a driver
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        release = _release(version.value)
        supported = f"CUDA {release}" if release else "none"
        raise DeviceError(
            f"The device {device!r} cannot be had: CUDA finds no device.",
            f"cudaGetDeviceCount: {runtime.cudaGetErrorString(status).decode()} ({status})",
            f"needed: a driver for {_built_for()}; found: {supported}",
            remedy="check `nvidia-smi`, and update the driver where it is older than that CUDA; or use device 'cpu'",
        )
    if index >= count.value:
        raise DeviceError(
            f"There is no device {device!r}.",
            f"CUDA devices here: {', '.join(f'cuda:{number}' for number in range(count.value)) or 'none'}",
            remedy="choose one of these, or device 'cpu'",
        )


def free_bytes(index: int) -> tuple[int, int] | None:
    """Free and all bytes of a device's memory, as its driver says; None where the CUDA runtime cannot be asked."""
    runtime, free, total = _runtime(), ctypes.c_size_t(), ctypes.c_size_t()
    if runtime is None or runtime.cudaSetDevice(index):
        return None
    return None if runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) else (free.value, total.value)


def _runtime() -> Any:
    """The CUDA runtime that the provider uses; None where it needs none, or it does not load."""
    for library in cuda_libraries():
        if library.name.startswith("libcudart") and library.problem is None:
            return ctypes.CDLL(library.name)
    return None


def _built_for() -> str:
    import onnxruntime

    version = getattr(onnxruntime, "cuda_version", None)
    return f"CUDA {version}" if version else "its own CUDA"
