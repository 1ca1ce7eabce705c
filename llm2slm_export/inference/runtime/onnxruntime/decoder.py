"""Decoder calls on ONNX Runtime. The KV cache is updated in place on the device: present is bound to past.

A step allocates nothing outside ONNX Runtime: ids and the past's length are written into bound tensors, and logits are read
from one. Tensors are bound anew when the number of rows or of new tokens changes, and when the cache grows.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.contract import (
    ATTENTION_MASK,
    ENCODER_ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    PAST_LENGTH,
    PROMPT_EMBEDS,
    StateSpec,
)
from llm2slm_export.inference.runtime.backend import Conditioning, Ids, Logits
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
        # Occupied positions of the cache, and all positions.
        self.length = self.capacity = 0
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
        batch, context = conditioning.attention_mask.shape
        state = self._new_state(self._binding(), conditioning.attention_mask)
        for name, value in conditioning.tensors.items():
            state.bind(name, value)
        if self.is_decoder_only:
            state.bind(LOGITS_TO_KEEP, self._value(np.array([context - 1])))
            logits = self._decode(state, np.zeros((batch, 0), np.int64), embedded=context)
            self._bind_step_inputs(state)
            return state, logits
        state.bind(ENCODER_ATTENTION_MASK, self._value(conditioning.attention_mask))
        start = self._manifest.special_ids.decoder_start
        return state, self._decode(state, np.full((batch, 1), start, np.int64))

    def step(self, state: OrtState, input_ids: Ids) -> Logits:
        """One decoder call on ids [batch, sequence_length].

        Returns:
            Logits [batch, vocab_size] of the last position, valid until the state's next call.
        """
        if self.is_decoder_only:
            state.bound[LOGITS_TO_KEEP].update_inplace(np.array([input_ids.shape[1] - 1]))
        return self._decode(state, input_ids)

    def select(self, state: OrtState, rows: Ids) -> None:
        """Select rows of the state. Unchanged tensors are not copied: when beams are reordered, only the cache changes."""
        self._sessions.require_home()
        if np.array_equal(rows, np.arange(len(state.sources))):
            return
        values = (state.bound[spec.past.name] for spec in self._manifest.cache.state)
        for spec, value in zip(self._manifest.cache.state, self._memory.take(values, rows), strict=True):
            self._bind_cache(state, spec, value)
        sources = state.sources[rows]
        if not np.array_equal(sources, state.sources):
            state.attention_mask = state.attention_mask[rows]
            if self.is_decoder_only:
                state.bind(ATTENTION_MASK, self._value(self._cache_mask(state)))
                state.bind(PROMPT_EMBEDS, self._no_embeds(len(rows)))
            else:
                names = self._sessions.outputs["projector"]
                crossed = (state.bound[name] for name in names)
                for name, value in zip(names, self._memory.take(crossed, rows), strict=True):
                    state.bind(name, value)
                state.bind(ENCODER_ATTENTION_MASK, self._value(state.attention_mask))
        state.sources = sources

    def rebind(self, state: OrtState, cache: Iterable[Any], conditioning: Iterable[Any]) -> None:
        """Bind a state to other tensors, with a new IOBinding.

        Args:
            cache: the tensors of the cache, in the manifest's order; `state.capacity` is their capacity.
            conditioning: the projector's outputs of an encoder-decoder SLM, in order; ignored for a decoder-only SLM.
        """
        state.binding = self._binding()
        state.bound.clear()
        for spec, value in zip(self._manifest.cache.state, cache, strict=True):
            self._bind_cache(state, spec, value)
        if self.is_decoder_only:
            state.bind(ATTENTION_MASK, self._value(self._cache_mask(state)))
            self._bind_step_inputs(state)
        else:
            for name, value in zip(self._sessions.outputs["projector"], conditioning, strict=True):
                state.bind(name, value)
            state.bind(ENCODER_ATTENTION_MASK, self._value(state.attention_mask))

    def _binding(self) -> Any:
        return self._sessions.get("decoder").io_binding()

    def _bind_step_inputs(self, state: OrtState) -> None:
        """Bind the inputs of a decoder-only SLM's steps: no prompt embeddings, and the logits of the first id."""
        state.bind(PROMPT_EMBEDS, self._no_embeds(len(state.attention_mask)))
        state.bind(LOGITS_TO_KEEP, self._value(np.array([0])))

    def _decode(self, state: OrtState, input_ids: Ids, *, embedded: int = 0) -> Logits:
        """One decoder call on `embedded` prompt embeddings and ids [batch, sequence_length]: logits [batch, vocab_size]."""
        self._make_room(state, embedded + input_ids.shape[1])
        self._feed(state, input_ids)
        with self._sessions.described_failures("decoder", *input_ids.shape):
            self._sessions.get("decoder").run_with_iobinding(state.binding, self._run_options)
        state.length += embedded + input_ids.shape[1]
        return state.logits[:, -1]

    def _make_room(self, state: OrtState, count: int) -> None:
        """Ensure room in the cache for `count` more positions.

        Unwritten positions are zeros: attention multiplies them by 0, and 0 times NaN or infinity is NaN.
        """
        needed = state.length + count
        if needed <= state.capacity:
            return
        state.capacity = capacity_for(needed)
        specs = self._manifest.cache.state
        sizes = {"batch": len(state.sources), "capacity": state.capacity}
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in specs[0].past.axes]
        values = (state.bound.get(spec.past.name) for spec in specs)
        for spec, value in zip(specs, self._memory.grow(values, specs[0].past, shape, state.length), strict=True):
            self._bind_cache(state, spec, value)
        if self.is_decoder_only:
            state.bind(ATTENTION_MASK, self._value(self._cache_mask(state)))

    def _bind_cache(self, state: OrtState, spec: StateSpec, value: Any) -> None:
        """Bind a tensor of the cache as past and, in place, as present."""
        state.bind(spec.past.name, value)
        state.binding.bind_ortvalue_output(spec.present.name, value)

    def _cache_mask(self, state: OrtState) -> Ids:
        """The mask [batch, capacity] of a decoder-only SLM: 0 for padding, 1 for all other positions."""
        batch, context = state.attention_mask.shape
        rest = np.ones((batch, state.capacity - context), np.int64)
        return np.concatenate([state.attention_mask, rest], axis=1)

    def _feed(self, state: OrtState, input_ids: Ids) -> None:
        """Write ids [batch, sequence_length] and the past's length to the bound tensors, or bind new ones for a new shape."""
        ids = np.array(input_ids, np.int64)
        before = state.bound.get(INPUT_IDS)
        if before is not None and before.shape() == list(ids.shape):
            before.update_inplace(ids)
            state.bound[PAST_LENGTH].update_inplace(np.array([state.length]))
            return
        state.bind(INPUT_IDS, self._value(ids))
        state.bind(PAST_LENGTH, self._value(np.array([state.length])))
        batch, new = ids.shape
        state.logits = np.zeros(
            (batch, 1 if self.is_decoder_only else new, self._manifest.shape.vocab_size), np.float32
        )
        import onnxruntime

        state.binding.bind_ortvalue_output(LOGITS, onnxruntime.OrtValue.ortvalue_from_numpy(state.logits))

    def _value(self, array: Array) -> Any:
        return self._memory.put(array)

    def _no_embeds(self, batch: int) -> Any:
        """The empty prompt embeddings [batch, 0, hidden_size] of a step."""
        dtype = next(t.dtype for t in self._manifest.graphs["decoder"].inputs if t.name == PROMPT_EMBEDS)
        return self._value(np.zeros((batch, 0, self._manifest.shape.hidden_size), dtype))


def capacity_for(needed: int) -> int:
    """The capacity of a cache that needs this many positions.

    A step reads the whole capacity, and growing copies the cache. Growth by a sixteenth to an eighth reads 5 % too much on
    average and copies a position about a dozen times, while every step reads it.
    """
    step = 1 << max(5, needed.bit_length() - 4)
    return -(-needed // step) * step
