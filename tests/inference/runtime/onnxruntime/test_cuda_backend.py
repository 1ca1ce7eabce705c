"""What the CUDA backend does, with the CPU's provider in the device's place: everything but CUDA graphs and the kernels."""

import ctypes.util
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.errors import DeviceError, UsageError
from llm2slm_export.inference.orchestrator import Orchestrator, load
from llm2slm_export.inference.runtime.onnxruntime import cuda_libraries
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend
from llm2slm_export.inference.runtime.onnxruntime.cuda_backend import CudaBackend
from llm2slm_export.inference.runtime.onnxruntime.cuda_decoder import (
    LEAST_CAPACITY,
    MAX_UNUSED_STEPS,
    CudaState,
    fixed_capacity,
)
from llm2slm_export.inference.runtime.onnxruntime.cuda_graphs import CapturedStep, StepPool, StepShape
from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaOptions
from llm2slm_export.inference.runtime.onnxruntime.device_tensors import DeviceTensors
from llm2slm_export.inference.runtime.onnxruntime.node_placement import (
    RECORD,
    SHAPE_ARITHMETIC,
    nodes_on_other_provider,
    require_placement,
)
from tests.support.backend_calls import LENGTHS, conditioning_of, ids_of
from tests.support.independent_rows import (
    check_prompts_of_different_lengths,
    check_rewind_refuses_a_longer_length,
    check_rows_of_different_lengths,
)
from tests.support.joining_rows import (
    JOINING_ROWS,
    Running,
    check_contexts_of_different_buckets,
    check_rows_come_and_go,
)

PROMPTS = ["How are you?", "The weather is fine, and I like it.", "No", "I have a dog"]


@pytest.fixture(scope="module", params=["t5", "llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def backends(
    request: pytest.FixtureRequest, bundles: Callable[..., tuple[Path, Path]]
) -> Iterator[tuple[OrtBackend, CudaBackend]]:
    bundle = open_bundle(bundles(request.param)[1])
    plain, fixed = OrtBackend(bundle, device="cpu", threads=1), CudaBackend(bundle, device="cpu", threads=1)
    yield plain, fixed
    plain.close()
    fixed.close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "seed": 3, "num_return_sequences": 3},
        {"max_new_tokens": LEAST_CAPACITY + 20, "min_new_tokens": LEAST_CAPACITY + 10},
    ],
    ids=["greedy", "beams", "samples", "past the first capacity"],
)
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_responses_are_those_of_the_plain_backend(
    bundles: Callable[..., tuple[Path, Path]], slm: str, options: dict[str, Any]
) -> None:
    bundle = open_bundle(bundles(slm)[1])
    with (
        Orchestrator(bundle, OrtBackend(bundle, device="cpu", threads=1)) as plain,
        Orchestrator(bundle, CudaBackend(bundle, device="cpu", threads=1)) as fixed,
    ):
        for size in (None, 3):
            expected = plain.generate(PROMPTS, batch_size=size, **options)
            got = fixed.generate(PROMPTS, batch_size=size, **options)
            assert [g.token_ids for g in got] == [g.token_ids for g in expected]
            assert [g.warnings for g in got] == [()] * len(got)


def test_calls_of_one_and_of_several_tokens_take_turns(backends: tuple[OrtBackend, CudaBackend]) -> None:
    ids = np.arange(3 * 40).reshape(3, 40) % 250 + 3
    logits = []
    for backend in backends:
        state, _ = backend.prefill(conditioning_of(backend, LENGTHS))
        own = [
            backend.step(state, ids[:, start:end]).copy()
            for start, end in ((0, 1), (1, 2), (2, 9), (9, 10), (10, 11), (11, 39))
        ]
        backend.select(state, np.array([2, 0]))
        logits.append((np.concatenate(own, axis=1), backend.step(state, ids[[2, 0], 39:40]).copy()))
    for expected, found in zip(*logits, strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize(
    "check",
    [check_prompts_of_different_lengths, check_rows_of_different_lengths, check_rewind_refuses_a_longer_length],
)
def test_rows_are_independent(backends: tuple[OrtBackend, CudaBackend], check: Callable[[Any], None]) -> None:
    check(backends[1])


@pytest.mark.parametrize("which", [0, 1], ids=["plain", "cuda"])
@pytest.mark.parametrize("check", [*JOINING_ROWS, check_contexts_of_different_buckets])
def test_rows_join(
    backends: tuple[OrtBackend, CudaBackend], which: int, check: Callable[[OrtBackend | CudaBackend], None]
) -> None:
    check(backends[which])


def test_rows_come_and_go(backends: tuple[OrtBackend, CudaBackend]) -> None:
    check_rows_come_and_go(backends[0])


@pytest.mark.slow
def test_rows_come_and_go_on_a_bounded_number_of_steps(backends: tuple[OrtBackend, CudaBackend]) -> None:
    _, backend = backends

    def bounded(running: Running) -> None:
        gc.collect()
        assert len(backend.decoder.pool._free) <= MAX_UNUSED_STEPS
        # The largest is of rows that left together with the others' longest context and cache.
        assert running.state.borrowed.step.shape.capacity == LEAST_CAPACITY
        assert running.state.attention_mask.shape[1] <= 16

    check_rows_come_and_go(backend, after=bounded)


def test_states_that_join_give_their_steps_back(backends: tuple[OrtBackend, CudaBackend]) -> None:
    _, backend = backends
    backend.decoder.pool.clear()
    running, other = Running(backend, [5, 2], first=0).step(), Running(backend, [3], first=5).step()
    state, left = running.state, other.state
    numbers = {one.borrowed.step.number for one in (state, left)}
    running.join(other)
    assert state.borrowed is left.borrowed is None
    assert not left.bound
    assert set(backend.decoder.pool._free) == numbers


def test_a_join_reads_nothing_into_host_memory(
    backends: tuple[OrtBackend, CudaBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied to the device are indices, lengths and masks."""
    _, backend = backends
    running, other = Running(backend, [5, 2], first=0).step(3), Running(backend, [3], first=5)
    put, copied = DeviceTensors.put, list[np.ndarray]()
    monkeypatch.setattr(DeviceTensors, "put", lambda self, array: copied.append(array) or put(self, array))
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime.OrtValue, "numpy", lambda _: pytest.fail("a tensor was read"))
        running.join(other)
    assert copied
    assert all(array.dtype == np.int64 or not array.size for array in copied)
    running.step().check()


def test_a_step_of_the_conditioning_before_a_join_is_not_taken_for_the_joined_one(
    backends: tuple[OrtBackend, CudaBackend],
) -> None:
    """Two rows of three, then a third that joins: a step of as many rows holds the three prompts of before."""
    _, backend = backends
    running = Running(backend, [5, 9, 2], first=0).step().select([0, 1]).step()
    running.join(Running(backend, [4], first=7)).step(2).check()


def test_rows_that_are_set_back_to_nothing_stay_on_their_step(backends: tuple[OrtBackend, CudaBackend]) -> None:
    _, backend = backends
    state, _ = backend.prefill(conditioning_of(backend, LENGTHS))
    assert isinstance(state, CudaState)
    first = backend.step(state, ids_of([0, 1, 2], 0)).copy()
    start, borrowed = backend.lengths(state) - 1, state.borrowed
    backend.rewind(state, start)
    np.testing.assert_array_equal(backend.step(state, ids_of([0, 1, 2], 0)), first)
    backend.rewind(state, np.zeros(3, np.int64))
    backend.step(state, ids_of([0, 1, 2], 0))
    assert backend.lengths(state).tolist() == [1, 1, 1]
    assert state.borrowed is borrowed


def test_a_dropped_row_stays_within_a_full_cache(backends: tuple[OrtBackend, CudaBackend]) -> None:
    _, backend = backends
    lengths = [5, 9, 2, 7]
    state, _ = backend.prefill(conditioning_of(backend, lengths))
    backend.step(state, ids_of([0, 1, 2, 3], 0))
    assert isinstance(state, CudaState)
    backend.select(state, np.array([0, 1, 3]))
    for call in range(1, LEAST_CAPACITY + 2 - int(backend.lengths(state).max())):
        backend.step(state, ids_of([0, 1, 3], call))
        assert state.borrowed is not None
        if call == 1:
            assert state.borrowed.step.inputs["past_length"].numpy().tolist()[2] == 0
    assert state.borrowed.step.shape == (3, state.borrowed.step.shape.context, 2 * LEAST_CAPACITY)


def test_rows_that_leave_are_carried_along_until_they_are_half(backends: tuple[OrtBackend, CudaBackend]) -> None:
    _, backend = backends
    lengths = [5, 9, 2, 7]
    state, _ = backend.prefill(conditioning_of(backend, lengths))
    backend.step(state, ids_of([0, 1, 2, 3], 0))
    assert isinstance(state, CudaState)
    assert state.borrowed is not None
    step = state.borrowed.step
    backend.select(state, np.array([0, 1, 3]))
    assert state.borrowed.step is step
    assert state.rows.tolist() == [0, 1, 3]
    kept = backend.step(state, ids_of([0, 1, 3], 1)).copy()
    backend.select(state, np.array([0, 2]))
    assert state.borrowed.step.shape.batch == 2
    last = backend.step(state, ids_of([0, 3], 2)).copy()
    for place, row in enumerate([0, 1, 3]):
        alone, _ = backend.prefill(conditioning_of(backend, [lengths[row]], first=row))
        for call in range(2):
            logits = backend.step(alone, ids_of([row], call))
        np.testing.assert_allclose(kept[place], logits[0], atol=2e-5)
        if row != 1:
            logits = backend.step(alone, ids_of([row], 2))
            np.testing.assert_allclose(last[0 if row == 0 else 1], logits[0], atol=2e-5)


def test_a_step_binds_and_allocates_nothing(
    backends: tuple[OrtBackend, CudaBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a replayed graph reads and writes is where it was when the graph was captured."""
    _, backend = backends
    state, _ = backend.prefill(conditioning_of(backend, LENGTHS))
    backend.step(state, ids_of([0, 1, 2], 0))
    assert isinstance(state, CudaState)
    assert state.borrowed is not None
    step = state.borrowed.step
    before = step.runs
    addresses = {name: value.data_ptr() for name, value in step.inputs.items()} | {"logits": step.logits.data_ptr()}
    refused = lambda *_: pytest.fail("a step touched memory that is not its own")  # noqa: E731
    for name in ("put", "empty", "gathered"):
        monkeypatch.setattr(DeviceTensors, name, refused)
    for call in range(1, 20):
        backend.step(state, ids_of([0, 1, 2], call))
        assert state.borrowed.step is step
    assert addresses == {name: value.data_ptr() for name, value in step.inputs.items()} | {
        "logits": step.logits.data_ptr()
    }
    assert step.runs == before + 19


def test_a_second_request_of_the_same_shape_runs_on_the_first_ones_step(
    bundles: Callable[..., tuple[Path, Path]],
) -> None:
    backend = CudaBackend(open_bundle(bundles("t5")[1]), device="cpu", threads=1)
    numbers = []
    for _ in range(2):
        state, _ = backend.prefill(conditioning_of(backend, LENGTHS))
        backend.step(state, ids_of([0, 1, 2], 0))
        other, _ = backend.prefill(conditioning_of(backend, LENGTHS[::-1]))
        backend.step(other, ids_of([0, 1, 2], 0))
        assert isinstance(state, CudaState)
        assert isinstance(other, CudaState)
        assert state.borrowed is not None
        assert other.borrowed is not None
        numbers.append({state.borrowed.step.number, other.borrowed.step.number})
        del state, other
        gc.collect()
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == 2


def test_beams_go_to_and_fro_between_two_steps(bundles: Callable[..., tuple[Path, Path]]) -> None:
    bundle = open_bundle(bundles("t5")[1])
    backend = CudaBackend(bundle, device="cpu", threads=1)
    Orchestrator(bundle, backend).generate(["How are you?"], num_beams=4, max_new_tokens=20, min_new_tokens=20)
    gc.collect()
    assert [step.shape.batch for step in backend.decoder.pool._free.values()].count(4) == 2


def test_the_least_recently_used_step_is_let_go_of() -> None:
    gone: list[int] = []
    steps, shape = StepPool(2, gone.append), StepShape(1, 64, 128)
    made = [CapturedStep(shape, {}, None, steps.number()) for _ in range(3)]
    borrowings = [steps.lend(step) for step in made]
    held = weakref.ref(made[0])
    for borrowed in borrowings:
        borrowed.give_back()
        borrowed.give_back()  # twice does no harm
    assert gone == [1]
    assert steps.borrow(StepShape(2, 64, 128), (object(), b"")) is None
    first = steps.borrow(shape, (object(), b""))
    assert first is not None
    assert first.step.number == 3
    del made, borrowings, borrowed
    gc.collect()
    assert held() is None


def test_threads_get_what_they_would_alone(bundles: Callable[..., tuple[Path, Path]]) -> None:
    bundle = open_bundle(bundles("t5")[1])
    pair = Orchestrator(bundle, CudaBackend(bundle, device="cpu", threads=1))
    requests = [PROMPTS[:2], PROMPTS[2:], PROMPTS, PROMPTS[:1]] * 3
    alone = [[g.token_ids for g in pair.generate(prompts)] for prompts in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompts: [g.token_ids for g in pair.generate(prompts)], requests))
    assert together == alone


def test_capacities_double() -> None:
    assert [fixed_capacity(n) for n in (1, 128, 129, 256, 257, 1000)] == [128, 128, 256, 256, 512, 1024]


def test_options_that_mean_nothing() -> None:
    with pytest.raises(UsageError, match="memory_bytes is 0"):
        CudaBackend(None, device="cpu", threads=1, options=CudaOptions(memory_bytes=0))  # type: ignore[arg-type]


def test_options_of_a_cuda_device_are_refused_for_the_cpu(bundles: Callable[..., tuple[Path, Path]]) -> None:
    with pytest.raises(UsageError, match="do not apply to the device 'cpu'"):
        load(bundles("t5")[1], device="cpu", cuda=CudaOptions(cuda_graphs=False))


def test_a_head_has_the_same_options_and_encoder(bundles: Callable[..., tuple[Path, Path]]) -> None:
    bundle = open_bundle(bundles("t5")[1])
    first = CudaBackend(bundle, device="cpu", threads=1, options=CudaOptions(cuda_graphs=False))
    second = first.head(bundle)
    assert second.sessions.options == first.sessions.options
    assert second.sessions.get("encoder") is first.sessions.get("encoder")


# --- placement -----------------------------------------------------------------------------------------------------


def session_of(bundles: Callable[..., tuple[Path, Path]]) -> Any:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*RECORD)
    return onnxruntime.InferenceSession(bundles("t5")[1] / "decoder.onnx", options, providers=["CPUExecutionProvider"])


def test_every_node_that_is_elsewhere_is_named(bundles: Callable[..., tuple[Path, Path]]) -> None:
    """A real session, all of which is on another provider than the one that is asked about."""
    session = session_of(bundles)
    nodes = [n for s in session.get_provider_graph_assignment_info() for n in s.get_nodes()]
    others = nodes_on_other_provider(session, "CUDAExecutionProvider")
    kinds = {node.op_type for node in nodes}
    assert {"MatMul", "Attention", "TensorScatter", "Shape", "Squeeze"} <= kinds
    for node in nodes:
        kind = f"({node.domain}.{node.op_type})" if node.domain else f"({node.op_type})"
        named = any(kind in other_node for other_node in others)
        assert named == (node.op_type not in SHAPE_ARITHMETIC or node.domain == "com.microsoft"), node.op_type
    assert all(other_node.endswith(": CPUExecutionProvider") for other_node in others)
    assert nodes_on_other_provider(session, "CPUExecutionProvider") == []
    with pytest.raises(DeviceError, match=r"could not use cuda:0 for decoder\.onnx") as error:
        require_placement(session, "CUDAExecutionProvider", "decoder.onnx", "cuda:0")
    assert "got CPUExecutionProvider" in str(error.value)
    pretending = SimpleNamespace(
        get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        get_provider_graph_assignment_info=session.get_provider_graph_assignment_info,
    )
    with pytest.raises(DeviceError, match=rf"does not place {len(others)} nodes of decoder\.onnx") as error:
        require_placement(pretending, "CUDAExecutionProvider", "decoder.onnx", "cuda:0")
    assert others[0] in str(error.value)


# --- libraries -----------------------------------------------------------------------------------------------------


def test_needed_libraries_are_those_that_readelf_lists() -> None:
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("onnxruntime_pybind11_state*.so"))
    listed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    expected = [line.split("[")[1].rstrip("]") for line in listed.splitlines() if "(NEEDED)" in line]
    assert list(cuda_libraries.needed_libraries(library)) == expected
    assert expected


def test_another_file_needs_no_libraries(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"MZ" + bytes(80))
    assert cuda_libraries.needed_libraries(tmp_path / "a") == ()


def test_missing_libraries_are_named_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(map(cuda_libraries._tried, ("libc.so.6", "libcublasLt.so.99", "libcuda.so.99")))
    monkeypatch.setattr(cuda_libraries, "cuda_libraries", lambda: found)
    with pytest.raises(DeviceError) as error:
        cuda_libraries.require_cuda_libraries("cuda:1")
    text = str(error.value)
    assert "'cuda:1'" in text
    assert "libcublasLt.so.99: cannot open shared object file" in text
    assert "libc.so.6: " not in text.replace("needs: libc.so.6", "")
    assert "onnxruntime-gpu[cuda,cudnn]" in error.value.remedy
    monkeypatch.setattr(cuda_libraries, "cuda_libraries", lambda: (cuda_libraries.Library("libcuda.so.1", "no"),))
    with pytest.raises(DeviceError, match="install NVIDIA's driver") as error:
        cuda_libraries.require_cuda_libraries("cuda")
    assert "onnxruntime-gpu[cuda" not in error.value.remedy


def test_a_library_that_is_here_in_another_version_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "nvidia" / "cuda_runtime" / "lib"
    folder.mkdir(parents=True)
    for name in ("libcudart.so.98", "libcudart_static.a", "libcudart.so.99"):
        (folder / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ctypes.util, "find_library", {"cudart": "libcudart.so.97"}.get)
    found = cuda_libraries._tried("libcudart.so.99")
    assert found.problem is not None
    assert found.others == ("libcudart.so.97", "libcudart.so.98")
    assert cuda_libraries._tried("libcublas.so.99").others == ()
    monkeypatch.setattr(cuda_libraries, "cuda_libraries", lambda: (found,))
    with pytest.raises(DeviceError, match=r"libcudart.so.99: .*; found: libcudart.so.97, libcudart.so.98"):
        cuda_libraries.require_cuda_libraries("cuda")


def test_the_cuda_releases_are_onnxruntimes_and_the_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        @staticmethod
        def cudaRuntimeGetVersion(to: Any) -> int:
            to._obj.value = 13020
            return 0

    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(cuda_libraries, "_runtime", Runtime)
    assert cuda_libraries.cuda_releases() == ("13.0", "13.2")
    monkeypatch.setattr(cuda_libraries, "_runtime", lambda: None)
    monkeypatch.setattr(onnxruntime, "cuda_version", "")
    assert cuda_libraries.cuda_releases() == (None, None)


def test_serving_on_cuda_needs_neither_torch_nor_onnx() -> None:
    code = "import sys\nfor m in ('torch', 'onnx', 'onnx_ir'): sys.modules[m] = None\nimport llm2slm_export.inference.runtime.onnxruntime.cuda_backend"
    subprocess.run([sys.executable, "-c", code], check=True)
