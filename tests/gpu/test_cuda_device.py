"""On a GPU: the same responses as on the CPU, with CUDA graphs and without. `pytest -m gpu`.

Self-contained where LLM2SLM_GPU_BUNDLES names a directory of fp32 and fp16 bundles, `<name>.fp32` and `<name>.fp16`; else
tiny ones are built, which takes the extra [build].
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.errors import DeviceError
from llm2slm_export.inference.orchestrator import Orchestrator, load
from llm2slm_export.inference.runtime.onnxruntime.cuda_backend import open_ort
from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaOptions
from llm2slm_export.inference.runtime.onnxruntime.devices import find_device
from tests.support.joining_rows import (
    JOINING_ROWS,
    check_contexts_of_different_buckets,
    check_rows_come_and_go,
)
from tests.support.paths import DEMO

pytestmark = pytest.mark.gpu

PROMPTS = ["How are you?", "The weather is fine today, and I would like to go out.", "No", "I have a dog and two cats."]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 40},
    "past a capacity": {"max_new_tokens": 150, "min_new_tokens": 140},
    "beams": {"num_beams": 4, "max_new_tokens": 40},
    "samples": {"do_sample": True, "seed": 1, "num_return_sequences": 3, "max_new_tokens": 40},
}


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    """Skip everything where there is no CUDA device, and say why."""
    try:
        find_device("cuda")
    except DeviceError as error:
        pytest.skip(str(error))


def bundle_paths(precision: str) -> list[Any]:
    directory = os.environ.get("LLM2SLM_GPU_BUNDLES")
    if directory:
        return sorted(Path(directory).glob(f"*.{precision}"))
    return ["t5", "llama", "gpt2"]


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Path:
    """A bundle's directory, for a parameter that is one or the type of a tiny SLM, and its precision."""
    which, precision = request.param
    if isinstance(which, Path):
        return which
    if importlib.util.find_spec("onnxscript") is None:
        pytest.skip("LLM2SLM_GPU_BUNDLES names no bundles, and the extra [build] is not installed")
    bundles: Callable[..., tuple[Path, Path]] = request.getfixturevalue("bundles")
    return bundles(which, precision=precision)[1]


@pytest.fixture
def ids(path: Path) -> Iterator[Callable[..., list[tuple[int, ...]]]]:
    """ids(device, options, cuda=None) → what the bundle writes there."""
    opened: dict[tuple[str, CudaOptions | None], Orchestrator] = {}

    def written(device: str, options: dict[str, Any], cuda: CudaOptions | None = None) -> list[tuple[int, ...]]:
        key = device, cuda
        if key not in opened:
            bundle = open_bundle(path)
            opened[key] = Orchestrator(bundle, open_ort(bundle, device=device, threads=None, cuda=cuda))
        done = opened[key].generate(PROMPTS, **options)
        assert {g.device for g in done} == {"cpu" if device == "cpu" else "cuda:0"}
        assert {g.warnings for g in done} == {()}
        return [g.token_ids for g in done]

    yield written
    for pair in opened.values():
        pair.close()


FP32 = [(which, "fp32") for which in bundle_paths("fp32")]
FP16 = [(which, "fp16") for which in bundle_paths("fp16")]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("path", FP32, indirect=True, ids=str)
def test_the_ids_are_those_of_the_cpu(ids: Callable[..., list[tuple[int, ...]]], options: dict[str, Any]) -> None:
    assert ids("cuda", options) == ids("cpu", options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("path", [*FP32, *FP16], indirect=True, ids=str)
def test_replayed_steps_write_what_launched_ones_do(
    ids: Callable[..., list[tuple[int, ...]]], options: dict[str, Any]
) -> None:
    launched = ids("cuda", options, CudaOptions(cuda_graphs=False))
    for _ in range(2):  # what is captured, and what is replayed of an earlier request
        assert ids("cuda", options) == launched


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("check", [*JOINING_ROWS, check_contexts_of_different_buckets, check_rows_come_and_go])
@pytest.mark.parametrize("path", FP32, indirect=True, ids=str)
def test_rows_join(path: Path, check: Callable[[Any], None], cuda_graphs: bool) -> None:
    backend = open_ort(open_bundle(path), device="cuda", threads=None, cuda=CudaOptions(cuda_graphs=cuda_graphs))
    check(backend)
    backend.close()


@pytest.mark.parametrize("path", FP16, indirect=True, ids=str)
def test_half_writes_nearly_what_the_cpu_does(ids: Callable[..., list[tuple[int, ...]]]) -> None:
    rows = zip(ids("cuda", OPTIONS["greedy"]), ids("cpu", OPTIONS["greedy"]), strict=True)
    assert sum(one[:4] == other[:4] for one, other in rows) >= 3


def test_the_demo_answers_on_the_gpu() -> None:
    """Its weights are of eight and four bits, and its activations are rounded on the CPU alone: near, not the same."""
    with load(DEMO, device="cuda") as gpu, load(DEMO) as cpu:
        for one, other in zip(gpu.generate(PROMPTS), cpu.generate(PROMPTS), strict=True):
            assert one.device == "cuda:0"
            assert one.token_ids[:2] == other.token_ids[:2]


def test_too_little_memory_is_said_and_nothing_runs_elsewhere() -> None:
    with pytest.raises(DeviceError, match="too little memory for the") as error:
        load(DEMO, device="cuda", cuda=CudaOptions(memory_bytes=100_000))
    assert "free on the device: " in str(error.value)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="There is no device 'cuda:99'"):
        find_device("cuda:99")
