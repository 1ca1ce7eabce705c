"""Checks that the rows of a state are independent: each is as if it ran alone, whatever the others' lengths are."""

from typing import Any

import numpy as np
import pytest

from tests.support.backend_calls import LENGTHS, conditioning_of

IDS = np.arange(3 * 12).reshape(3, 12) % 50 + 3  # [rows, calls]
TOLERANCE = 1e-4  # of the largest logit


def check_prompts_of_different_lengths(backend: Any) -> None:
    """Every prompt of a batch starts and goes on as it would alone."""
    state, first = backend.prefill(conditioning_of(backend, LENGTHS))
    first, lengths = first.copy(), backend.lengths(state)
    logits = np.concatenate([backend.step(state, IDS[:, call : call + 1]).copy() for call in range(3)], axis=1)
    for row in range(len(LENGTHS)):
        alone, expected = started_alone(backend, row)
        assert lengths[row] == backend.lengths(alone)[0]
        assert_close(first[row], expected[0])
        assert_close(logits[row], fed(backend, alone, IDS[row, :3]))


def check_rows_of_different_lengths(backend: Any) -> None:
    """Rows that are set back to different lengths go on as if they had never been longer, and keep it when they move."""
    state, _ = backend.prefill(conditioning_of(backend, LENGTHS))
    start, kept = backend.lengths(state), np.array([1, 6, 3])
    for call in range(6):
        backend.step(state, IDS[:, call : call + 1])
    backend.rewind(state, start + kept)
    found = [backend.step(state, IDS[:, 6:7]).copy(), backend.step(state, IDS[:, 7:9]).copy()]
    assert backend.lengths(state).tolist() == (start + kept + 3).tolist()
    written = {row: [*IDS[row, : kept[row]], *IDS[row, 6:9]] for row in range(3)}
    for row in range(3):
        assert_close(np.concatenate(found, axis=1)[row], logits_alone(backend, row, written[row])[-3:])
    running = [0, 1, 2]
    # A row is dropped, the longest repeated, its copy kept.
    for call, rows in enumerate(([0, 2], [1, 0, 0], [2]), 9):
        backend.select(state, np.array(rows))
        running = [running[row] for row in rows]
        copies = [[*written[row], IDS[row, call]] for row in running]
        assert backend.lengths(state).tolist() == [start[row] + len(written[row]) for row in running]
        logits = backend.step(state, IDS[running, call : call + 1])
        for place, row in enumerate(running):
            assert_close(logits[place], logits_alone(backend, row, copies[place])[-1:])
            written[row] = copies[place]


def check_rewind_refuses_a_longer_length(backend: Any) -> None:
    """A row is never longer than what was written to it; a refusal changes nothing."""
    state, _ = backend.prefill(conditioning_of(backend, LENGTHS))
    backend.step(state, IDS[:, :1])
    before = backend.lengths(state)
    for wrong in (before + np.array([0, 1, 0]), before - before.max() - 1, before[:2]):
        with pytest.raises(ValueError, match="cannot be set back") as error:
            backend.rewind(state, wrong)
        assert str(before.tolist()) in str(error.value)
        assert str(wrong.tolist()) in str(error.value)
        assert backend.lengths(state).tolist() == before.tolist()
    backend.lengths(state)[:] = 0  # a copy
    assert backend.lengths(state).tolist() == before.tolist()


def started_alone(backend: Any, row: int) -> tuple[Any, np.ndarray]:
    """The state and the first logits of a prompt that runs alone."""
    state, logits = backend.prefill(conditioning_of(backend, [LENGTHS[row]], first=row))
    return state, logits.copy()


def fed(backend: Any, state: Any, ids: Any) -> np.ndarray:
    """The logits [calls, vocab_size] of a state of one row that is fed ids one by one."""
    return np.concatenate([backend.step(state, np.array([[token_id]]))[0].copy() for token_id in ids])


def logits_alone(backend: Any, row: int, ids: Any) -> np.ndarray:
    """The logits [calls, vocab_size] of a prompt that runs alone on ids."""
    return fed(backend, started_alone(backend, row)[0], ids)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * float(np.abs(expected).max()))
