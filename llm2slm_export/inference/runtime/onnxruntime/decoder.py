"""Decoder calls on ONNX Runtime. The KV cache is updated in place on the device: present is bound to past.

A step allocates nothing outside ONNX Runtime: ids and the rows' lengths are written into bound tensors, and logits are read
from one. Tensors are bound anew when the number of rows or of new tokens changes, and when the cache grows.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.contract import (
    CONTEXT_AXIS,
    ENCODER_ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    PAST_LENGTH,
    PROMPT_EMBEDS,
    StateSpec,
)
from llm2slm_export.inference.runtime.backend import Conditioning, Ids, Logits, rewound
from llm2slm_export.inference.runtime.forks import keep_in_children
from llm2slm_export.inference.runtime.onnxruntime.device_tensors import Memory
from llm2slm_export.inference.runtime.onnxruntime.sessions import GraphSessions


class OrtState:
    """A decoder's state: the tensors bound to its next call.

    Args:
        binding: an IOBinding of the decoder session.
        attention_mask: the conditioning's mask, [batch, context].
    """

    def __init__(self, binding: Any, attention_mask: Ids) -> None:
        self.binding, self.attention_mask = binding, attention_mask
        # [batch]: the row of the conditioning of each row of the state.
        self.sources: Ids = np.arange(len(attention_mask))
        # [batch]: each row's occupied positions of the cache.
        self.lengths: Ids = np.zeros(len(attention_mask), np.int64)
        self.capacity = 0  # all positions of the cache
        # The bound values by input name. A value made from an array borrows its memory, and not every release's binding
        # keeps the array alive.
        self.bound: dict[str, Any] = {}
        self.logits: Array = np.zeros((0, 0, 0), np.float32)
        keep_in_children(self)

    def bind(self, name: str, value: Any) -> None:
        """Bind an input for the next calls."""
        self.binding.bind_ortvalue_input(name, value)
        self.bound[name] = value


class OrtDecoder:
    """The calls of the decoder's session.

    Args:
        sessions: the sessions, with the decoder open when it is called.
        memory: the operations on tensors of the sessions' device.
        run_options: RunOptions of each call; None: ONNX Runtime's defaults.
        state: the class of new states.
    """

    def __init__(
        self, sessions: GraphSessions, memory: Memory, *, run_options: Any = None, state: type[OrtState] = OrtState
    ) -> None:
        self._sessions, self._memory, self._run_options, self._new_state = sessions, memory, run_options, state
        self._manifest = sessions.manifest

    @property
    def is_decoder_only(self) -> bool:
        """Whether the SLM is decoder-only."""
        return self._manifest.shape.slm_kind == "decoder-only"

    def prefill(self, conditioning: Conditioning) -> tuple[OrtState, Logits]:
        """The first decoder call: the start token (encoder-decoder) or the prompt embeddings (decoder-only)."""
        batch = len(conditioning.attention_mask)
        state = self._new_state(self._binding(), conditioning.attention_mask)
        for name, value in conditioning.tensors.items():
            state.bind(name, value)
        if self.is_decoder_only:
            context = conditioning.attention_mask.sum(axis=1)
            state.bind(LOGITS_TO_KEEP, self._value(context[:, None] - 1))
            # The call writes the padding too.
            self._make_room(state, conditioning.attention_mask.shape[1])
            logits = self._decode(state, np.zeros((batch, 0), np.int64), context)
            state.bind(PROMPT_EMBEDS, self._no_embeds(batch))
            return state, logits[:, 0]
        state.bind(ENCODER_ATTENTION_MASK, self._value(conditioning.attention_mask))
        start = self._manifest.special_ids.decoder_start
        return state, self.step(state, np.full((batch, 1), start, np.int64))[:, 0]

    def step(self, state: OrtState, input_ids: Ids) -> Logits:
        """One decoder call on ids [batch, sequence_length].

        Returns:
            Logits [batch, sequence_length, vocab_size], valid until the state's next call.
        """
        batch, count = input_ids.shape
        if self.is_decoder_only and not self._keeps(state, input_ids):
            state.bind(LOGITS_TO_KEEP, self._value(np.tile(np.arange(count), (batch, 1))))
        return self._decode(state, input_ids, np.full(batch, count))

    def rewind(self, state: OrtState, lengths: Ids) -> None:
        """Set every row's number of cache positions back to `lengths` [rows].

        Raises:
            ValueError: a row is shorter than its length in `lengths`.
        """
        state.lengths = rewound(state.lengths, lengths)

    def select(self, state: OrtState, rows: Ids) -> None:
        """Select rows of the state. Unchanged tensors are not copied: when beams are reordered, only the cache changes."""
        self._sessions.require_home()
        if np.array_equal(rows, np.arange(len(state.sources))):
            return
        for kind in self._manifest.cache.kinds:
            values = (state.bound[spec.past.name] for spec in kind)
            for spec, value in zip(kind, self._memory.take(values, rows), strict=True):
                self._bind_cache(state, spec, value)
        state.lengths = state.lengths[rows]
        sources = state.sources[rows]
        if not np.array_equal(sources, state.sources):
            state.attention_mask = state.attention_mask[rows]
            if self.is_decoder_only:
                state.bind(PROMPT_EMBEDS, self._no_embeds(len(rows)))
            else:
                names = self._sessions.outputs["projector"]
                crossed = (state.bound[name] for name in names)
                for name, value in zip(names, self._memory.take(crossed, rows), strict=True):
                    state.bind(name, value)
                state.bind(ENCODER_ATTENTION_MASK, self._value(state.attention_mask))
        state.sources = sources

    def join(self, state: OrtState, other: OrtState) -> None:
        """Append the rows of `other` behind those of `state`. `other` cannot be used afterwards.

        The cache is cut to what the longest row needs, and the conditioning to the longest prompt.
        """
        self._sessions.require_home()
        longest = int(max(state.lengths.max(), other.lengths.max()))
        capacity = capacity_for(longest + 1)
        for kind in self._manifest.cache.kinds:
            own = (state.bound[spec.past.name] for spec in kind)
            new = (other.bound[spec.past.name] for spec in kind)
            for spec, value in zip(kind, self._memory.join(own, new, kind[0].growing_axis, capacity), strict=True):
                self._bind_cache(state, spec, value)
        state.capacity = capacity
        context = max(int(of.attention_mask.sum(axis=1).max()) for of in (state, other))
        state.attention_mask = np.concatenate([padded_mask(of.attention_mask, context) for of in (state, other)])
        state.sources = np.concatenate([state.sources, other.sources + state.sources.max() + 1])
        state.lengths = np.concatenate([state.lengths, other.lengths])
        if self.is_decoder_only:
            state.bind(PROMPT_EMBEDS, self._no_embeds(len(state.sources)))
            return
        names = self._sessions.outputs["projector"]
        own, new = (state.bound[name] for name in names), (other.bound[name] for name in names)
        for name, value in zip(names, self._memory.join(own, new, CONTEXT_AXIS, context), strict=True):
            state.bind(name, value)
        state.bind(ENCODER_ATTENTION_MASK, self._value(state.attention_mask))

    def rebind(self, state: OrtState, cache: Mapping[str, Any], conditioning: Iterable[Any]) -> None:
        """Bind a state to other tensors, with a new IOBinding.

        Args:
            cache: the tensors of the cache by the name of the past; `state.capacity` is their capacity.
            conditioning: the projector's outputs of an encoder-decoder SLM, in order; ignored for a decoder-only SLM.
        """
        state.binding = self._binding()
        state.bound.clear()
        for spec in self._manifest.cache.state:
            self._bind_cache(state, spec, cache[spec.past.name])
        if self.is_decoder_only:
            state.bind(PROMPT_EMBEDS, self._no_embeds(len(state.sources)))
        else:
            for name, value in zip(self._sessions.outputs["projector"], conditioning, strict=True):
                state.bind(name, value)
            state.bind(ENCODER_ATTENTION_MASK, self._value(state.attention_mask))

    def _binding(self) -> Any:
        return self._sessions.get("decoder").io_binding()

    def _keeps(self, state: OrtState, input_ids: Ids) -> bool:
        """Whether the last call returned the logits of ids [batch, sequence_length] of the same shape."""
        kept, before = state.bound.get(LOGITS_TO_KEEP), state.bound.get(INPUT_IDS)
        return kept is not None and before is not None and kept.shape() == before.shape() == list(input_ids.shape)

    def _decode(self, state: OrtState, input_ids: Ids, counts: Ids) -> Logits:
        """One decoder call on the bound prompt embeddings and ids [batch, sequence_length].

        Args:
            counts: [batch], each row's number of positions in the call. Positions behind them are padding.

        Returns:
            Logits [batch, num_logits, vocab_size].
        """
        self._make_room(state, int((state.lengths + counts).max()))
        self._feed(state, input_ids)
        with self._sessions.described_failures("decoder", *input_ids.shape):
            self._sessions.get("decoder").run_with_iobinding(state.binding, self._run_options)
        state.lengths = state.lengths + counts
        return state.logits

    def _make_room(self, state: OrtState, needed: int) -> None:
        """Ensure room in the cache for this many positions of each row.

        Unwritten positions are zeros: attention multiplies them by 0, and 0 times NaN or infinity is NaN.
        """
        if needed <= state.capacity:
            return
        state.capacity = capacity_for(needed)
        sizes = {"batch": len(state.sources), "capacity": state.capacity}
        held = int(state.lengths.max())
        for kind in self._manifest.cache.kinds:
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in kind[0].past.axes]
            values = (state.bound.get(spec.past.name) for spec in kind)
            for spec, value in zip(kind, self._memory.grow(values, kind[0], shape, held), strict=True):
                self._bind_cache(state, spec, value)

    def _bind_cache(self, state: OrtState, spec: StateSpec, value: Any) -> None:
        """Bind a tensor of the cache as past and, in place, as present."""
        state.bind(spec.past.name, value)
        state.binding.bind_ortvalue_output(spec.present.name, value)

    def _feed(self, state: OrtState, input_ids: Ids) -> None:
        """Write ids [batch, sequence_length] and the rows' lengths to the bound tensors, or bind new ones for a new shape."""
        ids = np.array(input_ids, np.int64)
        before = state.bound.get(INPUT_IDS)
        if before is not None and before.shape() == list(ids.shape):
            before.update_inplace(ids)
            state.bound[PAST_LENGTH].update_inplace(state.lengths)
            return
        state.bind(INPUT_IDS, self._value(ids))
        state.bind(PAST_LENGTH, self._value(state.lengths.copy()))
        batch, new = ids.shape
        # The prompt pass of a decoder-only SLM has no ids, and returns the logits of one position.
        state.logits = np.zeros((batch, new or 1, self._manifest.shape.vocab_size), np.float32)
        import onnxruntime

        state.binding.bind_ortvalue_output(LOGITS, onnxruntime.OrtValue.ortvalue_from_numpy(state.logits))

    def _value(self, array: Array) -> Any:
        return self._memory.put(array)

    def _no_embeds(self, batch: int) -> Any:
        """The empty prompt embeddings [batch, 0, hidden_size] of a step."""
        dtype = next(t.dtype for t in self._manifest.graphs["decoder"].inputs if t.name == PROMPT_EMBEDS)
        return self._value(np.zeros((batch, 0, self._manifest.shape.hidden_size), dtype))


def padded_mask(mask: Ids, context: int) -> Ids:
    """The mask [rows, context]: `mask` [rows, positions] cut to `context`, or padded with 0."""
    return np.pad(mask[:, :context], ((0, 0), (0, max(context - mask.shape[1], 0))))


def capacity_for(needed: int) -> int:
    """The capacity of a cache that needs this many positions.

    A step reads the whole capacity, and growing copies the cache. Growth by a sixteenth to an eighth reads 5 % too much on
    average and copies a position about a dozen times, while every step reads it.
    """
    step = 1 << max(5, needed.bit_length() - 4)
    return -(-needed // step) * step
