"""The real CUDA provider of onnxruntime-gpu on CUDA libraries that do nothing (`cuda_stub.py`): where it puts every node, what
it captures, and what it says when memory does not do. In processes of their own: this one has another onnxruntime."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.cuda_stub import build, onnxruntime_gpu
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.skipif(
    onnxruntime_gpu() is None,
    reason="LLM2SLM_ORT_GPU names no directory: pip install --no-deps --target DIR onnxruntime-gpu",
)
RUN = """
import json, sys
from pathlib import Path
from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.errors import DeviceError
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.runtime.onnxruntime.cuda_backend import CudaBackend
from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaOptions

options, given = json.loads(sys.argv[2]), json.loads(sys.argv[3])
bundle = open_bundle(Path(sys.argv[1]))
try:
    backend = CudaBackend(bundle, device="cuda", threads=None, options=CudaOptions(**options))
    pair = Orchestrator(bundle, backend)
    for _ in range(2):
        done = pair.generate(["How are you?", "No"], **given)
    print("result:", json.dumps({"device": done[0].device, "warnings": done[0].warnings, "captures": backend.sessions.captures}))
except DeviceError as error:
    print("refused:", error)
"""
RESPONSE = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gpu = onnxruntime_gpu()
    assert gpu is not None
    return build(tmp_path_factory.mktemp("stub"), gpu)


def run(
    stub: Path,
    bundle: Path,
    *,
    options: dict[str, Any] | None = None,
    given: dict[str, Any] = RESPONSE,
    **environment: str,
) -> tuple[str, list[str]]:
    """What the process says last, and what the stub traced."""
    paths = f"{REPOSITORY}:{onnxruntime_gpu()}"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(bundle), json.dumps(options or {}), json.dumps(given)],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": paths, "LD_LIBRARY_PATH": str(stub), "CUDA_STUB_TRACE": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    output = done.stdout[max(done.stdout.find("result:"), done.stdout.find("refused:")) :]
    return output, [line for line in done.stderr.splitlines() if line.startswith("stub: ")]


@pytest.mark.parametrize("slm", ["t5", "llama", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_node_is_on_the_device_and_steps_are_captured_once(
    stub: Path, bundles: Callable[..., tuple[Path, Path]], slm: str, precision: str
) -> None:
    output, traced = run(stub, bundles(slm, precision=precision)[1])
    assert json.loads(output.removeprefix("result: ")) == {"device": "cuda:0", "warnings": [], "captures": True}
    # Two prompts of unlike lengths, each by itself, twice: five steps of each, all of one shape. The call that captures
    # launches what it has captured too.
    assert traced.count("stub: capture") == 1
    assert traced.count("stub: launch") == 20


def test_beams_replay_two_graphs(stub: Path, bundles: Callable[..., tuple[Path, Path]]) -> None:
    output, traced = run(stub, bundles("t5")[1], given={**RESPONSE, "num_beams": 3})
    assert '"warnings": []' in output
    assert traced.count("stub: capture") == 2


def test_without_cuda_graphs_nothing_is_captured(stub: Path, bundles: Callable[..., tuple[Path, Path]]) -> None:
    output, traced = run(stub, bundles("t5")[1], options={"cuda_graphs": False})
    assert json.loads(output.removeprefix("result: ")) == {"device": "cuda:0", "warnings": [], "captures": False}
    assert traced == []


def test_a_step_that_cannot_be_captured_is_launched_and_the_result_says_so(
    stub: Path, bundles: Callable[..., tuple[Path, Path]]
) -> None:
    output, traced = run(stub, bundles("t5")[1], CUDA_STUB_REFUSE="1")
    result = json.loads(output.removeprefix("result: "))
    assert result["captures"] is False
    (note,) = result["warnings"]
    assert note.startswith("CUDA graphs are off: CUDA failure 900")
    assert "stub: launch" not in traced


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        (
            {},
            {"CUDA_STUB_BYTES": "300000"},
            ["requested:", "for its weights", "free on the device:", "of 300,000 bytes"],
        ),
        ({"memory_bytes": 100_000}, {}, ["limit of each graph: 100,000 bytes", "--gpu-memory-mb"]),
    ],
    ids=["a small device", "a limit"],
)
def test_too_little_memory_says_what_was_asked_and_what_is_free(
    stub: Path,
    bundles: Callable[..., tuple[Path, Path]],
    options: dict[str, Any],
    environment: dict[str, str],
    expected: list[str],
) -> None:
    output, _ = run(stub, bundles("t5")[1], options=options, **environment)
    assert output.startswith("refused: cuda:0 has too little memory for the")
    for part in expected:
        assert part in output


def test_a_machine_without_the_libraries_is_told_which(
    bundles: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    output, _ = run(tmp_path, bundles("t5")[1])
    assert output.startswith("refused: The device 'cuda' needs libraries that are missing.")
    assert "libcublasLt.so" in output
    assert "libcuda.so.1" in output
