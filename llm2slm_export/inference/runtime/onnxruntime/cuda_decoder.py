"""Decoder calls on a CUDA device. The KV cache is created, grown and gathered on the device.

A step of one token runs on tensors at fixed addresses (`cuda_graphs.py`) and is replayed as a CUDA graph: launching a small
SLM's kernels one by one takes longer than running them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm2slm_export.contract import CONTEXT_AXIS, ENCODER_ATTENTION_MASK, INPUT_IDS, PAST_LENGTH
from llm2slm_export.inference.runtime.backend import Conditioning, Ids, Logits
from llm2slm_export.inference.runtime.forks import ForkSafeLock
from llm2slm_export.inference.runtime.onnxruntime.cuda_graphs import (
    BorrowedStep,
    CapturedStep,
    StepPool,
    StepShape,
    run_options,
)
from llm2slm_export.inference.runtime.onnxruntime.cuda_memory_errors import is_out_of_memory, memory_failures
from llm2slm_export.inference.runtime.onnxruntime.cuda_sessions import CudaSessions
from llm2slm_export.inference.runtime.onnxruntime.decoder import OrtDecoder, OrtState, padded_mask
from llm2slm_export.inference.runtime.onnxruntime.device_tensors import DeviceTensors, padded_positions

# Lengths are rounded up to few shapes: reading the padding costs less than capturing another graph.
CONTEXT_STEP = 64  # context positions of an encoder-decoder SLM are padded to a multiple of it
LEAST_CAPACITY = 128  # positions of the smallest cache; doubled as needed
MAX_UNUSED_STEPS = 16  # each holds a cache


class CudaState(OrtState):
    """A decoder's state. While it has borrowed a step, its cache is the step's, and `bound` is not used.

    Args:
        binding, attention_mask: as `OrtState`.
    """

    borrowed: BorrowedStep | None = None

    def __init__(self, binding: Any, attention_mask: Ids) -> None:
        super().__init__(binding, attention_mask)
        # The borrowed step's row of each row of the state. Dropped rows keep running until they are half of the step.
        self.rows: Ids = np.arange(len(attention_mask))
        self.conditioned = object()  # identifies the conditioning


class CudaDecoder:
    """The calls of the decoder's session. Those of one token per row run on a captured step.

    Args:
        sessions: the sessions, with the decoder open when it is called.
        memory: the tensors of the sessions' device.

    Attributes:
        pool: the unused steps.
    """

    def __init__(self, sessions: CudaSessions, memory: DeviceTensors) -> None:
        self._sessions, self._memory, self._manifest = sessions, memory, sessions.manifest
        self._calls = OrtDecoder(sessions, memory, run_options=run_options(None), state=CudaState)
        self.pool = StepPool(MAX_UNUSED_STEPS, sessions.release_graph)
        # One decoder call at a time: a captured graph's intermediate tensors are in memory that its session considers free.
        self._lock = ForkSafeLock()

    def prefill(self, conditioning: Conditioning) -> tuple[OrtState, Logits]:
        """The first decoder call. It is not captured, because its shape is rarely repeated."""
        with self._lock, self._sessions.described_out_of_memory("decoder", conditioning.attention_mask.shape):
            return self._calls.prefill(conditioning)

    def step(self, state: OrtState, input_ids: Ids) -> Logits:
        """One decoder call on ids [rows, sequence_length]: logits [rows, sequence_length, vocab_size].

        With one token per row it is replayed as a CUDA graph.
        """
        assert isinstance(state, CudaState)
        longest = int(state.lengths.max())
        with self._lock, self._sessions.described_out_of_memory("decoder", (len(state.sources), longest)):
            if input_ids.shape[1] != 1:
                self._leave_step(state)
                return self._calls.step(state, input_ids)
            if state.borrowed is None or longest == state.borrowed.step.shape.capacity:
                self._move_to_step(state, np.arange(len(state.sources)), new=1)
            return self._run_step(state, input_ids)

    def rewind(self, state: OrtState, lengths: Ids) -> None:
        """Set every row's number of cache positions back to `lengths` [rows].

        Raises:
            ValueError: a row is shorter than its length in `lengths`.
        """
        self._calls.rewind(state, lengths)

    def select(self, state: OrtState, rows: Ids) -> None:
        """Select rows of the state. Rows dropped from a borrowed step keep running until they are half of it."""
        assert isinstance(state, CudaState)
        self._sessions.require_home()
        if state.borrowed is None:
            self._calls.select(state, rows)
            state.rows = np.arange(len(rows))
            return
        if np.array_equal(rows, np.arange(len(state.sources))):
            return
        lengths = state.lengths[rows]
        with self._sessions.described_out_of_memory("decoder", (len(rows), int(lengths.max()))):
            dropped = bool((np.diff(rows) > 0).all()) and 2 * len(rows) > state.borrowed.step.shape.batch
            sources = state.sources[rows]
            if not np.array_equal(sources, state.sources):
                state.attention_mask = state.attention_mask[rows]
            state.sources = sources
            if dropped:
                state.rows = state.rows[rows]
            else:
                self._move_to_step(state, rows, new=0)
            state.lengths = lengths

    def join(self, state: OrtState, other: OrtState) -> None:
        """Append the rows of `other` behind those of `state`. `other` cannot be used afterwards.

        Both leave their borrowed steps. The next call of one token borrows another one.
        """
        assert isinstance(state, CudaState)
        assert isinstance(other, CudaState)
        self._sessions.require_home()
        rows, longest = len(state.sources) + len(other.sources), int(max(state.lengths.max(), other.lengths.max()))
        with self._lock, self._sessions.described_out_of_memory("decoder", (rows, longest)):
            for one in (state, other):
                self._leave_step(one)
            self._calls.join(state, other)
            # A step that holds the conditioning of `state` alone does not hold the joined one.
            state.rows, state.conditioned = np.arange(rows), object()
            other.binding = None
            other.bound.clear()

    def _run_step(self, state: CudaState, input_ids: Ids) -> Logits:
        """One token per row on the borrowed step: logits [rows, 1, vocab_size]."""
        assert state.borrowed is not None
        step = state.borrowed.step
        # A dropped row writes the first position, which is always within the cache.
        ids, lengths = np.zeros((step.shape.batch, 1), np.int64), np.zeros(step.shape.batch, np.int64)
        ids[state.rows], lengths[state.rows] = input_ids, state.lengths
        step.inputs[INPUT_IDS].update_inplace(ids)
        step.inputs[PAST_LENGTH].update_inplace(lengths)
        try:
            step.run(captured=self._sessions.captures)
        except memory_failures() as error:
            if not self._sessions.captures or step.runs or is_out_of_memory(error):
                raise
            self.pool.clear()
            self._sessions.disable_graphs(error)
            step.bind(self._sessions.get("decoder"), self._aliases)
            step.run(captured=False)
        state.lengths = state.lengths + 1
        logits: Logits = step.read()[state.rows]
        return logits

    def _move_to_step(self, state: CudaState, rows: Ids, *, new: int) -> None:
        """Move rows of the state to a borrowed step with room for `new` more positions."""
        longest = int(state.lengths[rows].max())
        context = 0 if self._calls.is_decoder_only else _rounded(state.attention_mask.shape[1], CONTEXT_STEP)
        shape = StepShape(len(rows), context, fixed_capacity(longest + new))
        holds = state.conditioned, state.sources.tobytes()
        borrowed = self.pool.borrow(shape, holds) or self._new_step(shape)
        before = state.borrowed.step.inputs if state.borrowed is not None else state.bound
        picked = state.rows[rows] if state.borrowed is not None else rows
        positions = padded_positions(longest, shape.capacity)
        for kind in self._manifest.cache.kinds:
            names = [spec.past.name for spec in kind]
            self._gather(before, names, picked, (kind[0].growing_axis, positions), borrowed.step)
        if not self._calls.is_decoder_only and borrowed.step.holds != holds:
            crossed = self._sessions.outputs["projector"]
            held = before[crossed[0]].shape()[CONTEXT_AXIS]
            self._gather(before, crossed, picked, (CONTEXT_AXIS, padded_positions(held, context)), borrowed.step)
            borrowed.step.inputs[ENCODER_ATTENTION_MASK].update_inplace(padded_mask(state.attention_mask, context))
            borrowed.step.holds = holds
        if state.borrowed is None:
            # The bound tensors have been copied, so they can be released.
            state.binding = None
            state.bound.clear()
        state.borrowed, state.rows, state.capacity = borrowed, np.arange(len(rows)), shape.capacity

    def _new_step(self, shape: StepShape) -> BorrowedStep:
        """A new step. If memory is short, unused steps are released first."""
        try:
            return self.pool.lend(self._create_step(shape))
        except memory_failures() as error:
            if not is_out_of_memory(error):
                raise
            self.pool.clear()
            return self.pool.lend(self._create_step(shape))

    def _leave_step(self, state: CudaState) -> None:
        """Copy the state from its borrowed step to tensors bound for calls of any shape, and return the step."""
        if state.borrowed is None:
            return
        before, borrowed = state.borrowed.step.inputs, state.borrowed
        cache = {
            spec.past.name: value
            for kind in self._manifest.cache.kinds
            for spec, value in zip(
                kind, self._memory.take([before[spec.past.name] for spec in kind], state.rows), strict=True
            )
        }
        conditioning: list[Any] = []
        if not self._calls.is_decoder_only:
            names, positions = self._sessions.outputs["projector"], np.arange(state.attention_mask.shape[1])
            conditioning = self._memory.gathered(
                [before[name] for name in names], state.rows, (CONTEXT_AXIS, positions)
            )
        self._calls.rebind(state, cache, conditioning)
        state.borrowed, state.rows = None, np.arange(len(state.rows))
        borrowed.give_back()

    def _gather(
        self, before: Mapping[str, Any], names: Sequence[str], rows: Ids, positions: tuple[int, Ids], to: CapturedStep
    ) -> None:
        self._memory.gathered(
            [before[name] for name in names], rows, positions, into=[to.inputs[name] for name in names]
        )

    def _create_step(self, shape: StepShape) -> CapturedStep:
        """A step with bound tensors. Its cache and conditioning are not written yet."""
        memory = self._memory
        sizes = {
            "batch": shape.batch, "context": shape.context, "capacity": shape.capacity, "sequence_length": 1, "num_logits": 1, "embeds_length": 0,
        }  # fmt: skip
        inputs: dict[str, Any] = {}
        for spec in self._manifest.graphs["decoder"].inputs:
            sized = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes]
            integers = spec.dtype == "int64" or 0 in sized
            inputs[spec.name] = memory.put(np.zeros(sized, spec.dtype)) if integers else memory.empty(sized, spec.dtype)
        logits = memory.empty([shape.batch, 1, self._manifest.shape.vocab_size], "float32")
        step = CapturedStep(shape, inputs, logits, self.pool.number())
        step.bind(self._sessions.get("decoder"), self._aliases)
        return step

    @property
    def _aliases(self) -> dict[str, str]:
        """The input that shares memory with each output of the cache, by output name."""
        return {state.present.name: state.past.name for state in self._manifest.cache.state}


def fixed_capacity(needed: int) -> int:
    """The capacity of a step that needs this many positions: powers of two from `LEAST_CAPACITY` on."""
    return max(LEAST_CAPACITY, 1 << (needed - 1).bit_length())


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step
