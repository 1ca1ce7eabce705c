"""The TensorRT backend without TensorRT and without a GPU: fakes run the bundle's own graphs on its buffer plan, and refuse a
wrong address, profile, alias or shape. Tokens must be those of ONNX Runtime on the CPU."""

import gc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm2slm_export
from llm2slm_export.authoring.build import build, build_heads
from llm2slm_export.authoring.build_options import BuildOptions
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.bundle.files import file_entries
from llm2slm_export.bundle.manifest import EngineLimits
from llm2slm_export.bundle.manifest_file import read_manifest, write_manifest
from llm2slm_export.contract import GRAPHS
from llm2slm_export.errors import (
    BundleError,
    DeviceError,
    EncodingError,
    EngineError,
    MissingExtraError,
    PromptError,
    UsageError,
)
from llm2slm_export.inference.encodings.cache import EncodingCache
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.runtime import selection
from llm2slm_export.inference.runtime.backend import Ids
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend
from llm2slm_export.inference.runtime.tensorrt import backend as tensorrt_backend
from llm2slm_export.inference.runtime.tensorrt import cuda_device
from llm2slm_export.inference.runtime.tensorrt.backend import TensorRtBackend, open_tensorrt
from llm2slm_export.inference.runtime.tensorrt.compatibility import check_engines
from llm2slm_export.inference.runtime.tensorrt.cuda_device import CudaDevice, cuda_runtime
from llm2slm_export.inference.runtime.tensorrt.decoder import EngineDecoder, _assigned, _runs
from llm2slm_export.inference.runtime.tensorrt.device_protocol import DeviceFacts, GpuDevice
from llm2slm_export.inference.runtime.tensorrt.dtypes import from_stored, item_bytes, to_stored
from llm2slm_export.inference.runtime.tensorrt.engine import EngineContext
from llm2slm_export.inference.runtime.tensorrt.library import FoundLibrary
from llm2slm_export.inference.runtime.tensorrt.memory import DeviceTensor, MemoryPool
from tests.support.backend_calls import LENGTHS, conditioning_of
from tests.support.engine_bundle import LIMITS, with_engines
from tests.support.fake_gpu import FakeFault, FakeGpu
from tests.support.fake_tensorrt import FakeContext, engine_bytes, fake_tensorrt
from tests.support.independent_rows import (
    assert_close,
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
from tests.support.tiers import tiered
from tests.support.tiny_models import SLM_CONFIGS

PROMPTS = ["How are you?", "The quick brown fox jumps", "a", "To be or not", "one two three four"]
Sources = Callable[[str], Path]


@pytest.fixture(scope="session")
def talkative(save_composition: Callable[..., Path], save_generating_model: Callable[..., Path]) -> Sources:
    """talkative(slm) → a composition whose SLM has something to say, and ends its responses at different lengths."""
    made: dict[str, Path] = {}

    def composition(slm: str) -> Path:
        if slm not in made:
            directory = save_composition(slm)
            shutil.rmtree(directory / "slm")
            save_generating_model(SLM_CONFIGS[slm]).rename(directory / "slm")
            made[slm] = directory
        return made[slm]

    return composition


@pytest.fixture(scope="session")
def plain(talkative: Sources, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """plain(slm) → a bundle without engines."""
    built: dict[str, Path] = {}

    def bundle(slm: str) -> Path:
        if slm not in built:
            built[slm] = tmp_path_factory.mktemp("plain") / slm
            build(load_composition(talkative(slm)), built[slm])
        return built[slm]

    return bundle


@pytest.fixture(scope="session")
def equipped(plain: Sources, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """equipped(slm, **facts) → a bundle with a set of engines, as `engine_set` makes it."""
    made: dict[str, Path] = {}

    def bundle(slm: str, **facts: Any) -> Path:
        key = repr((slm, facts))
        if key not in made:
            made[key] = with_engines(plain(slm), tmp_path_factory.mktemp("engines") / slm, {"fake": facts})
        return made[key]

    return bundle


def libraries(gpu: FakeGpu, **versions: str | None) -> dict[Any, FoundLibrary]:
    """TensorRT alone, or the versions of variants."""
    facts = versions or {"tensorrt": "11.4.0.106"}
    return {
        variant: FoundLibrary(
            variant, version, None if version else "not installed: it", fake_tensorrt(gpu, version or "")
        )
        for variant, version in (("tensorrt", facts.get("tensorrt")), ("tensorrt-rtx", facts.get("tensorrt_rtx")))
    }  # type: ignore[return-value, arg-type]


def opened(path: Path, gpu: FakeGpu, **more: Any) -> TensorRtBackend:
    return open_tensorrt(open_bundle(path), index=0, device=gpu, **{"libraries": libraries(gpu), **more})


def contexts_of(backend: TensorRtBackend) -> list[Any]:
    return backend._host.library.trt.contexts  # type: ignore[no-any-return]


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


# --- the same tokens as on the CPU ---------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one at a time": {"batch_size": 1},
    "beams": {"num_beams": 4, "batch_size": 2},
    "sampling": {"do_sample": True, "seed": 3, "temperature": 0.8, "num_return_sequences": 3, "batch_size": 2},
}


@pytest.mark.parametrize(
    ("slm", "buffers", "named"),
    tiered(
        product(["t5", "llama", "gpt2"], ["in-place", "ping-pong"], OPTIONS),
        fast=[*product(["t5", "llama"], ["in-place"], OPTIONS), *product(["gpt2"], ["ping-pong"], OPTIONS)],
    ),
)
def test_tokens_are_those_of_the_cpu(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, buffers: str, named: str
) -> None:
    path, options = equipped(slm, in_place=buffers == "in-place"), OPTIONS[named]
    with llm2slm_export.load(path) as cpu:
        expected = cpu.generate(PROMPTS, max_new_tokens=18, **options)
    assert len({g.new_tokens for g in expected}) > 1, "rows that end together test less"
    with Orchestrator(open_bundle(path), opened(path, gpu)) as pair:
        got = pair.generate(PROMPTS, max_new_tokens=18, **options)
        assert [g.token_ids for g in got] == [g.token_ids for g in expected]
        assert {g.device for g in got} == {"tensorrt:0"}
        assert pair.device == "tensorrt:0"
        assert set(pair.runtimes.values()) == {"tensorrt"}
    assert gpu.nothing_left


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_tensorrt_rtx_runs_the_same_way(equipped: Callable[..., Path], gpu: FakeGpu, slm: str) -> None:
    path = equipped(slm, variant="tensorrt-rtx", version="1.7.1.116")
    with llm2slm_export.load(path) as cpu:
        expected = cpu.generate(PROMPTS, max_new_tokens=18)
    backend = opened(path, gpu, libraries=libraries(gpu, tensorrt_rtx="1.7.1.116"))
    with Orchestrator(open_bundle(path), backend) as pair:
        assert [g.token_ids for g in pair.generate(PROMPTS, max_new_tokens=18)] == [g.token_ids for g in expected]
        assert set(pair.runtimes.values()) == {"tensorrt-rtx"}


def test_the_error_of_logits_that_are_not_finite_tells_the_precision_of_the_engines(
    equipped: Callable[..., Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = equipped("t5", dtype="float16")
    backend = opened(path, gpu)
    prefill = backend.prefill

    def spoilt(conditioning: Any) -> tuple[Any, Any]:
        state, logits = prefill(conditioning)
        return state, np.full_like(logits, np.nan)

    monkeypatch.setattr(backend, "prefill", spoilt)
    with Orchestrator(open_bundle(path), backend) as pair:
        with pytest.raises(BundleError, match="non-finite logits") as error:
            pair.generate(PROMPTS[:1], max_new_tokens=4)
        assert error.value.evidence[-1] == "precision: encoder fp16, projector fp16, decoder fp16; device: tensorrt:0"


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_encodings_cross_between_cpu_and_gpu(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, tmp_path: Path
) -> None:
    path = equipped(slm)
    with llm2slm_export.load(path) as cpu, Orchestrator(open_bundle(path), opened(path, gpu)) as pair:
        expected = [g.token_ids for g in cpu.generate(PROMPTS, max_new_tokens=12)]
        there, here = cpu.encode(PROMPTS), pair.encode(PROMPTS)
        cpu.save_encoding(there, tmp_path / "cpu")
        pair.save_encoding(here, tmp_path / "gpu")
        for encoding in (here, pair.load_encoding(tmp_path / "cpu"), pair.load_encoding(tmp_path / "gpu"), here):
            assert [g.token_ids for g in pair.generate_from(encoding, max_new_tokens=12)] == expected
        assert [
            g.token_ids for g in cpu.generate_from(cpu.load_encoding(tmp_path / "gpu"), max_new_tokens=12)
        ] == expected


def test_an_encoding_cache_is_the_same_on_both(equipped: Callable[..., Path], gpu: FakeGpu, tmp_path: Path) -> None:
    path, cache = equipped("t5"), EncodingCache(directory=tmp_path)
    with llm2slm_export.load(path, cache=cache) as cpu:
        expected = cpu.generate(PROMPTS, max_new_tokens=12)
    with Orchestrator(open_bundle(path), opened(path, gpu), cache=cache) as pair:
        got = pair.generate(PROMPTS, max_new_tokens=12)
    assert [g.token_ids for g in got] == [g.token_ids for g in expected]
    assert all(g.cached for g in got)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_half_engines_keep_the_cache_in_their_type(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, dtype: str
) -> None:
    path = equipped(slm, dtype=dtype)
    cpu, backend = OrtBackend(open_bundle(path), device="cpu", threads=1), opened(path, gpu)
    rows = np.array([1, 0, 1])
    found = []
    for one in (cpu, backend):
        ids = np.array([[5, 6, 7, 8], [9, 10, 0, 0]])
        conditioning = one.project(one.encode(ids, np.sign(ids)), ids, np.sign(ids))
        arrays = one.arrays(conditioning)
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
        state, _ = one.prefill(one.conditioning(arrays, conditioning.attention_mask))
        one.step(state, np.array([[11], [12]]))
        one.select(state, rows)
        found.append(one.step(state, np.array([[13], [14], [15]])).copy())
    scale = np.abs(found[0]).max()
    error = np.abs(found[1] - found[0]).max() / scale
    # Rounded: not the CPU's, and not far from it. 2**-8 and 2**-11 are half of the types' steps.
    assert 0 < error < {"float16": 0.02, "bfloat16": 0.1}[dtype]
    state = backend.prefill(conditioning)[0]
    assert {t.dtype for cache in state.buffers.caches.values() for t in cache} == {dtype}
    backend.close()


def test_values_that_float16_cannot_hold_are_refused(equipped: Callable[..., Path], gpu: FakeGpu) -> None:
    path = equipped("t5", dtype="float16")
    backend = opened(path, gpu)
    name = "past_key_values.0.encoder.key"
    array = np.full((1, 3, 2, 6), 7e4, np.float32)
    with pytest.raises(EncodingError, match="float16") as error:
        backend.conditioning({name: array}, np.ones((1, 2), np.int64))
    assert "7e+04" in str(error.value)
    backend.close()


INDEPENDENT_ROWS = [
    check_prompts_of_different_lengths, check_rows_of_different_lengths, check_rewind_refuses_a_longer_length,
]  # fmt: skip


@pytest.mark.parametrize("check", INDEPENDENT_ROWS)
@pytest.mark.parametrize(("slm", "in_place"), [("t5", True), ("t5", False), ("llama", True), ("llama", False)])
def test_rows_are_independent(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, in_place: bool, check: Callable[[Any], None]
) -> None:
    backend = opened(equipped(slm, in_place=in_place), gpu)
    check(backend)
    backend.close()


KINDS = [("t5", True), ("t5", False), ("llama", True), ("llama", False)]


@pytest.mark.parametrize("check", JOINING_ROWS)
@pytest.mark.parametrize(("slm", "in_place"), KINDS)
def test_rows_join(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, in_place: bool, check: Callable[[Any], None]
) -> None:
    backend = opened(equipped(slm, in_place=in_place), gpu)
    check(backend)
    backend.close()
    assert gpu.nothing_left


@pytest.mark.parametrize(("slm", "in_place"), KINDS)
def test_contexts_of_different_buckets_join(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, in_place: bool
) -> None:
    backend = opened(equipped(slm, in_place=in_place, limits=LIMITS.model_copy(update={"prompt": 150})), gpu)
    check_contexts_of_different_buckets(backend)
    backend.close()


@pytest.mark.slow
@pytest.mark.parametrize(("slm", "in_place"), KINDS)
def test_rows_come_and_go_in_bounded_memory(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, in_place: bool
) -> None:
    backend, taken = opened(equipped(slm, in_place=in_place), gpu), []

    def bounded(running: Running) -> None:
        gc.collect()
        state, decoder = running.state, backend._decoding()
        assert len(set(state.slots.tolist())) == len(running.rows) <= state.width <= state.buffers.rows <= LIMITS.batch
        assert state.slots.max() < state.width
        assert len(state.attention_mask) <= LIMITS.batch
        assert all(len(state.attention_mask) == tensor.shape[0] for tensor in state.tensors.values())
        assert all(tensor.shape[2] <= 16 for tensor in state.tensors.values())
        assert len(decoder._pool._open) <= 8
        taken.append(backend._host.memory.taken_bytes)

    check_rows_come_and_go(backend, most=LIMITS.batch, after=bounded)
    # The pool keeps a block of each size that the conditioning had. One more conditioning a round would double it.
    assert taken[-1] < 1.25 * taken[len(taken) // 3]
    backend.close()
    assert gpu.nothing_left


@pytest.mark.parametrize(("slm", "in_place"), KINDS)
def test_rows_that_join_fill_idle_slots(equipped: Callable[..., Path], gpu: FakeGpu, slm: str, in_place: bool) -> None:
    """Into buffers that have room nothing moves but the rows that join."""
    backend = opened(equipped(slm, in_place=in_place), gpu)
    running = Running(backend, [5, 9, 2, 4], first=0).step(2).select([0, 2, 3]).step()
    other = Running(backend, [3], first=7).step(2)
    buffers, left, lease = running.state.buffers, other.state, weakref.ref(other.state.lease)
    assert running.state.slots.tolist() == [0, 2, 3]
    gpu.counts.clear()
    running.join(other)
    assert running.state.buffers is buffers
    assert running.state.slots.tolist() == [0, 2, 3, 1]
    # The row's cache; its conditioning, and that of the two runs of rows before it, which become one tensor.
    crossed = len(running.state.tensors)
    assert gpu.counts["copy_blocks"] == len(buffers.caches) + crossed * (2 + 1 + 1)
    assert lease() is None, "the state that is left over holds its buffers"
    del left
    running.step(3).check()
    backend.close()


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_more_rows_than_the_engines_accept_do_not_join(equipped: Callable[..., Path], gpu: FakeGpu, slm: str) -> None:
    backend = opened(equipped(slm), gpu)
    running, other = Running(backend, [5, 9, 2, 4, 3], first=0).step(), Running(backend, [3] * 4, first=7).step(2)
    before = dict(vars(running.state)), dict(vars(other.state))
    with pytest.raises(UsageError, match=r"9 rows are more than the engines accept: 8\."):
        running.join(other)
    assert_unchanged(running, before[0])
    assert_unchanged(other, before[1])
    running.step().check()
    other.select([0, 1, 2]).step().check()
    running.join(other).step().check()
    backend.close()


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_rows_for_which_there_is_no_memory_do_not_join(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(equipped(slm), gpu)
    running, other = Running(backend, [5, 9], first=0).step(), Running(backend, [3, 4], first=7).step(2)
    before = dict(vars(running.state)), dict(vars(other.state))
    refused = 0
    for count in range(100):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryPool, "take", _taken_until(count))
            try:
                running.join(other)
                break
            except DeviceError:
                refused += 1
        assert_unchanged(running, before[0])
        assert_unchanged(other, before[1])
    assert refused > 2
    running.step(2).check()
    backend.close()


def _taken_until(count: int) -> Callable[..., Any]:
    """`MemoryPool.take` that has no room after `count` blocks."""
    take, blocks = MemoryPool.take, []

    def taken(self: MemoryPool, size: int, purpose: str, remedy: str) -> Any:
        if len(blocks) == count:
            raise DeviceError(f"The device has no room for {purpose}.", remedy=remedy)
        blocks.append(purpose)
        return take(self, size, purpose, remedy)

    return taken


def assert_unchanged(running: Running, before: dict[str, Any]) -> None:
    """Whether a state has the values that it had, all of which are replaced and not written to."""
    assert all(value is before[name] for name, value in vars(running.state).items())


def test_an_idle_slot_stays_within_a_full_cache(started: Callable[..., Any]) -> None:
    """Three rows run on four slots: the fourth writes too, however long the others are."""
    backend, state = started("llama")
    assert (state.width, len(state.slots)) == (4, 3)
    for _ in range(backend.limits.capacity - int(state.lengths.max())):
        backend.step(state, np.array([[3], [4], [5]]))
        assert state.buffers.lengths.tolist() == [*(state.lengths - 1), 0]


def test_a_greedy_step_tells_the_highest_of_the_logits(started: Callable[..., Any]) -> None:
    backend, state = started("t5")
    other, twin = started("t5")
    num_tokens = backend._manifest.tokenizer.slm_size
    ids = np.array([[7], [8], [9]])
    for call in range(4):
        if call == 2:  # rows that are not where they were
            backend.select(state, np.array([2, 0]))
            other.select(twin, np.array([2, 0]))
            ids = ids[[2, 0]]
        logits = other.step(twin, ids)[:, -1, :num_tokens]
        best, highest = backend.step_argmax(state, ids)
        np.testing.assert_array_equal(best, logits.argmax(axis=1))
        np.testing.assert_array_equal(highest, logits.max(axis=1))
        ids = best[:, None]


@pytest.mark.parametrize(
    ("options", "copied"),
    [({}, False), ({"output_scores": True}, True), ({"repetition_penalty": 1.2}, True), ({"do_sample": True}, True)],
    ids=str,
)
def test_logits_are_copied_only_where_something_reads_them(
    equipped: Callable[..., Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], copied: bool
) -> None:
    backend = opened(equipped("t5"), gpu)
    calls: list[str] = []
    for name in ("step", "step_argmax"):
        run = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *given, name=name, run=run: calls.append(name) or run(*given))
    with Orchestrator(open_bundle(equipped("t5")), backend) as pair:
        pair.generate(PROMPTS, max_new_tokens=6, **options)
    assert set(calls) == {"step" if copied else "step_argmax"}


def test_tokens_that_must_not_end_are_chosen_here(equipped: Callable[..., Path], gpu: FakeGpu) -> None:
    path = equipped("t5")
    with llm2slm_export.load(path) as cpu, Orchestrator(open_bundle(path), opened(path, gpu)) as pair:
        for options in ({"min_new_tokens": 9}, {"forced_eos_token_id": 1}):
            expected = cpu.generate(PROMPTS, max_new_tokens=12, **options)
            got = pair.generate(PROMPTS, max_new_tokens=12, **options)
            assert [g.token_ids for g in got] == [g.token_ids for g in expected]


# --- a step ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(equipped: Callable[..., Path], gpu: FakeGpu) -> Iterator[Callable[..., Any]]:
    """started(slm, **facts) → a backend and a state after the prompt pass of three prompts and two steps."""
    backends = []

    def start(slm: str, **facts: Any) -> tuple[TensorRtBackend, Any]:
        backend = opened(equipped(slm, **facts), gpu)
        backends.append(backend)
        ids = np.array([[5, 6, 7, 8], [9, 10, 0, 0], [11, 12, 13, 0]])
        state, _ = backend.prefill(backend.project(backend.encode(ids, np.sign(ids)), ids, np.sign(ids)))
        for call in range(2 * (2 if facts.get("in_place") is False else 1)):
            backend.step(state, np.array([[3], [4], [5]]) + call)
        return backend, state

    yield start
    for backend in backends:
        backend.close()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_a_step_allocates_nothing_tells_nothing_and_is_one_launch(
    started: Callable[..., Any], gpu: FakeGpu, slm: str, in_place: bool
) -> None:
    backend, state = started(slm, in_place=in_place)
    backend.step(state, np.array([[3], [4], [5]]))  # captured by now, both ways round
    changes_before = sum(context.changes for context in contexts_of(backend))
    gpu.counts.clear()
    for call in range(6):
        backend.step(state, np.array([[3], [4], [5]]) + call)
    assert dict(gpu.counts) == {"launch": 6, "synchronize": 6}
    assert sum(context.changes for context in contexts_of(backend)) == changes_before


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_the_next_response_of_the_same_size_allocates_nothing(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str
) -> None:
    path = equipped(slm)
    with Orchestrator(open_bundle(path), opened(path, gpu)) as pair:
        first = pair.generate(PROMPTS[:3], max_new_tokens=12)
        gc.collect()
        gpu.counts.clear()
        again = pair.generate(PROMPTS[:3], max_new_tokens=12)
        assert [g.token_ids for g in again] == [g.token_ids for g in first]
        # What ran once the first time is captured the second; buffers that were planned had taken blocks from others. From
        # then on there is nothing left to do.
        gc.collect()
        gpu.counts.clear()
        pair.generate(PROMPTS[:3], max_new_tokens=12)
        assert gpu.counts["begin_capture"] == gpu.counts["allocate"] == gpu.counts["allocate_host"] == 0
        assert gpu.counts["launch"] > 0


def test_two_states_at_a_time_have_buffers_of_their_own(started: Callable[..., Any]) -> None:
    backend, state = started("t5")
    ids = np.array([[20, 21], [22, 23], [24, 25]])
    conditioning = backend.project(backend.encode(ids, np.ones_like(ids)), ids, np.ones_like(ids))
    other, _ = backend.prefill(conditioning)
    expected = [backend.step(other, np.array([[3], [4], [5]]) + call).copy() for call in range(4)]
    again, _ = backend.prefill(conditioning)
    for call in range(4):
        backend.step(state, np.array([[9], [9], [9]]))
        np.testing.assert_array_equal(backend.step(again, np.array([[3], [4], [5]]) + call), expected[call])
    assert state.buffers is not other.buffers is not again.buffers


def test_threads_wait_for_each_other(equipped: Callable[..., Path], gpu: FakeGpu) -> None:
    path = equipped("t5")
    with Orchestrator(open_bundle(path), opened(path, gpu)) as pair, ThreadPoolExecutor(4) as pool:
        asked = [[f"{prompt} {i}" for prompt in PROMPTS[:3]] for i in range(8)]
        expected = [[g.token_ids for g in pair.generate(prompts, max_new_tokens=8)] for prompts in asked]
        for got, wanted in zip(
            pool.map(lambda ask: pair.generate(ask, max_new_tokens=8), asked), expected, strict=True
        ):
            assert [g.token_ids for g in got] == wanted


def test_rows_that_leave_move_nothing_until_half_are_gone(started: Callable[..., Any], gpu: FakeGpu) -> None:
    backend, state = started("llama")
    backend.step(state, np.array([[3], [4], [5]]))
    gpu.counts.clear()
    backend.select(state, np.array([0, 2]))  # 3 of 4 slots → 2: now two are enough
    assert state.width == 2
    assert gpu.counts["copy_blocks"] == len(state.buffers.caches)  # one row, each part of the cache
    backend.step(state, np.array([[3], [4]]))
    gpu.counts.clear()
    backend.select(state, np.array([1, 0]))  # an order is no copy
    assert gpu.counts["copy_blocks"] == 0
    assert state.slots.tolist() == [1, 0]


def test_beams_copy_only_what_repeats(started: Callable[..., Any], gpu: FakeGpu) -> None:
    backend, state = started("t5")
    backend.select(state, np.repeat(np.arange(3), 2))  # six rows: larger buffers
    backend.step(state, np.arange(6)[:, None] + 3)
    gpu.counts.clear()
    backend.select(state, np.array([1, 1, 2, 3, 5, 5]))
    copied = gpu.counts["copy_blocks"] / len(state.buffers.caches)
    assert copied == 2  # and no keys or values of the cross-attention
    assert sorted(state.slots) == list(range(6))


def test_slots_of_rows() -> None:
    held: Ids = np.array([0, 0, 1, 1, -1, -1, -1, -1])
    np.testing.assert_array_equal(_assigned(np.array([3, 3, 0, 0]), np.array([1, 1, 0, 0]), held[:4]), [3, 2, 0, 1])
    np.testing.assert_array_equal(_assigned(np.array([6, 1]), np.array([0, 0]), held[:2]), [0, 1])
    assert list(_runs([0, 1, 2, 5, 6], [3, 4, 5, 6, 7])) == [(0, 3, 3), (5, 6, 2)]
    assert list(_runs([], [])) == []


def test_steps_that_cannot_be_captured_run_all_the_same_and_are_noted(
    equipped: Callable[..., Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeContext, "is_stream_capturable", lambda self, stream: False)  # noqa: ARG005
    path = equipped("t5", variant="tensorrt-rtx", version="1.7.1.116")
    with llm2slm_export.load(path) as cpu:
        expected = cpu.generate(PROMPTS, max_new_tokens=18)
    backend = opened(path, gpu, libraries=libraries(gpu, tensorrt_rtx="1.7.1.116"))
    with Orchestrator(open_bundle(path), backend) as pair:
        assert backend.warnings == ()
        assert [g.token_ids for g in pair.generate(PROMPTS, max_new_tokens=18)] == [g.token_ids for g in expected]
        assert gpu.counts["begin_capture"] == 0
        (note,) = backend.warnings
        assert "CUDA graphs: tensorrt-rtx" in note


def test_a_capture_that_fails_is_ended(
    started: Callable[..., Any], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineContext, "capturable", lambda self: True)  # noqa: ARG005
    real = FakeContext.execute_async_v3

    def refuse(self: FakeContext, stream_handle: int) -> bool:
        return not gpu.capturing(stream_handle) and real(self, stream_handle)

    monkeypatch.setattr(FakeContext, "execute_async_v3", refuse)
    with pytest.raises(EngineError, match="a call failed"):
        started("t5")
    assert not gpu._capturing
    assert not gpu._graphs


# --- several tokens ---------------------------------------------------------------------------------------------------


def calls_of(backend: TensorRtBackend) -> int:
    """The engine calls so far."""
    return sum(context.calls for context in contexts_of(backend))


@pytest.mark.parametrize(("slm", "in_place"), KINDS)
def test_a_step_of_several_tokens_is_one_engine_call(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, in_place: bool
) -> None:
    backend = opened(equipped(slm, in_place=in_place), gpu)
    conditioning = conditioning_of(backend, LENGTHS)
    state, _ = backend.prefill(conditioning)
    other, _ = backend.prefill(conditioning)
    ids, rows = np.arange(27).reshape(3, 9) % 50 + 3, np.array([2, 0, 1])
    for of in (state, other):
        backend.step(of, ids[:, :1])
        backend.select(of, rows)  # rows that are not where they were
    ids = ids[rows]
    for first, end in ((1, 5), (5, 6), (6, 8)):
        before, parity = calls_of(backend), state.parity
        together = backend.step(state, ids[:, first:end]).copy()
        assert calls_of(backend) == before + 1
        assert (state.parity == parity) is in_place
        alone = [backend.step(other, ids[:, at : at + 1]).copy() for at in range(first, end)]
        assert_close(together, np.concatenate(alone, axis=1))
        assert backend.lengths(state).tolist() == backend.lengths(other).tolist()
    backend.close()
    assert gpu.nothing_left


@pytest.mark.parametrize(("slm", "in_place"), KINDS)
def test_rows_set_back_after_several_tokens_go_on_as_alone(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, in_place: bool
) -> None:
    backend = opened(equipped(slm, in_place=in_place), gpu)
    running = Running(backend, [5, 9, 2], first=0).step(together=3).rewind([2, 0, 1]).step().step(together=4)
    running.rewind([1, 3, 4]).step(2, together=2).select([2, 0, 0, 1]).step(together=3).rewind([0, 2, 1, 3])
    running.select([1, 3]).step(together=2).step()  # fewer slots
    running.join(Running(backend, [4, 1, 7], first=10).step(together=4).rewind([3, 0, 1])).step(together=2).step()
    running.check()
    backend.close()


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_rows_that_come_and_go_take_several_tokens(equipped: Callable[..., Path], gpu: FakeGpu, slm: str) -> None:
    backend = opened(equipped(slm), gpu)
    check_rows_come_and_go(backend, most=LIMITS.batch, rounds=8, after=lambda running: running.step(together=2))
    backend.close()


@pytest.mark.parametrize(("call_tokens", "calls"), [(4, 3), (5, 2), (8, 2), (9, 1), (16, 1), (1, 9)])
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_more_tokens_than_the_engine_takes_in_a_call_are_several_calls(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str, call_tokens: int, calls: int
) -> None:
    backend = opened(equipped(slm, call_tokens=call_tokens), gpu)
    running = Running(backend, [5, 2], first=0)
    before = calls_of(backend)
    running.step(together=9)
    assert calls_of(backend) == before + calls
    running.check()
    backend.close()


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_more_draft_tokens_than_the_engine_takes_in_a_call_give_the_same_response(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str
) -> None:
    path = equipped(slm)
    backend = opened(path, gpu)
    with llm2slm_export.load(path) as cpu, Orchestrator(open_bundle(path), backend) as pair:
        options = {"max_new_tokens": 18, "min_new_tokens": 18}  # long enough for tokens that repeat
        expected = cpu.generate(PROMPTS, **options)
        got = pair.generate(PROMPTS, drafter="ngram", num_draft_tokens=9, **options)
        assert [g.token_ids for g in got] == [g.token_ids for g in expected]
        assert sum(g.drafted_tokens for g in got) > 0
        assert backend.warnings == ()


def test_only_calls_of_several_tokens_take_memory_for_them(started: Callable[..., Any], gpu: FakeGpu) -> None:
    backend, state = started("llama", call_tokens=16)
    memory, vocab = backend._host.memory, backend._manifest.shape.vocab_size
    for count, room in ((1, 0), (2, 2), (3, 4), (2, 4), (11, 16), (4, 16), (1, 16)):
        gpu.counts.clear()
        gc.collect()
        before = memory.taken_bytes
        backend.step(state, np.full((3, count), 7))
        backend.rewind(state, state.lengths - count)
        call = state.buffers._call
        if call is None:
            assert room == 0
            assert memory.taken_bytes == before
            continue
        assert call.tokens == room
        assert call.tensors["logits"].shape == (4, room, vocab)
        grown = count == room or (count, room) in ((3, 4), (11, 16))
        assert (gpu.counts["allocate"] > 0) is (gpu.counts["allocate_host"] > 0) is grown
        assert (gpu.counts["free_host"] > 0) is (grown and room > 2)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_a_step_of_one_token_stays_one_launch_between_those_of_several(
    started: Callable[..., Any], gpu: FakeGpu, slm: str, in_place: bool
) -> None:
    backend, state = started(slm, in_place=in_place)
    for _ in range(2):  # captured by now, both ways round
        backend.step(state, np.array([[3], [4], [5]]))
    for count in (3, 2, 3):
        backend.step(state, np.full((3, count), 9))
        changes_before = sum(context.changes for context in contexts_of(backend))
        gpu.counts.clear()
        backend.step(state, np.array([[3], [4], [5]]))
        assert dict(gpu.counts) == {"launch": 1, "synchronize": 1}
        assert sum(context.changes for context in contexts_of(backend)) == changes_before


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_states_take_several_tokens_in_turn(equipped: Callable[..., Path], gpu: FakeGpu, slm: str) -> None:
    backend = opened(equipped(slm, in_place=False), gpu)
    one, two = Running(backend, [5, 9, 2], first=0), Running(backend, [3], first=10)
    for _ in range(2):
        one.step(together=3)
        two.step(together=2).rewind([1]).step(together=3)
    one.step().check()
    two.step().check()
    backend.close()


def test_several_tokens_fill_the_cache_to_its_end_beside_an_idle_slot(started: Callable[..., Any]) -> None:
    """Three rows run on four slots: the fourth writes its own first positions, however long the others are."""
    backend, state = started("llama")
    longest = np.argmax(state.lengths)
    running = int(state.lengths[longest])
    assert (state.width, len(state.slots)) == (4, 3)
    while running < backend.limits.capacity:
        count = min(4, backend.limits.capacity - running)
        backend.step(state, np.full((3, count), 5))
        running += count
        assert state.lengths[longest] == running
        assert state.buffers.lengths[3] == 0
    for count in (1, 2, 7):
        with pytest.raises(UsageError, match="more than the engines' cache has room for"):
            backend.step(state, np.full((3, count), 5))
        assert state.lengths[longest] == running


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_the_engine_tells_the_highest_logit_of_every_token(started: Callable[..., Any], slm: str) -> None:
    backend, state = started(slm)
    num_tokens = backend._manifest.tokenizer.slm_size
    for count in (4, 3):
        logits = backend.step(state, np.arange(3 * count).reshape(3, count) + 3)[..., :num_tokens]
        tensors = state.buffers.call(count, most=4).tensors
        found = [
            tensors[name].read().reshape(-1)[: 4 * count].reshape(4, count) for name in ("argmax_ids", "max_logits")
        ]
        np.testing.assert_array_equal(found[0][:3], logits.argmax(axis=2))
        np.testing.assert_array_equal(found[1][:3], logits.max(axis=2))


def test_several_tokens_for_which_there_is_no_memory_change_nothing(
    equipped: Callable[..., Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(equipped("llama"), gpu)
    running = Running(backend, [5, 2], first=0).step(together=2)
    taken = MemoryPool.take

    def full(self: MemoryPool, size: int, purpose: str, remedy: str) -> Any:
        if "[2, 4" in purpose:
            raise DeviceError(f"no room for {purpose}", remedy=remedy)
        return taken(self, size, purpose, remedy)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryPool, "take", full)
        before = backend.lengths(running.state).tolist()
        with pytest.raises(DeviceError, match="no room"):
            backend.step(running.state, np.full((2, 7), 5))
        assert backend.lengths(running.state).tolist() == before
    running.step().step(together=4).check()
    backend.close()
    assert gpu.nothing_left


# --- what goes wrong must show ---------------------------------------------------------------------------------------


def test_a_wrong_alias_is_noticed(started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = EngineDecoder._bindings

    def swapped(self: Any, state: Any, sizes: Any) -> Any:
        bound = real(self, state, sizes)
        keys = [name for name in bound if name.startswith("present.")]
        return bound | {keys[0]: bound[keys[1]], keys[1]: bound[keys[0]]}

    monkeypatch.setattr(EngineDecoder, "_bindings", swapped)
    with pytest.raises(FakeFault, match="over which the engine writes it"):
        started("t5")


def test_a_cache_that_is_written_where_it_is_read_is_noticed(
    started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = EngineDecoder._bindings

    def same(self: Any, state: Any, sizes: Any) -> Any:
        bound = real(self, state, sizes)
        return bound | {present: bound[past] for present, past in self._past_of.items()}

    monkeypatch.setattr(EngineDecoder, "_bindings", same)
    with pytest.raises(FakeFault, match="lies over"):
        started("llama", in_place=False)


def test_a_wrong_profile_is_noticed(started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineDecoder, "_profile", lambda self, sizes: 0)  # noqa: ARG005
    with pytest.raises(EngineError, match="cannot have the shape"):
        started("llama")


def test_a_wrong_address_is_noticed(started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = EngineDecoder._bindings

    def elsewhere(self: Any, state: Any, sizes: Any) -> Any:
        bound = real(self, state, sizes)
        name = "past_key_values.0.encoder.key"
        return bound | {name: replace(bound[name], address=bound[name].address + 256)}

    monkeypatch.setattr(EngineDecoder, "_bindings", elsewhere)
    with pytest.raises(FakeFault, match="are allocated"):
        started("t5")


def test_memory_that_has_been_freed_is_noticed(started: Callable[..., Any], gpu: FakeGpu) -> None:
    backend, state = started("t5")
    backend.step(state, np.array([[3], [4], [5]]))
    address = next(iter(state.buffers.caches.values()))[0].address  # what was captured has it
    gpu.free(address)
    with pytest.raises(FakeFault, match="has been freed"):
        backend.step(state, np.array([[3], [4], [5]]))
    gpu._streams[1].clear()
    gpu._blocks[address] = np.zeros(1, np.uint8)  # as if it were there: closing frees it


def test_a_context_that_is_changed_after_its_capture_is_noticed(started: Callable[..., Any], gpu: FakeGpu) -> None:
    backend, state = started("t5")
    backend.step(state, np.array([[3], [4], [5]]))
    (captured,) = (c for c in contexts_of(backend) if c.shapes.get("input_ids") == (4, 1))
    captured.set_tensor_address("logits", captured.addresses["logits"] + 256)
    with pytest.raises(FakeFault, match="changed after it had been captured"):
        backend.step(state, np.array([[3], [4], [5]]))
    gpu._streams[1].clear()


def test_caches_that_are_not_cleared_show(
    equipped: Callable[..., Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2slm_export.inference.runtime.tensorrt.buffers.DecoderBuffers.clear", lambda self: None)  # noqa: ARG005
    backend = opened(equipped("llama"), gpu)
    ids = np.array([[5, 6, 7, 8]])
    _, logits = backend.prefill(backend.project(backend.encode(ids, np.sign(ids)), ids, np.sign(ids)))
    assert np.isnan(logits).any()
    backend.close()


def test_overlapping_copies_are_noticed(gpu: FakeGpu) -> None:
    gpu.make_current()
    stream, address = gpu.create_stream(), gpu.allocate(1024)
    gpu.copy_blocks(address + 256, address, width=512, count=1, to_pitch=512, from_pitch=512, stream=stream)
    with pytest.raises(FakeFault, match="over"):
        gpu.synchronize(stream)


# --- who lets go of what ---------------------------------------------------------------------------------------------


def test_closing_gives_everything_back(equipped: Callable[..., Path], gpu: FakeGpu) -> None:
    path = equipped("t5")
    pair = Orchestrator(open_bundle(path), opened(path, gpu))
    encoding = pair.encode(PROMPTS)
    stream = pair.stream("How are you?", max_new_tokens=8, min_new_tokens=5)
    next(stream)
    pair.close()
    assert gpu.nothing_left
    with pytest.raises(UsageError, match="closed"):
        pair.generate_from(encoding)
    with pytest.raises(UsageError, match="not open"):
        list(stream)
    pair.close()
    del encoding, stream
    gc.collect()
    assert gpu.nothing_left


def test_a_backend_that_does_not_open_leaves_nothing(
    equipped: Callable[..., Path], gpu: FakeGpu, tmp_path: Path
) -> None:
    path = shutil.copytree(equipped("t5"), tmp_path / "broken")
    manifest = read_manifest(path)
    entry = manifest.engines["fake"].graphs["decoder"]
    (path / entry.file).write_bytes(b"x" * (path / entry.file).stat().st_size)
    with pytest.raises(EngineError, match="cannot load") as error:
        open_tensorrt(Bundle(path, manifest), index=0, device=gpu, libraries=libraries(gpu))
    assert "magicTag" in str(error.value)
    assert gpu.nothing_left


@pytest.fixture(scope="session")
def heads(talkative: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 and a Llama over one encoder, with engines."""
    directory = tmp_path_factory.mktemp("heads")
    fr = talkative("t5")
    es = shutil.copytree(talkative("llama"), directory / "es")
    shutil.rmtree(es / "llm")
    (es / "llm").symlink_to(fr / "llm")
    sources = {"fr": lambda: load_composition(fr), "es": lambda: load_composition(es)}
    build_heads(sources, directory / "plain")
    return with_engines(directory / "plain", directory / "engines")


@pytest.mark.slow
def test_heads_share_the_encoder_and_the_device(heads: Path, gpu: FakeGpu) -> None:
    with llm2slm_export.load(heads) as cpu:
        expected = {name: cpu.head(name).generate(PROMPTS, max_new_tokens=10) for name in cpu.heads}
    pair = Orchestrator(open_bundle(heads), opened(heads, gpu))
    for name in ("fr", "es", "fr"):
        got = pair.head(name).generate(PROMPTS, max_new_tokens=10)
        assert [g.token_ids for g in got] == [g.token_ids for g in expected[name]]
    first, second = (pair.head(name)._backend for name in ("fr", "es"))
    assert isinstance(first, TensorRtBackend)
    assert isinstance(second, TensorRtBackend)
    assert first._engines["encoder"] is second._engines["encoder"]
    assert first._engines["decoder"] is not second._engines["decoder"]
    # The second goes on without the first.
    first.close()
    assert not gpu.nothing_left
    got = pair.head("es").generate(PROMPTS, max_new_tokens=10)
    assert [g.token_ids for g in got] == [g.token_ids for g in expected["es"]]
    pair.close()
    assert gpu.nothing_left


def test_buffers_that_nobody_uses_go_when_there_is_no_room(equipped: Callable[..., Path]) -> None:
    path = equipped("t5")
    gpu = FakeGpu()
    with Orchestrator(open_bundle(path), opened(path, gpu)) as pair:
        for _ in range(2):
            pair.generate(["How are you?"] * 5, max_new_tokens=8)
        full = gpu.facts.total_bytes - gpu.free_bytes()
        gc.collect()
        # No more than there is: buffers for four rows need the room of those for eight.
        gpu.facts = replace(gpu.facts, total_bytes=full + 4096)
        gpu.counts.clear()
        got = pair.generate(["To be or not"] * 3, max_new_tokens=8)
        assert gpu.counts["free"] > 0
        assert gpu.counts["destroy_graph"] > 0
    with llm2slm_export.load(path) as cpu:
        expected = cpu.generate(["To be or not"] * 3, max_new_tokens=8)
    assert [g.token_ids for g in got] == [g.token_ids for g in expected]
    assert gpu.nothing_left


def test_no_room_says_what_was_asked_and_what_is_free(equipped: Callable[..., Path], gpu: FakeGpu) -> None:
    path = equipped("t5")
    backend = opened(path, gpu)
    ids = np.array([[5, 6, 7, 8]])
    conditioning = backend.project(backend.encode(ids, np.sign(ids)), ids, np.sign(ids))
    gpu.facts = replace(gpu.facts, total_bytes=gpu.facts.total_bytes - gpu.free_bytes() + 100)
    with pytest.raises(DeviceError, match=r"has no room for .* of the decoder") as error:
        backend.prefill(conditioning)
    assert "requested: " in str(error.value)
    assert "free: 0.0 MiB of " in str(error.value)
    assert "--batch-size" in error.value.remedy
    backend.close()
    assert gpu.nothing_left


def test_no_room_for_an_engine(equipped: Callable[..., Path]) -> None:
    gpu = FakeGpu(DeviceFacts(0, "Fake GPU", "8.9", "580.65.06", 1000))
    with pytest.raises(DeviceError, match=r"has no room for the encoder engine tensorrt/fake/encoder\.engine") as error:
        opened(equipped("t5"), gpu)
    assert "--engine-precision encoder=int8" in error.value.remedy
    assert gpu.nothing_left


# --- larger requests than the engines take -------------------------------------------------------------------------------


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_requests_beyond_the_engines_name_limit_and_option(
    equipped: Callable[..., Path], gpu: FakeGpu, slm: str
) -> None:
    path = equipped(slm)
    with Orchestrator(open_bundle(path), opened(path, gpu)) as pair:
        gpu.counts.clear()
        with pytest.raises(PromptError, match="longer than the engines accept: 64 tokens") as error:
            pair.generate(["a", "b" * 70])
        assert "prompt 1: 71 tokens" in str(error.value)
        assert "--max-prompt 71" in error.value.remedy
        with pytest.raises(PromptError, match="longer than the engines accept"):
            pair.encode(["b" * 70])
        with pytest.raises(UsageError, match="max_new_tokens is 21; the engines have room for 20") as refused:
            pair.generate(["a"], max_new_tokens=21)
        assert "--max-new 21" in refused.value.remedy
        with pytest.raises(UsageError, match="A batch of 9 rows is larger than the engines accept: 8") as refused:
            pair.generate(["a"], batch_size=9)
        assert "--batch-size) to 8" in refused.value.remedy
        assert "--max-batch 9" in refused.value.remedy
        with pytest.raises(UsageError, match="A batch of 9 rows"):
            pair.generate(["a"], num_beams=9)
        assert gpu.counts["copy_in"] == 0, "something ran"
        with pytest.raises(UsageError, match="A batch of 12 rows"):
            pair.generate_from(pair.encode(["a", "b", "c"]), num_beams=4)
        (cut,) = pair.generate(["b" * 70], truncate=True, max_new_tokens=2)
        assert (cut.prompt_tokens, cut.dropped_tokens) == (64, 7)


def test_any_number_of_prompts_runs_in_batches_of_what_the_engines_take(
    equipped: Callable[..., Path], gpu: FakeGpu
) -> None:
    path = equipped("t5")
    prompts = [f"{i} {'x' * (i % 5)}" for i in range(20)]
    with llm2slm_export.load(path) as cpu, Orchestrator(open_bundle(path), opened(path, gpu)) as pair:
        expected = [g.token_ids for g in cpu.generate(prompts, max_new_tokens=6)]
        assert [g.token_ids for g in pair.generate(prompts, max_new_tokens=6)] == expected
        assert [g.token_ids for g in pair.generate(prompts, max_new_tokens=6, num_beams=3)] == [
            g.token_ids for g in cpu.generate(prompts, max_new_tokens=6, num_beams=3)
        ]


def test_the_usual_batch_is_what_the_engines_take_at_most(equipped: Callable[..., Path], gpu: FakeGpu) -> None:
    path = equipped("t5")
    with llm2slm_export.load(path) as cpu, Orchestrator(open_bundle(path), opened(path, gpu)) as pair:
        assert [cpu.at_a_time(usual, num_beams=3) for usual in (1, 32)] == [1, 32]
        assert [pair.at_a_time(usual, num_beams=3) for usual in (1, 32)] == [1, 2]
        with pytest.raises(UsageError, match="the engines accept: 8"):
            pair.at_a_time(1, num_beams=9)


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_the_backend_refuses_them_too(started: Callable[..., Any], slm: str) -> None:
    backend, state = started(slm)
    long = np.ones((1, 65), np.int64)
    with pytest.raises(PromptError, match="A prompt of 65 tokens is longer than the engines accept: 64"):
        backend.encode(long, long)
    with pytest.raises(UsageError, match="A batch of 9 prompts is larger than the engines accept: 8"):
        backend.encode(long.repeat(9, 0)[:, :3], long.repeat(9, 0)[:, :3])
    with pytest.raises(UsageError, match="9 rows are more than the engines accept: 8"):
        backend.select(state, np.zeros(9, np.int64))
    for _ in range(backend.limits.capacity - int(state.lengths.max())):
        backend.step(state, np.array([[3], [4], [5]]))
    with pytest.raises(UsageError, match="more than the engines' cache has room for") as error:
        backend.step(state, np.array([[3], [4], [5]]))
    assert "--max-new" in error.value.remedy


# --- the guard -------------------------------------------------------------------------------------------------------


def refusal(path: Path, gpu: FakeGpu, **more: Any) -> DeviceError:
    with pytest.raises(DeviceError) as error:
        opened(path, gpu, **more)
    assert gpu.counts["allocate"] == 0
    assert gpu.nothing_left
    return error.value


def test_a_bundle_without_engines_says_so(plain: Sources, gpu: FakeGpu) -> None:
    error = refusal(plain("t5"), gpu)
    assert "has no TensorRT engines for the device 'tensorrt:0'" in error.fact
    assert "Fake GPU, SM 8.9, driver 580.65.06, tensorrt 11.4.0.106" in str(error)
    assert "--backend tensorrt" in error.remedy


def test_every_mismatch_of_every_set_is_named(plain: Sources, tmp_path: Path, gpu: FakeGpu) -> None:
    sets: dict[str, dict[str, Any]] = {
        "old": {"version": "10.16.1.11", "compute_capabilities": ("8.0", "9.0"), "driver": "590.10"},
        "mine": {"compute_capabilities": (), "device": "NVIDIA L4"},
        "rtx": {"variant": "tensorrt-rtx", "version": "1.7.1.116"},
    }
    path = with_engines(plain("t5"), tmp_path / "bundle", sets)
    error = refusal(path, gpu)
    for line in (
        "old: tensorrt 10.16.1.11 for SM 8.0, 9.0; encoder fp32, projector fp32, decoder fp32; up to 8 rows, 64 prompt tokens",
        "version: needs tensorrt 10.16.1.11, found tensorrt 11.4.0.106",
        "compute_capabilities: needs 8.0, 9.0, found 8.9 (Fake GPU)",
        "driver: needs 590.10 or newer, found 580.65.06",
        "device: needs 'NVIDIA L4', found 'Fake GPU'",
        "variant: needs tensorrt-rtx 1.7.1.116 (pip install 'llm2slm-export[tensorrt-rtx]'), found not installed",
    ):
        assert line in str(error)
    assert f"--out {path}" in error.remedy


def test_an_engine_of_other_weights_is_stale(equipped: Callable[..., Path], gpu: FakeGpu) -> None:
    """A graph's file stays the same where only its weights have changed, which lie in another."""
    bundle = open_bundle(equipped("t5"))
    (weights, *_) = bundle.manifest.graphs["decoder"].data
    files = tuple(f.model_copy(update={"sha256": "0" * 64}) if f.path == weights else f for f in bundle.manifest.files)
    changed = Bundle(bundle.directory, bundle.manifest.model_copy(update={"files": files}))
    (fits,) = check_engines(bundle, libraries=libraries(gpu), device=gpu.facts, graphs=("decoder",))
    (stale,) = check_engines(changed, libraries=libraries(gpu), device=gpu.facts, graphs=("decoder",))
    assert [mismatch.field for mismatch in fits.mismatches] == []
    assert [mismatch.field for mismatch in stale.mismatches] == ["graphs.decoder.source"]


def test_a_stale_truncated_or_narrow_engine_is_named(
    equipped: Callable[..., Path], tmp_path: Path, gpu: FakeGpu
) -> None:
    path = shutil.copytree(equipped("t5"), tmp_path / "bundle")
    manifest = read_manifest(path)
    engines = manifest.engines["fake"]
    (path / engines.graphs["decoder"].file).write_bytes(b"{}")
    stale = engines.graphs["encoder"].model_copy(update={"source": "0" * 64})
    changed = engines.model_copy(
        update={
            "graphs": {**engines.graphs, "encoder": stale},
            "limits": engines.limits.model_copy(update={"prompt": 65, "batch": 9, "capacity": 21}),
        }
    )
    bundle = Bundle(path, manifest.model_copy(update={"engines": {"fake": changed}}))
    (checked,) = check_engines(bundle, libraries=libraries(gpu), device=gpu.facts, graphs=("encoder", "decoder"))
    assert [mismatch.field for mismatch in checked.mismatches] == [
        "graphs.encoder.source", "graphs.encoder.profiles", "graphs.encoder.profiles", "graphs.decoder.file",
        "graphs.decoder.profiles", "graphs.decoder.profiles", "graphs.decoder.inputs",
    ]  # fmt: skip
    assert str(checked.mismatches[-1]).endswith("needs capacity 21, found capacity 20")
    assert "graphs.encoder.source: needs encoder.onnx 0000000000000000…, found " in str(checked.mismatches[0])
    assert str(checked.mismatches[3]).endswith("found 2 bytes")
    with pytest.raises(DeviceError, match="None of the engines"):
        open_tensorrt(bundle, index=0, device=gpu, libraries=libraries(gpu))
    # And on opening the bundle, as any file that is not what was built.
    with pytest.raises(BundleError, match=r"decoder\.engine: expected"):
        open_bundle(path)


def test_a_set_without_a_graph_does_not_fit(equipped: Callable[..., Path], gpu: FakeGpu) -> None:
    bundle = open_bundle(equipped("t5"))
    engines = bundle.manifest.engines["fake"]
    decoder = engines.model_copy(update={"graphs": {"decoder": engines.graphs["decoder"]}})
    bundle = Bundle(bundle.directory, bundle.manifest.model_copy(update={"engines": {"fake": decoder}}))
    (checked,) = check_engines(
        bundle, libraries=libraries(gpu), device=gpu.facts, graphs=("encoder", "projector", "decoder")
    )
    assert [str(mismatch) for mismatch in checked.mismatches] == ["graphs: needs encoder, projector, found decoder"]
    backend = open_tensorrt(bundle, index=0, device=gpu, libraries=libraries(gpu), graphs=("decoder",))
    assert list(backend.runtimes) == ["decoder"]
    backend.close()


def test_an_engine_that_is_not_as_the_manifest_says_is_refused(
    equipped: Callable[..., Path], tmp_path: Path, gpu: FakeGpu
) -> None:
    path = shutil.copytree(equipped("t5"), tmp_path / "bundle")
    manifest = read_manifest(path)
    engines = manifest.engines["fake"]
    decoder = engines.graphs["decoder"]
    first, *others = decoder.inputs
    other = decoder.model_copy(
        update={"inputs": (replace(first, dtype="int32"), *others), "aliases": {}, "profiles": decoder.profiles[:1]}
    )
    changed = engines.model_copy(update={"graphs": {**engines.graphs, "decoder": other}})
    write_manifest(path, manifest.model_copy(update={"engines": {"fake": changed}}))
    with pytest.raises(BundleError, match="is not the engine that the manifest") as error:
        opened(path, gpu)
    for line in (
        "profiles: the manifest has 1, the engine 2",
        "input_ids: the manifest has int32, the engine int64",
        "present.0.decoder.key: the manifest aliases it to None, the engine to past_key_values.0.decoder.key",
    ):
        assert line in str(error.value)
    assert gpu.nothing_left


def test_of_sets_that_fit_the_most_particular_is_used(plain: Sources, tmp_path: Path, gpu: FakeGpu) -> None:
    sets: dict[str, dict[str, Any]] = {
        "a-portable": {"compute_capabilities": ("8.0", "8.9")},
        "b-this": {},
        "c-half": {"dtype": "float16"},
        "d-other": {"compute_capabilities": ("9.0",)},
        "e-this-device": {"compute_capabilities": (), "device": "Fake GPU"},
    }
    path = with_engines(plain("t5"), tmp_path / "bundle", sets)
    chosen = []
    manifest = read_manifest(path)
    while any(key != "d-other" for key in manifest.engines):
        backend = open_tensorrt(Bundle(path, manifest), index=0, device=gpu, libraries=libraries(gpu))
        chosen.append(backend.chosen.key)
        backend.close()
        rest = {key: engines for key, engines in manifest.engines.items() if key != chosen[-1]}
        manifest = manifest.model_copy(update={"engines": rest})
    sizes = {key: sum(f.stat().st_size for f in (path / "tensorrt" / key).iterdir()) for key in ("b-this", "c-half")}
    assert chosen == ["e-this-device", *sorted(sizes, key=lambda key: sizes[key]), "a-portable"]


# --- asking for the device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "index"), [("tensorrt", 0), ("tensorrt:3", 3), ("tensorrt:", None), ("cuda", None)])
def test_device_names(name: str, index: int | None) -> None:
    assert selection.tensorrt_index(name) == index


def test_without_a_library_both_pip_lines_are_named(
    equipped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu
) -> None:
    none = libraries(gpu, other="1")
    monkeypatch.setattr(selection, "find_libraries", lambda: none)
    with pytest.raises(MissingExtraError, match="'tensorrt:1' needs TensorRT or TensorRT-RTX") as error:
        llm2slm_export.load(equipped("t5"), device="tensorrt:1")
    assert "tensorrt-rtx: not installed" in str(error.value)
    assert "pip install 'llm2slm-export[tensorrt]'" in error.value.remedy


def test_load_opens_the_engines_and_says_so(
    equipped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu
) -> None:
    found = libraries(gpu)
    monkeypatch.setattr(selection, "find_libraries", lambda: found)
    monkeypatch.setattr(tensorrt_backend, "find_libraries", lambda: found)
    monkeypatch.setattr(tensorrt_backend, "cuda_runtime", lambda: None)
    monkeypatch.setattr(
        tensorrt_backend, "CudaDevice", lambda index, cuda: gpu if index == 0 and cuda is None else None
    )
    with llm2slm_export.load(equipped("t5"), device="tensorrt") as pair:
        assert pair.generate(["a"], max_new_tokens=2)[0].device == "tensorrt:0"
    with llm2slm_export.load(equipped("t5"), device="tensorrt", part="writer") as pair:
        assert list(pair.runtimes) == ["decoder"]
        with pytest.raises(UsageError, match="encoder engine is not open"):
            pair.encode(["a"])
    for option, value in (("runtime", "openvino"), ("threads", 2)):
        with pytest.raises(UsageError, match=r"needs the device 'cpu'|threads is 2"):
            llm2slm_export.load(equipped("t5"), device="tensorrt", **{option: value})
    assert gpu.nothing_left


class NoDriver:
    """`cuda.bindings.runtime` where there is no driver, one that is too old, or no GPU."""

    def __init__(self, error: int, driver: int, count: int = 0) -> None:
        self.cudaError_t = type(
            "cudaError_t", (), {"cudaSuccess": 0, "cudaErrorNoDevice": 100, "cudaErrorInsufficientDriver": 35}
        )
        self.cudaGetDeviceCount = lambda: (error, count)
        self.cudaRuntimeGetVersion = lambda: (0, 13000)
        self.cudaDriverGetVersion = lambda: (0, driver)


@pytest.mark.parametrize(
    ("cuda", "facts"),
    [
        (
            NoDriver(35, 0),
            ["needs an NVIDIA driver for CUDA 13 or newer", "driver: none found", "update the NVIDIA driver"],
        ),
        (NoDriver(35, 12080), ["driver: 535.1, for CUDA 12.8", "pip install 'cuda-bindings<13'"]),
        (NoDriver(100, 13000), ["There is no device 'tensorrt:2'", "NVIDIA GPUs found: 0"]),
        (NoDriver(0, 13000, 2), ["NVIDIA GPUs found: 2", "choose one of tensorrt:0, tensorrt:1"]),
    ],
)
def test_a_missing_driver_or_gpu_is_named_with_what_the_bundle_has(
    equipped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu, cuda: Any, facts: list[str]
) -> None:
    monkeypatch.setattr(cuda_device, "driver_version", lambda: "535.1" if cuda.cudaDriverGetVersion()[1] else None)
    monkeypatch.setattr(tensorrt_backend, "cuda_runtime", lambda: cuda)
    with pytest.raises(DeviceError) as error:
        open_tensorrt(open_bundle(equipped("t5")), index=2, libraries=libraries(gpu))
    for line in [*facts, "the bundle has fake: tensorrt 11.4.0.106 for SM 8.9"]:
        assert line in str(error.value)


def test_the_limits_of_a_pair_are_those_of_its_engines(equipped: Callable[..., Path], gpu: FakeGpu) -> None:
    backend = opened(equipped("t5"), gpu)
    assert backend.limits == EngineLimits(batch=LIMITS.batch, prompt=LIMITS.prompt, new=LIMITS.new, capacity=20)
    backend.close()
    assert OrtBackend(open_bundle(equipped("t5")), device="cpu", threads=1).limits is None


def test_a_library_that_does_not_load_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise {"tensorrt": OSError("libnvinfer.so.11: cannot open"), "tensorrt_rtx": ModuleNotFoundError(name=name)}[
            name
        ]

    monkeypatch.setattr("importlib.import_module", fail)
    found = tensorrt_backend.find_libraries()
    assert "does not load: libnvinfer.so.11: cannot open" in str(found["tensorrt"].problem)
    assert found["tensorrt-rtx"].problem == "not installed: tensorrt_rtx"


def test_the_modules_import_no_runtime() -> None:
    code = (
        # cuda-bindings is in sys.modules from the start where it is installed: its .pth file imports it.
        "import sys; before = set(sys.modules); import llm2slm_export.inference.runtime.tensorrt.backend; print([m for m in ('onnxruntime', "
        "'torch', 'onnx', 'tensorrt', 'tensorrt_rtx', 'cuda', 'ml_dtypes') if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- floats as engines store them --------------------------------------------------------------------------------------


def test_bfloat16_is_rounded_as_ml_dtypes_does_it() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    halves = np.array(
        [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x80000000, 1], np.uint32
    )  # ties, NaNs
    floats = np.concatenate([bits, halves]).view(np.float32)
    with np.errstate(invalid="ignore"):
        expected = floats.astype(ml_dtypes.bfloat16)
    got = to_stored(floats, "bfloat16")
    real = ~np.isnan(floats)
    np.testing.assert_array_equal(got[real], expected[real].view(np.uint16))
    assert np.isnan(from_stored(got, "bfloat16")[~real]).all()
    np.testing.assert_array_equal(from_stored(got, "bfloat16")[real], expected[real].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "int32"])
def test_what_is_stored_comes_back(dtype: str) -> None:
    array = np.array([[0, 1, -2], [3, 100, -128]], np.float32)
    stored = to_stored(array, dtype)
    assert stored.nbytes == array.size * item_bytes(dtype)
    np.testing.assert_array_equal(from_stored(stored, dtype), array)


# --- manifests that were not written here ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slm", "precision"),
    tiered(product(["t5", "llama"], ["fp32", "fp16", "bf16"]), slow=[("llama", "bf16")]),
)
def test_what_the_builder_says_of_its_engines_is_enough_to_run_them(
    talkative: Sources, save_composition: Sources, tmp_path: Path, gpu: FakeGpu, slm: str, precision: str
) -> None:
    """Profiles, types and aliases as TensorRT-RTX built them; the fake runs the graphs in the engines' place."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX to build engines", exc_type=ImportError)
    from llm2slm_export.authoring.build_engines import EngineChoice

    path = tmp_path / "bundle"
    engines = EngineChoice(
        "tensorrt-rtx", trt, dict.fromkeys(GRAPHS, precision), batch=8, prompt=64, new=20, prompt_buckets=(8, 32)  # type: ignore[arg-type]
    )  # fmt: skip
    # What has something to say draws large weights, and bfloat16's eight bits lose what the gate wants kept.
    composition = save_composition(slm) if precision == "bf16" else talkative(slm)
    build(load_composition(composition), path, BuildOptions(engines=engines))
    manifest = read_manifest(path)
    ((_, made),) = manifest.engines.items()
    for name, entry in made.graphs.items():
        graph = path / manifest.graphs[name].file
        (path / entry.file).write_bytes(engine_bytes(graph, entry, manifest))
    write_manifest(path, manifest.model_copy(update={"files": file_entries(path)}))
    with llm2slm_export.load(path) as cpu:
        expected = cpu.generate(PROMPTS, max_new_tokens=18)
        beams = cpu.generate(PROMPTS, max_new_tokens=18, num_beams=4, batch_size=2)
    backend = opened(path, gpu, libraries=libraries(gpu, tensorrt_rtx=made.version))
    with Orchestrator(open_bundle(path), backend) as pair:
        got = pair.generate(PROMPTS, max_new_tokens=18)
        searched = pair.generate(PROMPTS, max_new_tokens=18, num_beams=4, batch_size=2)
        assert backend.warnings == ()
    if precision == "fp32":
        assert [g.token_ids for g in got] == [g.token_ids for g in expected]
        assert [g.token_ids for g in searched] == [g.token_ids for g in beams]
    assert all(g.token_ids for g in (*got, *searched))
    assert gpu.nothing_left


# --- what a device has to do ---------------------------------------------------------------------------------------


def exercise(device: GpuDevice) -> None:
    """Copies, fills and a captured graph, as a device has to do them."""
    memory = MemoryPool(device)
    tensor = DeviceTensor(memory, (4, 6), "float32", purpose="a test", remedy="none")
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensor.write(array)
    np.testing.assert_array_equal(tensor.read(), array)
    # Two blocks of two numbers each, from the first two rows to the last two.
    device.copy_blocks(
        tensor.address + 48, tensor.address, width=8, count=2, to_pitch=24, from_pitch=24, stream=memory.stream
    )
    array[2:, :2] = array[:2, :2]
    np.testing.assert_array_equal(tensor.read(), array)
    given, found = memory.host((4, 6), "float32"), memory.host((4, 6), "float32")
    device.begin_capture(memory.stream)
    device.copy_in(tensor.address, given, memory.stream)
    device.copy_out(found, tensor.address, memory.stream)
    graph = device.end_capture(memory.stream)
    for number in (1, 2):
        given[...] = number
        device.launch(graph, memory.stream)
        device.synchronize(memory.stream)
        assert (found == number).all()
    tensor.clear()
    assert (tensor.read() == 0).all()
    device.destroy_graph(graph)
    memory.close()


def test_the_fake_device_does_what_a_real_one_has_to(gpu: FakeGpu) -> None:
    gpu.make_current()
    exercise(gpu)
    assert gpu.nothing_left


# --- with a GPU; none of this has been run on one ----------------------------------------------------------------------


@pytest.fixture
def real_gpu() -> CudaDevice:
    """The first GPU."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings", exc_type=ImportError)
    try:
        device = CudaDevice(0, cuda=cuda_runtime())
    except DeviceError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error.fact}")
    device.make_current()
    return device


@pytest.mark.gpu
def test_a_real_device_copies_fills_and_replays(real_gpu: CudaDevice) -> None:
    exercise(real_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_real_engines_write_the_cpus_tokens(
    talkative: Sources, tmp_path: Path, real_gpu: CudaDevice, variant: Any, slm: str
) -> None:
    found = tensorrt_backend.find_libraries()[variant]
    if found.version is None:
        pytest.skip(f"needs {variant}: {found.problem}")
    from llm2slm_export.authoring.build_engines import EngineChoice

    path, capability = tmp_path / "bundle", (real_gpu.facts.compute_capability,)
    engines = EngineChoice(
        variant, found.module, dict.fromkeys(GRAPHS, "fp32"), batch=8, prompt=64, new=20,
        compute_capabilities=capability if variant == "tensorrt-rtx" else (),
    )  # fmt: skip
    build(load_composition(talkative(slm)), path, BuildOptions(engines=engines))
    with llm2slm_export.load(path) as cpu, llm2slm_export.load(path, device="tensorrt:0") as pair:
        for options in ({}, {"num_beams": 4, "batch_size": 2}):
            expected = cpu.generate(PROMPTS, max_new_tokens=18, **options)
            got = pair.generate(PROMPTS, max_new_tokens=18, **options)
            assert [g.token_ids for g in got] == [g.token_ids for g in expected]
            assert {g.device for g in got} == {"tensorrt:0"}
