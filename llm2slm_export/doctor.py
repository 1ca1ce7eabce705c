"""What this machine has and what the package needs. Looks, never raises: something missing is a finding."""

import importlib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm2slm_export.bundle import Manifest, open_bundle
from llm2slm_export.errors import BundleError

_BUILD = {
    "onnx": ">=1.19",
    "onnxruntime": ">=1.25",
    "onnxscript": ">=0.5",
    "safetensors": ">=0.5",
    "torch": ">=2.13,<2.14",
    "transformers": ">=5.24,<6",
}
# pyproject.toml's requirements; tests/test_doctor.py compares the two.
REQUIREMENTS: dict[str, dict[str, str]] = {
    "base": {
        "numpy": ">=1.26",
        "pydantic": ">=2.10",
        "pyyaml": ">=6.0",
        "rich": ">=13.9",
        "safetensors": ">=0.5",
        "tokenizers": ">=0.22",
        "typer": ">=0.19",
    },
    "cpu": {"onnxruntime": ">=1.25"},
    "gpu": {"onnxruntime-gpu": ">=1.25"},
    "openvino": {"openvino": ">=2026.4"},
    "build": _BUILD,
    "train": {
        "accelerate": ">=1.10",
        "datasets": ">=4",
        "filelock": ">=3.12",
        "peft": ">=0.20",
        "tqdm": ">=4.66",
        **_BUILD,
    },
    "eval": {
        "jinja2": ">=3.1",
        "matplotlib": ">=3.9",
        "rouge-score": ">=0.1.2",
        "sacrebleu": ">=2.5",
    },
}
# Instruction sets that decide how fast int8 and fp32 matrix products are.
_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm")


@dataclass(frozen=True)
class Dependency:
    """A package: the version needed, the one found (None: not installed), and whether it will do."""

    name: str
    needed: str
    found: str | None
    ok: bool


@dataclass(frozen=True)
class Extra:
    """A set of dependencies installed together; `pip` is what to type where it is not complete."""

    name: str
    dependencies: tuple[Dependency, ...]

    @property
    def complete(self) -> bool:
        return all(dependency.ok for dependency in self.dependencies)

    @property
    def pip(self) -> str:
        return "pip install llm2slm-export" if self.name == "base" else f"pip install 'llm2slm-export[{self.name}]'"


@dataclass(frozen=True)
class Machine:
    python: str
    system: str
    cpu: str
    cores: int
    flags: tuple[str, ...]
    ram_bytes: int | None
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class BundleCheck:
    """Whether a bundle opens here: `problems` holds damage; `runtimes` what its graphs need against what is here."""

    path: str
    name: str | None
    problems: tuple[str, ...]
    runtimes: tuple[Dependency, ...]

    @property
    def ok(self) -> bool:
        return not self.problems and all(runtime.ok for runtime in self.runtimes)


@dataclass(frozen=True)
class Diagnosis:
    machine: Machine
    extras: tuple[Extra, ...]
    onnxruntime_providers: tuple[str, ...]
    onnxruntime_problem: str | None
    bundle: BundleCheck | None


def diagnose(bundle: Path | None = None) -> Diagnosis:
    """Look at the machine, the installed packages and, where one is given, a bundle."""
    providers, problem = _providers()
    return Diagnosis(
        machine=_machine(),
        extras=tuple(
            Extra(name, tuple(_dependency(package, needed) for package, needed in packages.items()))
            for name, packages in REQUIREMENTS.items()
        ),
        onnxruntime_providers=providers,
        onnxruntime_problem=problem,
        bundle=_check_bundle(bundle) if bundle is not None else None,
    )


def satisfies(found: str, needed: str) -> bool:
    """Whether a version fulfils a specifier such as `>=2.12,<2.14`. Release numbers alone are compared."""
    for part in needed.split(","):
        operator, limit = part[:2] if part[1] == "=" else part[0], part.lstrip("<>=")
        order = _compare(_release(found), _release(limit))
        if not {">=": order >= 0, "<": order < 0}[operator]:
            return False
    return True


def _release(text: str) -> list[int]:
    match = re.match(r"\d+(\.\d+)*", text)
    return [int(number) for number in match[0].split(".")] if match else []


def _compare(left: list[int], right: list[int]) -> int:
    width = max(len(left), len(right))
    left, right = left + [0] * (width - len(left)), right + [0] * (width - len(right))
    return (left > right) - (left < right)


def _found(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _dependency(package: str, needed: str) -> Dependency:
    found = _found(package)
    return Dependency(package, needed, found, found is not None and satisfies(found, needed))


def _machine() -> Machine:
    fields = _cpu_fields()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=fields.get("model name") or platform.processor() or "unknown",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=tuple(flag for flag in _FLAGS if flag in flags),
        ram_bytes=_ram_bytes(),
        gpus=_gpus(),
    )


def _cpu_fields() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty on systems without it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> tuple[str, ...]:
    """Name, driver and memory of every NVIDIA GPU that the driver's own tool lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(result.stdout.splitlines()) if result.returncode == 0 else ()


def _providers() -> tuple[tuple[str, ...], str | None]:
    """ONNX Runtime's execution providers, or why there are none."""
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        return (), "not installed"
    except ImportError as error:
        return (), f"installed, but does not load: {error}"
    return tuple(runtime.get_available_providers()), None


def _check_bundle(directory: Path) -> BundleCheck:
    try:
        manifest = open_bundle(directory).manifest
    except BundleError as error:
        return BundleCheck(str(directory), None, (error.fact, *error.evidence), ())
    return BundleCheck(str(directory), manifest.name, (), _runtimes(manifest))


def _runtimes(manifest: Manifest) -> tuple[Dependency, ...]:
    """The newest of the minimum versions that the graphs ask for, by runtime."""
    needed: dict[str, str] = {}
    for graph in manifest.graphs.values():
        for name, minimum in graph.minimum_runtime.items():
            if name not in needed or _compare(_release(minimum), _release(needed[name])) > 0:
                needed[name] = minimum
    return tuple(_runtime(name, minimum) for name, minimum in needed.items())


def _runtime(name: str, minimum: str) -> Dependency:
    """ONNX Runtime comes as two packages; either will do."""
    found = _found(name) or _found(f"{name}-gpu")
    return Dependency(name, f">={minimum}", found, found is not None and satisfies(found, f">={minimum}"))
