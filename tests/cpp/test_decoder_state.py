"""The decoder's state in C++: rows that step, are selected and set back, whatever the rank of its tensors."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import llm2slm_export
from llm2slm_export.contract import StateSpec, TensorSpec
from tests.support.cpp_library import BUNDLE, Failure, Program, edit, evidence_of, refusal
from tests.support.paths import DEMO

pytestmark = pytest.mark.slow
Axes = tuple[str | int, ...]
# Keys and values, a latent cache without heads, one whose positions are first, and one whose positions are last.
LAYOUTS: list[Axes] = [
    ("batch", 3, "capacity", 4), ("batch", "capacity", 4), ("batch", "capacity", 3, 2), ("batch", 3, 4, 2, "capacity"),
]  # fmt: skip
START, TOKENS = 3, range(1, 7)  # token 0 would write what an empty position holds
# [prompts, context]: what the decoder is conditioned on, with the number of tokens of each prompt.
CONTEXT, PROMPT_TOKENS = [[1, 2, 4], [8, 16, 32], [64, 128, 256]], [3, 1, 2]


def spec_of(number: int, axes: Axes) -> StateSpec:
    """The tensors of a state."""
    return StateSpec(*(TensorSpec(f"{side}_{number}", "float32", axes) for side in ("past", "present")))


def pattern(axes: Axes) -> Any:
    """What token 1 writes to a position: different numbers, of one position."""
    sizes = [axis if isinstance(axis, int) else 1 for axis in axes]
    return np.arange(1, np.prod(sizes) + 1).reshape(sizes)


# The call's places in the cache, and the sum of each row's conditioning.
CALL = """
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    second = Constant<value_ints = [1]>()
    third = Constant<value_ints = [2]>()
    flat = Constant<value_ints = [0, 0, -1]>()
    floats = Cast<to = 1>(input_ids)
    tokens = Unsqueeze(floats, second)
    shape = Shape<start = 1>(input_ids)
    count = Squeeze(shape)
    steps = Range(zero, count, one)
    starts = Unsqueeze(past_length, second)
    ends = Add(starts, steps)
    places = Unsqueeze(ends, third)
    mask = Cast<to = 1>(encoder_attention_mask)
    read = Mul(conditioning, mask)
    sums = ReduceSum(read, second)
    condition = Unsqueeze(sums, third)
"""
# For state @: its tokens are written, and each token sums its positions. Position p counts p + 1 times.
STATE = """
    others_@ = Constant<value_ints = {others}>()
    pattern_@ = Constant<value = float{sizes} {{{numbers}}}>()
    size_@ = Shape<start = {axis}, end = {end}>(past_@)
    capacity_@ = Squeeze(size_@)
    positions_@ = Range(zero, capacity_@, one)
    is_written_@ = Equal(places, positions_@)
    written_@ = Cast<to = 1>(is_written_@)
    new_@ = MatMul(tokens, written_@)
    new_flat_@ = Squeeze(new_@, second)
    new_tokens_@ = Unsqueeze(new_flat_@, others_@)
    values_@ = Mul(new_tokens_@, pattern_@)
    changes_@ = ReduceSum<keepdims = 0>(written_@, second)
    changed_@ = Unsqueeze(changes_@, others_@)
    is_changed_@ = Cast<to = 9>(changed_@)
    present_@ = Where(is_changed_@, values_@, past_@)
    moved_@ = Transpose<perm = {order}>(present_@)
    rows_@ = Reshape(moved_@, flat)
    is_seen_@ = LessOrEqual(positions_@, places)
    seen_@ = Cast<to = 1>(is_seen_@)
    ordinals_@ = Add(positions_@, one)
    weights_@ = Cast<to = 1>(ordinals_@)
    weighted_@ = Mul(seen_@, weights_@)
    part_@ = MatMul(weighted_@, rows_@)
"""


def decoder(states: Sequence[StateSpec]) -> onnx.ModelProto:
    """A decoder whose logits depend on every position that a token sees, and on the row's conditioning."""
    tensors = ["int64[batch, sequence_length] input_ids", "int64[batch, context] encoder_attention_mask"]
    tensors += ["int64[batch] past_length", "float[batch, context] conditioning"]
    outputs, text = ["float[batch, sequence_length, vocab] logits"], CALL
    for number, spec in enumerate(states):
        axes, numbers = ", ".join(map(str, spec.past.axes)), pattern(spec.past.axes)
        tensors.append(f"float[{axes}] {spec.past.name}")
        outputs.append(f"float[{axes}] {spec.present.name}")
        axis = spec.growing_axis if "capacity" in spec.past.axes else 1
        others = [other for other in range(1, numbers.ndim) if other != axis]
        text += STATE.replace("@", str(number)).format(
            others=others, sizes=list(numbers.shape), numbers=", ".join(map(str, numbers.flat)), axis=axis, end=axis + 1,
            order=[0, axis, *others],
        )  # fmt: skip
    text += f"""
    joined = Concat<axis = 2>({", ".join(f"part_{number}" for number in range(len(states)))})
    logits = Add(joined, condition)
    """
    signature = f"({', '.join(tensors)}) => ({', '.join(outputs)})"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> decoder {signature} {{{text}}}')
    onnx.checker.check_model(model)
    return model


class Rows:
    """The rows of a state as lists of tokens: what the decoder's logits must be.

    Args:
        states: of the decoder.
    """

    def __init__(self, states: Sequence[StateSpec]) -> None:
        self._pattern = np.concatenate([pattern(spec.past.axes).ravel() for spec in states])
        self.tokens: list[list[int]] = [[] for _ in PROMPT_TOKENS]
        self._conditions = [sum(row[:count]) for row, count in zip(CONTEXT, PROMPT_TOKENS, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Keep rows, in this order."""
        self.tokens = [list(self.tokens[row]) for row in rows]
        self._conditions = [self._conditions[row] for row in rows]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of each row beyond its length."""
        self.tokens = [row[:length] for row, length in zip(self.tokens, lengths, strict=True)]

    def step(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """Add tokens to each row; the logits [rows, tokens, vocab], flat."""
        logits: list[float] = []
        for row, condition, new in zip(self.tokens, self._conditions, ids, strict=True):
            for token in new:
                row.append(token)
                seen = sum(place * held for place, held in enumerate(row, 1))
                logits += (seen * self._pattern + condition).tolist()
        return logits


def decode(inside: Program, path: Path, states: Sequence[StateSpec], calls: list[Any]) -> Any:
    """The logits of a state's prefill and of the steps among its calls, from C++."""
    named = [{"past": s.past.name, "present": s.present.name, "axes": s.past.axes} for s in states]
    vocab = sum(pattern(spec.past.axes).size for spec in states)
    return inside(
        "decode", file=str(path), states=named, vocab=vocab, start=START, context=CONTEXT, prompt_tokens=PROMPT_TOKENS,
        calls=calls,
    )  # fmt: skip


@pytest.mark.parametrize("layouts", [*([layout] for layout in LAYOUTS), LAYOUTS], ids=str)
def test_a_state_of_any_rank_grows_is_selected_and_is_set_back(
    inside: Program, tmp_path: Path, layouts: list[Axes]
) -> None:
    states = [spec_of(number, axes) for number, axes in enumerate(layouts)]
    onnx.save(decoder(states), tmp_path / "decoder.onnx")
    rng, rows = random.Random(5), Rows(states)
    expected, calls, longest = [rows.step([[START]] * len(PROMPT_TOKENS))], [], 0
    # Beams are reordered, rows repeat and end, drafts are set back; between them the cache grows, more than once.
    for number in range(80):
        kind = rng.choice(["select", "rewind", "step", "step"])
        if kind == "select":
            count = len(rows.tokens) if number % 2 else rng.randint(1, 4)
            chosen: list[Any] = [rng.randrange(len(rows.tokens)) for _ in range(count)]
            rows.select(chosen)
        elif kind == "rewind":
            chosen = [len(row) - rng.randint(0, min(3, len(row))) for row in rows.tokens]
            rows.rewind(chosen)
        else:
            chosen = rng.choices(TOKENS, k=len(rows.tokens) * rng.randint(1, 5))
            expected.append(rows.step(np.reshape(chosen, (len(rows.tokens), -1)).tolist()))
        calls.append({"call": kind, "values": chosen})
        longest = max(longest, *map(len, rows.tokens))
    assert longest > 64
    assert decode(inside, tmp_path / "decoder.onnx", states, calls) == expected


def test_a_state_without_a_growing_axis_is_refused(inside: Program, driver: Program, tmp_path: Path) -> None:
    states = [spec_of(0, LAYOUTS[0]), spec_of(1, ("batch", 32, 4))]
    onnx.save(decoder(states), tmp_path / "decoder.onnx")
    with pytest.raises(ValueError, match="not in tuple"):
        states[1].growing_axis  # noqa: B018
    with pytest.raises(Failure) as refused:
        decode(inside, tmp_path / "decoder.onnx", states, [])
    failure = refused.value
    assert failure.code == BUNDLE
    assert "past_1 float32 [batch, 32, 4] has no axis `capacity`" in failure.message
    assert "→ build the bundle again" in failure.message

    # In a bundle's manifest it is refused before a graph is opened, with Python's fact.
    bundle = shutil.copytree(DEMO, tmp_path / "bundle")

    def fix(manifest: dict[str, Any]) -> None:
        manifest["cache"]["state"][3]["past"]["axes"][2] = 32

    edit(bundle, fix)
    with pytest.raises(llm2slm_export.errors.BundleError) as caught:
        llm2slm_export.load(bundle)
    failure = refusal(driver, "open", bundle=str(bundle), pair=9)
    assert failure.code == BUNDLE
    assert evidence_of(failure) == list(caught.value.evidence)
    assert "cache.state.3: is not that of a decoder" in failure.message
