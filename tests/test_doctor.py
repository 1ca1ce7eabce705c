"""What doctor finds, and that nothing missing makes it fail."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from llm2slm_export import doctor
from llm2slm_export.bundle.files import file_entries, graph_digest
from llm2slm_export.bundle.manifest import EngineEntry, EngineLimits, EngineSet
from llm2slm_export.bundle.manifest_file import write_manifest
from llm2slm_export.cli import console
from llm2slm_export.cli.commands.doctor import print_diagnosis
from llm2slm_export.contract import GRAPHS, GraphName
from llm2slm_export.doctor import EXTRAS, diagnose
from llm2slm_export.environment import nvidia_driver
from llm2slm_export.inference.runtime.onnxruntime.cuda_libraries import Library
from llm2slm_export.inference.runtime.tensorrt.library import FoundLibrary
from tests.support.small_bundle import write_small_bundle


def test_this_machine_is_described() -> None:
    found = diagnose()
    assert found.machine.cores >= 1
    assert found.machine.python.startswith("3.")
    assert {extra.name for extra in found.extras} == {"base", *EXTRAS}
    assert found.bundle is None


def test_a_bare_environment_names_the_pip_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_found", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    real = importlib.import_module

    def without_runtime(name: str, package: str | None = None) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without_runtime)
    found = diagnose()
    assert found.machine.gpus == ()
    assert (found.onnxruntime_providers, found.onnxruntime_problem) == ((), "not installed")
    pips = {extra.name: extra.pip for extra in found.extras if not extra.complete}
    assert pips["build"] == "pip install 'llm2slm-export[build]'"


def test_a_system_without_proc_is_still_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: Any) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert diagnose().machine.cpu
    assert diagnose().machine.flags == ()


def test_a_sound_bundle_opens(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "small")
    check = diagnose(tmp_path / "small").bundle
    assert check is not None
    assert check.ok
    assert check.runtimes[0].needed == ">=1.20"


def test_a_damaged_bundle_is_a_finding(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "small")
    (tmp_path / "small" / "encoder.onnx").unlink()
    check = diagnose(tmp_path / "small").bundle
    assert check is not None
    assert not check.ok
    assert "encoder.onnx: missing" in check.problems


def test_a_bundle_for_a_newer_runtime_is_a_finding(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "small", runtime="99.0")
    check = diagnose(tmp_path / "small").bundle
    assert check is not None
    assert not check.problems
    assert not check.ok


# --- GPUs ------------------------------------------------------------------------------------------------------------


def test_the_matrix_names_what_is_needed_found_and_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"cuda-bindings": "12.9.1", "onnxruntime": "1.32.0"}
    libraries = {
        "tensorrt": FoundLibrary("tensorrt", "10.13.3.9"),
        "tensorrt-rtx": FoundLibrary("tensorrt-rtx", None, "not installed: tensorrt_rtx"),
    }
    monkeypatch.setattr(doctor, "_found", versions.get)
    monkeypatch.setattr(doctor, "driver_version", lambda: "530.30.02")
    monkeypatch.setattr(doctor, "find_library", libraries.__getitem__)
    monkeypatch.setattr(doctor, "_providers", lambda: (("CPUExecutionProvider",), None))
    parts = {part.name: part for part in diagnose().gpu}
    assert (parts["NVIDIA driver"].needed, parts["NVIDIA driver"].found, parts["NVIDIA driver"].ok) == (
        ">=525.60.13 (CUDA 12)", "530.30.02", True,
    )  # fmt: skip
    # Which libraries: only the CUDA provider's own file says so.
    assert (parts["CUDA libraries"].ok, parts["CUDA libraries"].problem) == (False, "unknown without onnxruntime-gpu")
    assert not parts["CUDAExecutionProvider"].ok
    assert parts["CUDAExecutionProvider"].remedy.endswith("pip install 'llm2slm-export[gpu]'")
    assert parts["cuda-bindings"].ok
    assert (parts["tensorrt"].found, parts["tensorrt"].ok) == ("10.13.3.9", False)
    assert parts["tensorrt-rtx"].problem == "not installed: tensorrt_rtx"
    assert parts["tensorrt-rtx"].remedy == "pip install 'llm2slm-export[tensorrt-rtx]'"
    monkeypatch.setattr(doctor, "_found", {"cuda-bindings": "13.1.0"}.get)
    assert not next(part for part in diagnose().gpu if part.name == "NVIDIA driver").ok


def test_the_cuda_libraries_are_those_that_the_provider_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    libraries = (
        Library("libcublas.so.13", None),
        Library("libcudart.so.13", "cannot open shared object file", others=("libcudart.so.12",)),
        Library("libcudnn.so.9", "cannot open shared object file"),
        Library("libcuda.so.1", "cannot open shared object file"),
    )
    monkeypatch.setattr(doctor, "find_cuda_libraries", lambda: libraries)
    monkeypatch.setattr(doctor, "cuda_releases", lambda: ("13.0", None))
    monkeypatch.setattr(doctor, "_providers", lambda: (("CUDAExecutionProvider",), None))
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    found = diagnose()
    parts = {part.name: part for part in found.gpu}
    assert not {"CUDA libraries", "CUDA runtime", "cuDNN"} & set(parts)
    assert [(parts[library.name].needed, parts[library.name].ok) for library in libraries] == [
        ("CUDA 13.0", True), ("CUDA 13.0", False), ("CUDA 13.0", False), ("CUDA 13.0", False),
    ]  # fmt: skip
    assert parts["libcudart.so.13"].found == "libcudart.so.12, not of CUDA 13.0"
    assert parts["libcudnn.so.9"].found is None
    assert parts["libcudnn.so.9"].remedy == "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'"
    assert "NVIDIA's driver" in parts["libcuda.so.1"].remedy
    print_diagnosis(console.console(), found)
    assert "libcudart.so.12, not of" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("loaded", "message"), [("13.0", "CUDA 13.0"), ("13.2", "CUDA 13.2, not 13.0"), (None, "loads")]
)
def test_another_cuda_release_than_onnxruntimes_is_said(
    monkeypatch: pytest.MonkeyPatch, loaded: str | None, message: str
) -> None:
    monkeypatch.setattr(doctor, "find_cuda_libraries", lambda: (Library("libcudart.so.13", None),))
    monkeypatch.setattr(doctor, "cuda_releases", lambda: ("13.0", loaded))
    part = next(part for part in diagnose().gpu if part.name == "libcudart.so.13")
    # Releases of one major version do for each other.
    assert (part.found, part.ok) == (message, True)


def equipped(directory: Path) -> Path:
    """A small bundle with two sets of engines of no bytes that matter."""
    manifest = write_small_bundle(directory)
    limits = EngineLimits(batch=1, prompt=8, new=8, capacity=8)

    def engines(capability: str, name: str) -> EngineSet:
        def entry(graph: GraphName) -> EngineEntry:
            file = f"tensorrt/{name}/{graph}.engine"
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (directory / file).write_bytes(b"plan")
            source = graph_digest(manifest.graphs[graph], {f.path: f.sha256 for f in manifest.files})
            return EngineEntry(file=file, source=source, precision="fp16", inputs=(), outputs=(), profiles=())

        return EngineSet(
            variant="tensorrt", version="11.4.0.106", compute_capabilities=(capability,), driver="535", limits=limits,
            graphs={graph: entry(graph) for graph in GRAPHS},
        )  # fmt: skip

    made = {"ada": engines("8.9", "ada"), "hopper": engines("9.0", "hopper")}
    write_manifest(directory, manifest.model_copy(update={"engines": made, "files": file_entries(directory)}))
    return directory


def test_a_bundles_engines_are_compared_with_every_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("0, NVIDIA L4, 8.9, 580.65.06, 23034 MiB", "1, NVIDIA T4, 7.5, 580.65.06, 15360 MiB")
    monkeypatch.setattr(doctor, "nvidia_smi", lambda *fields: lines if "compute_cap" in fields else ())
    monkeypatch.setattr(doctor, "find_library", lambda variant: FoundLibrary(variant, "11.4.0.106"))
    check = diagnose(equipped(tmp_path / "bundle")).bundle
    assert check is not None
    assert check.ok
    assert [(e.key, e.device, bool(e.mismatches), e.used) for e in check.engines] == [
        ("ada", "tensorrt:0", False, True),
        ("hopper", "tensorrt:0", True, False),
        ("ada", "tensorrt:1", True, False),
        ("hopper", "tensorrt:1", True, False),
    ]
    assert check.engines[1].mismatches == ("compute_capabilities: needs 9.0, found 8.9 (NVIDIA L4)",)


def test_engines_without_a_gpu_say_what_they_are_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(
        doctor, "find_library", lambda variant: FoundLibrary(variant, None, f"not installed: {variant}")
    )
    found = diagnose(equipped(tmp_path / "bundle"))
    print_diagnosis(console.console(), found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "engines ada: tensorrt 11.4.0.106 for SM 8.9; encoder fp16" in shown
    assert "on no GPU: does not fit" in shown
    assert "device: needs an NVIDIA GPU, found none" in shown
    assert "needs tensorrt 11.4.0.106 (pip install 'llm2slm-export[tensorrt]'), found not installed: tensorrt" in shown
    assert found.bundle is not None
    assert found.bundle.ok


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("580.65.06\n", "580.65.06"),
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 2024\nGCC version: gcc 12.3.0",
            "550.54.14",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.51.03  Release Build", "575.51.03"),
        ("nothing", None),
    ],
)
def test_the_driver_tells_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(nvidia_driver, "_FILES", (tmp_path / "missing", tmp_path / "version"))
    monkeypatch.setattr(nvidia_driver, "nvidia_smi", lambda *_: ())
    assert nvidia_driver.driver_version() == version
