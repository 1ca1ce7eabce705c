"""The diagnosis of `llm2slm-export doctor`: this machine against the package's requirements. It never raises."""

import importlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.contract import GRAPHS, TensorRtVariant
from llm2slm_export.environment.hardware import instruction_sets, processor
from llm2slm_export.environment.nvidia_driver import driver_version, nvidia_smi
from llm2slm_export.environment.requirements import BASE, requirements
from llm2slm_export.environment.tensorrt_modules import OLDEST, TENSORRT_VARIANTS
from llm2slm_export.environment.versions import at_least, satisfies
from llm2slm_export.errors import BundleError
from llm2slm_export.inference.runtime.onnxruntime.cuda_libraries import cuda_releases, find_cuda_libraries
from llm2slm_export.inference.runtime.onnxruntime.huge_pages import setting
from llm2slm_export.inference.runtime.tensorrt.compatibility import check_engines, preferred
from llm2slm_export.inference.runtime.tensorrt.device_protocol import DeviceFacts
from llm2slm_export.inference.runtime.tensorrt.library import FoundLibrary, find_library

EXTRAS = (
    "cpu",
    "gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "build",
    "sentencepiece",
    "train",
    "eval",
    "serve",
    "ray",
)
# The oldest driver for Linux that runs CUDA's major versions (CUDA Toolkit release notes, "CUDA Toolkit and Minimum Required
# NVIDIA Driver Version for CUDA Minor Version Compatibility").
_OLDEST_DRIVER = {12: "525.60.13", 13: "580.65.06"}
# Instruction sets that int8 and fp32 matrix products use.
_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm")


@dataclass(frozen=True)
class Dependency:
    """A package: the required version, the installed one (None: not installed), and whether it satisfies the requirement."""

    name: str
    needed: str
    found: str | None
    ok: bool


@dataclass(frozen=True)
class Extra:
    """An extra of the package and its dependencies. `pip` is the command that installs it."""

    name: str
    dependencies: tuple[Dependency, ...]

    @property
    def complete(self) -> bool:
        return all(dependency.ok for dependency in self.dependencies)

    @property
    def pip(self) -> str:
        return "pip install llm2slm-export" if self.name == BASE else f"pip install 'llm2slm-export[{self.name}]'"


@dataclass(frozen=True)
class MachineFacts:
    """This machine: Python, system, processor, memory and GPUs. `huge_pages`: `onnxruntime.huge_pages.setting`."""

    python: str
    system: str
    cpu: str
    cores: int
    flags: tuple[str, ...]
    ram_bytes: int | None
    huge_pages: str | None
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class GpuPart:
    """A requirement of running on a GPU.

    Args:
        purpose: the device that needs it.
        needed: the required version or package.
        found: the installed version; None: not found.
        remedy: the command that installs it.
        problem: why it is missing or does not load.
    """

    name: str
    purpose: str
    needed: str
    found: str | None
    ok: bool
    remedy: str
    problem: str | None = None


@dataclass(frozen=True)
class EngineCheck:
    """Whether a set of TensorRT engines fits a GPU.

    Args:
        device: the GPU's device name; None: this machine has no GPU.
        mismatches: the reasons why the set does not fit.
        used: whether `--device DEVICE` selects this set.
    """

    head: str
    key: str
    engines: str
    device: str | None
    mismatches: tuple[str, ...]
    used: bool


@dataclass(frozen=True)
class BundleCheck:
    """Whether a bundle opens on this machine.

    Args:
        name: None: the manifest cannot be read.
        problems: missing or damaged files.
        runtimes: the runtime versions that its graphs require.
        engines: the fit of its engines. They do not affect `ok`: the ONNX graphs run without them.
    """

    path: str
    name: str | None
    problems: tuple[str, ...]
    runtimes: tuple[Dependency, ...]
    engines: tuple[EngineCheck, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems and all(runtime.ok for runtime in self.runtimes)


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`. `onnxruntime_problem`: why ONNX Runtime has no providers; None: it loads."""

    machine: MachineFacts
    extras: tuple[Extra, ...]
    onnxruntime_providers: tuple[str, ...]
    onnxruntime_problem: str | None
    gpu: tuple[GpuPart, ...]
    bundle: BundleCheck | None


def diagnose(bundle: Path | None = None) -> Diagnosis:
    """Inspect the machine, the installed packages and, if given, a bundle."""
    providers, problem = _providers()
    libraries = {variant: find_library(variant) for variant in TENSORRT_VARIANTS}
    return Diagnosis(
        machine=_machine(),
        extras=tuple(
            Extra(name, tuple(_dependency(package, needed) for package, needed in packages.items()))
            for name, packages in requirements(*EXTRAS).items()
        ),
        onnxruntime_providers=providers,
        onnxruntime_problem=problem,
        gpu=_gpu_parts(providers, problem, libraries),
        bundle=_check_bundle(bundle, libraries) if bundle is not None else None,
    )


def _found(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _dependency(package: str, needed: str) -> Dependency:
    found = _found(package)
    return Dependency(package, needed, found, found is not None and satisfies(found, needed))


def _machine() -> MachineFacts:
    flags = instruction_sets()
    return MachineFacts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=processor() or "unknown",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=tuple(flag for flag in _FLAGS if flag in flags),
        ram_bytes=_ram_bytes(),
        huge_pages=setting(),
        gpus=_gpus(),
    )


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> tuple[str, ...]:
    """Name, driver version and memory of every NVIDIA GPU, from nvidia-smi."""
    return nvidia_smi("name", "driver_version", "memory.total")


def _devices() -> list[DeviceFacts]:
    """The NVIDIA GPUs as facts that engines are compared with. They come from nvidia-smi: CUDA is not initialized."""
    found = []
    for line in nvidia_smi("index", "name", "compute_cap", "driver_version", "memory.total"):
        index, name, capability, driver, memory = (field.strip() for field in line.split(","))
        megabytes = memory.split()[0]
        total = int(megabytes) * 2**20 if megabytes.isdigit() else 0
        found.append(DeviceFacts(int(index), name, capability, driver, total))
    return found


def _gpu_parts(
    providers: tuple[str, ...], problem: str | None, libraries: Mapping[TensorRtVariant, FoundLibrary]
) -> tuple[GpuPart, ...]:
    """The requirements of running on a GPU, from the driver to the runtimes."""
    bindings = _found("cuda-bindings")
    major = int(bindings.split(".")[0]) if bindings else max(_OLDEST_DRIVER)
    oldest = _OLDEST_DRIVER.get(major, _OLDEST_DRIVER[max(_OLDEST_DRIVER)])
    driver, provider = driver_version(), "CUDAExecutionProvider"
    installed = f"onnxruntime {_found('onnxruntime-gpu') or _found('onnxruntime') or ''}".strip()
    return (
        GpuPart("NVIDIA driver", "any GPU", f">={oldest} (CUDA {major})", driver, driver is not None and at_least(driver, oldest),
                "install the NVIDIA driver, or update it"),
        *_cuda_parts(providers),
        GpuPart(provider, "device cuda", "onnxruntime-gpu", f"{installed}: {', '.join(providers)}" if providers else None,
                provider in providers, "pip uninstall -y onnxruntime, then pip install 'llm2slm-export[gpu]'", problem),
        GpuPart("cuda-bindings", "device tensorrt", ">=12.9,<14", bindings,
                bindings is not None and satisfies(bindings, ">=12.9,<14"), "pip install 'llm2slm-export[tensorrt]'"),
        *(_variant_part(library) for library in libraries.values()),
    )  # fmt: skip


def _cuda_parts(providers: tuple[str, ...]) -> Iterator[GpuPart]:
    """The libraries that ONNX Runtime's CUDA provider links to, of the CUDA release it is built for."""
    libraries = find_cuda_libraries() if providers else ()
    if not libraries:
        yield GpuPart("CUDA libraries", "device cuda", "those that onnxruntime-gpu names", None, False,
                      "pip install 'onnxruntime-gpu[cuda,cudnn]'", "unknown without onnxruntime-gpu")  # fmt: skip
        return
    built, loaded = cuda_releases()
    for library in libraries:
        found = "loads" if library.problem is None else None
        if library.others:
            found = f"{', '.join(library.others)}, not of CUDA {built}"
        elif found and library.name.startswith("libcudart") and loaded:
            found = f"CUDA {loaded}" + (f", not {built}" if loaded != built else "")
        yield GpuPart(library.name, "device cuda", f"CUDA {built}", found, library.problem is None, library.remedy,
                      library.problem)  # fmt: skip


def _variant_part(library: FoundLibrary) -> GpuPart:
    oldest = OLDEST[library.variant]
    fine = library.version is not None and at_least(library.version, oldest)
    return GpuPart(
        library.variant, "device tensorrt", f">={oldest}", library.version, fine, library.pip, library.problem
    )


def _providers() -> tuple[tuple[str, ...], str | None]:
    """ONNX Runtime's execution providers, or the reason why it does not load."""
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        return (), "not installed"
    except ImportError as error:
        return (), f"installed, but does not load: {error}"
    return tuple(runtime.get_available_providers()), None


def _check_bundle(directory: Path, libraries: Mapping[TensorRtVariant, FoundLibrary]) -> BundleCheck:
    try:
        bundle = open_bundle(directory)
    except BundleError as error:
        return BundleCheck(str(directory), None, (error.fact, *error.evidence), ())
    manifest = bundle.manifest
    return BundleCheck(str(directory), manifest.name, (), _runtimes(manifest), _engines(bundle, libraries))


def _engines(bundle: Bundle, libraries: Mapping[TensorRtVariant, FoundLibrary]) -> tuple[EngineCheck, ...]:
    """The fit of every head's sets of engines to every GPU."""
    found: list[EngineCheck] = []
    devices: list[DeviceFacts | None] = [*_devices()] or [None]
    for head in bundle.manifest.by_head:
        own = bundle.select(head)
        for device in devices:
            checked = check_engines(own, libraries=libraries, device=device, graphs=GRAPHS)
            used = preferred(checked, own.manifest)
            found += [
                EngineCheck(
                    head=head,
                    key=entry.key,
                    engines=str(entry),
                    device=None if device is None else f"tensorrt:{device.index}",
                    mismatches=tuple(map(str, entry.mismatches)),
                    used=entry is used,
                )
                for entry in checked
            ]
    return tuple(found)


def _runtimes(manifest: Manifest) -> tuple[Dependency, ...]:
    """The runtimes that the graphs require, each with the newest minimum version."""
    needed: dict[str, str] = {}
    for graph in manifest.graphs.values():
        for name, minimum in graph.minimum_runtime.items():
            if name not in needed or not at_least(needed[name], minimum):
                needed[name] = minimum
    return tuple(_runtime(name, minimum) for name, minimum in needed.items())


def _runtime(name: str, minimum: str) -> Dependency:
    """A runtime's requirement. ONNX Runtime is installed as one of two packages."""
    found = _found(name) or _found(f"{name}-gpu")
    return Dependency(name, f">={minimum}", found, found is not None and satisfies(found, f">={minimum}"))
