"""What the ONNX Runtime backend refuses, and how it moves rows. The graphs themselves are tested with the exporter."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.contract import PairShape
from llm2slm_export.errors import BundleError
from llm2slm_export.inference.runtime.backend import Ids, context_mask
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend
from llm2slm_export.inference.runtime.onnxruntime.decoder import OrtState, capacity_for
from tests.support.backend_calls import LENGTHS, conditioning_of, ids_of
from tests.support.independent_rows import (
    check_prompts_of_different_lengths,
    check_rewind_refuses_a_longer_length,
    check_rows_of_different_lengths,
)
from tests.support.paths import DEMO


@pytest.mark.parametrize(
    ("slm_kind", "fusion", "expected"),
    [
        ("encoder-decoder", "add", [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
        ("decoder-only", "add", [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
        ("encoder-decoder", "prefix", [[1] * 6 + [0] * 2, [1] * 2 + [0] * 6, [1] * 8]),
        ("decoder-only", "prefix", [[1] * 6 + [0] * 2, [1] * 2 + [0] * 6, [1] * 8]),
    ],
)
def test_the_context_is_padded_on_the_right(slm_kind: str, fusion: str, expected: list[list[int]]) -> None:
    shape = PairShape(
        slm_kind,
        fusion,
        encoder_hidden_size=4,
        hidden_size=4,
        num_hidden_layers=1,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=9,
    )  # type: ignore[arg-type]
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(context_mask(shape, mask), expected)


def test_the_module_imports_no_runtime() -> None:
    import subprocess

    code = (
        "import sys, llm2slm_export.inference.runtime.onnxruntime.backend; "
        "print([m for m in ('onnxruntime', 'torch', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_threads_that_have_read_do_not_wait_beside_the_decoders(
    bundles: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They did, in a busy loop of tens of milliseconds: the first tokens took three times as long."""
    entries: dict[str, dict[str, str]] = {}
    session = onnxruntime.InferenceSession

    def opened(path: str, options: onnxruntime.SessionOptions, **given: Any) -> onnxruntime.InferenceSession:
        own = entries.setdefault(Path(path).stem, {})
        for key in ("session.force_spinning_stop", "session.intra_op.spin_duration_us"):
            with suppress(RuntimeError):  # it was not said
                own[key] = options.get_session_config_entry(key)
        return session(path, options, **given)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    OrtBackend(open_bundle(bundles("t5")[1]), device="cpu", threads=2).close()
    stops = {"session.force_spinning_stop": "1"}
    assert entries == {"encoder": stops, "projector": stops, "decoder": {"session.intra_op.spin_duration_us": "500"}}


# --- rows of a real decoder ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["t5", "llama"])
def backend(request: pytest.FixtureRequest, bundles: Callable[..., tuple[Path, Path]]) -> Iterator[OrtBackend]:
    bundle = open_bundle(bundles(request.param)[1])
    backend = OrtBackend(bundle, device="cpu", threads=1)
    yield backend
    backend.close()


def logits_alone(backend: OrtBackend, row: int, calls: int) -> np.ndarray:
    """The last logits of a prompt that runs by itself."""
    state, logits = backend.prefill(conditioning_of(backend, [LENGTHS[row]], first=row))
    for call in range(calls):
        logits = backend.step(state, ids_of([row], call))[:, -1]
    return logits[0].copy()


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0, 2, 2], [2], [0, 1, 2]])
def test_selected_rows_go_on_as_they_would_alone(backend: OrtBackend, rows: list[int]) -> None:
    state, logits = backend.prefill(conditioning_of(backend, LENGTHS))
    for row in range(3):
        np.testing.assert_allclose(logits[row], logits_alone(backend, row, 0), atol=2e-5)
    backend.step(state, ids_of([0, 1, 2], 0))
    backend.select(state, np.array(rows))
    logits = backend.step(state, ids_of(rows, 1))[:, -1]
    for place, row in enumerate(rows):
        np.testing.assert_allclose(logits[place], logits_alone(backend, row, 2), atol=2e-5)
    # And again, from what was selected, right after a call and with rows leaving.
    backend.select(state, np.array([len(rows) - 1]))
    logits = backend.step(state, ids_of(rows[-1:], 2))[:, -1]
    np.testing.assert_allclose(logits[0], logits_alone(backend, rows[-1], 3), atol=2e-5)


def test_rows_can_be_repeated_before_the_first_step(backend: OrtBackend) -> None:
    conditioning = conditioning_of(backend, LENGTHS)
    state, _ = backend.prefill(conditioning)
    rows = [0, 0, 1, 1, 2, 2]
    backend.select(state, np.array(rows))
    logits = backend.step(state, ids_of(rows, 0))[:, -1]
    for place, row in enumerate(rows):
        np.testing.assert_allclose(logits[place], logits_alone(backend, row, 1), atol=2e-5)
    # The conditioning is as it was.
    state, _ = backend.prefill(conditioning)
    np.testing.assert_allclose(backend.step(state, ids_of([0, 1, 2], 0))[:, -1], logits[::2], atol=2e-5)


def test_what_a_selection_does_not_change_is_not_copied(backend: OrtBackend) -> None:
    def held(state: OrtState) -> list[object]:
        return [value for name, value in state.bound.items() if ".encoder." in name or name == "encoder_attention_mask"]

    state, _ = backend.prefill(conditioning_of(backend, LENGTHS))
    bound = dict(state.bound)
    backend.select(state, np.arange(3))
    assert all(state.bound[name] is value for name, value in bound.items())
    backend.select(state, np.array([0, 0, 1, 1]))
    before = held(state)
    backend.step(state, ids_of([0, 0, 1, 1], 0))
    backend.select(state, np.array([1, 0, 2, 2]))
    assert all(one is other for one, other in zip(before, held(state), strict=True))
    assert state.sources.tolist() == [0, 0, 1, 1]
    backend.select(state, np.array([3]))
    assert not before or all(one is not other for one, other in zip(before, held(state), strict=True))


def test_a_step_binds_nothing_until_the_cache_is_full(backend: OrtBackend) -> None:
    conditioning = conditioning_of(backend, LENGTHS)
    state, _ = backend.prefill(conditioning)
    backend.step(state, ids_of([0, 1, 2], 0))
    bound, logits = dict(state.bound), state.logits
    for call in range(1, state.capacity - int(state.lengths.max()) + 1):
        backend.step(state, ids_of([0, 1, 2], call))
        assert all(state.bound[name] is value for name, value in bound.items())
    assert state.logits is logits
    assert state.lengths.max() == state.capacity == 32
    name = next(name for name in bound if name.startswith("past_key_values.0") and ".encoder." not in name)
    held, lengths = bound[name].numpy().copy(), state.lengths
    assert (np.abs(held).max(axis=(0, 1, 3)) > 0).all()
    backend.step(state, ids_of([0, 1, 2], 0))
    assert state.capacity == 64
    grow = state.bound[name].numpy()
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(grow[row, :, :length], held[row, :, :length])
    assert (np.abs(grow).max(axis=(0, 1, 3)) > 0).tolist() == [True] * 33 + [False] * 31


def test_room_is_an_eighth_more_at_most() -> None:
    rooms = [capacity_for(needed) for needed in range(1, 5000)]
    assert all(needed <= room <= max(needed + 32, needed * 9 // 8) for needed, room in enumerate(rooms, 1))
    assert rooms == sorted(rooms)
    # Growing one position at a time, each is copied a few times in all.
    copied = sum(room for room, following in pairwise(rooms) if following > room)
    assert copied < 16 * len(rooms)


def test_several_tokens_in_a_call_are_as_one_by_one(backend: OrtBackend) -> None:
    ids = np.arange(3 * 50).reshape(3, 50) % 250 + 3
    state, _ = backend.prefill(conditioning_of(backend, LENGTHS))
    single = [backend.step(state, ids[:, position : position + 1]).copy() for position in range(50)]
    state, _ = backend.prefill(conditioning_of(backend, LENGTHS))
    several = [backend.step(state, ids[:, start:end]).copy() for start, end in ((0, 20), (20, 49), (49, 50))]
    np.testing.assert_allclose(np.concatenate(several, axis=1), np.concatenate(single, axis=1), atol=5e-5)


def test_prompts_of_different_lengths_are_as_alone(backend: OrtBackend) -> None:
    check_prompts_of_different_lengths(backend)


def test_rows_of_different_lengths_are_as_alone(backend: OrtBackend) -> None:
    check_rows_of_different_lengths(backend)


def test_padding_of_every_prompt_counts_for_nothing(backend: OrtBackend) -> None:
    # More of it than the smallest cache has positions.
    state, logits = backend.prefill(conditioning_of(backend, LENGTHS, width=40))
    for row in range(3):
        np.testing.assert_allclose(logits[row], logits_alone(backend, row, 0), atol=2e-5)
    logits = backend.step(state, ids_of([0, 1, 2], 0))[:, -1]
    for row in range(3):
        np.testing.assert_allclose(logits[row], logits_alone(backend, row, 1), atol=2e-5)


def test_rewind_refuses_a_longer_length(backend: OrtBackend) -> None:
    check_rewind_refuses_a_longer_length(backend)


def test_conditioning_survives_host_memory(backend: OrtBackend) -> None:
    conditioning = conditioning_of(backend, LENGTHS)
    arrays = {name: array.copy() for name, array in backend.arrays(conditioning).items()}
    again = backend.conditioning(arrays, conditioning.attention_mask)
    np.testing.assert_array_equal(backend.prefill(again)[1], backend.prefill(conditioning)[1])


def test_arrays_outlive_what_they_came_from(backend: OrtBackend) -> None:
    mask: Ids = np.ones((1, 4), np.int64)
    # So large that its memory goes back to the system: a view of it would be of what came next, or of nothing.
    arrays = backend.arrays(backend.conditioning({"a": np.full((1, 300_000), 7, np.float32)}, mask))
    another = np.full((1, 300_000), 3, np.float32)
    assert (arrays["a"] == 7).all()
    assert (another == 3).all()


def test_a_head_shares_the_encoder_which_outlives_the_first_of_them(bundles: Callable[..., tuple[Path, Path]]) -> None:
    bundle = open_bundle(bundles("t5")[1])
    first = OrtBackend(bundle, device="cpu", threads=1)
    second = first.head(bundle)
    assert second.sessions.get("encoder") is first.sessions.get("encoder")
    assert second.sessions.get("decoder") is not first.sessions.get("decoder")
    expected = first.prefill(conditioning_of(first, LENGTHS))[1]
    first.close()
    np.testing.assert_array_equal(second.prefill(conditioning_of(second, LENGTHS))[1], expected)


def test_a_graph_whose_name_in_an_error_is_not_utf8_is_refused(tmp_path: Path) -> None:
    copy = shutil.copytree(DEMO, tmp_path / "copy")
    bundle = open_bundle(copy)
    graph = copy / bundle.manifest.graphs["projector"].file
    model = onnx.load(graph, load_external_data=False)
    name = model.graph.node[-1].input[0]
    unread = b"\xff\xfe" * len(name)
    content = model.SerializeToString()
    assert len(name) < 64
    model.graph.node[-1].input[0] = "x" * len(unread)
    graph.write_bytes(model.SerializeToString().replace(b"x" * len(unread), unread))
    assert content != graph.read_bytes()
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load projector\.onnx"):
        OrtBackend(bundle, device="cpu", threads=1)
