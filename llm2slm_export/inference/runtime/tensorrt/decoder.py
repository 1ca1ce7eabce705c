"""The decoder on a TensorRT engine: its KV cache on the device, and steps that are replayed as CUDA graphs.

Each row of a state occupies a slot of its buffers. A step runs a power of two of slots, occupied or not. A finished row leaves
its slot idle, and rows only move when half of the slots are idle. Repeated rows (beams) and the rows of a state that joins are
copied to idle slots; all others stay in place. Shapes and addresses therefore rarely change, and one captured graph covers a
step of one token: copy the ids in, run the engine, copy the logits out (in a greedy step: the id with the highest logit).
A step of several tokens, which verifies a draft, is one call that is not captured.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import EngineLimits
from llm2slm_export.contract import (
    ARGMAX_IDS,
    CONTEXT_AXIS,
    ENCODER_ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    MAX_LOGITS,
    PAST_LENGTH,
    PROMPT_EMBEDS,
)
from llm2slm_export.errors import BundleError, DeviceError, PromptError, UsageError
from llm2slm_export.inference.runtime.backend import Ids, Logits, rewound
from llm2slm_export.inference.runtime.tensorrt.buffers import BufferLease, BuffersPool, DecoderBuffers
from llm2slm_export.inference.runtime.tensorrt.dtypes import item_bytes
from llm2slm_export.inference.runtime.tensorrt.engine import Bound, Engine, EngineContext, shapes_of
from llm2slm_export.inference.runtime.tensorrt.memory import DeviceTensor, MemoryPool

_BUCKET = 64  # context positions are padded to a multiple of it, so that prompts share buffers
_EMPTY = -1
_FEWER = "run fewer rows at a time (--batch-size)"


class EngineState:
    """A decoder's state: its buffers, and the slot of each row.

    Args:
        tensors: the conditioning on the device.
        attention_mask: the conditioning's mask, [prompts, context].
    """

    def __init__(self, lease: BufferLease, tensors: Mapping[str, DeviceTensor], attention_mask: Ids) -> None:
        count = len(attention_mask)
        self.lease, self.tensors, self.attention_mask = lease, tensors, attention_mask
        # [rows]: the slot of each row, and its row of the conditioning.
        self.slots: Ids = np.arange(count)
        self.sources: Ids = np.arange(count)
        # [slots]: the row of the conditioning in each slot.
        self.held: Ids = np.full(lease.buffers.rows, _EMPTY)
        self.width = lease.buffers.rows  # slots that a step runs
        self.lengths: Ids = np.zeros(count, np.int64)  # [rows]: each row's occupied positions of the cache
        self.parity = 0  # index of the current cache, if there are two

    @property
    def buffers(self) -> DecoderBuffers:
        return self.lease.buffers

    @property
    def longest(self) -> int:
        """The occupied positions of the longest row."""
        return int(self.lengths.max())

    def join_conditioning(self, other: "EngineState", tensors: Mapping[str, DeviceTensor], context: int) -> None:
        """Replace the conditioning by the rows in use of this state's, then of another state's, and number `sources` anew.

        Rows that no row of a state uses are left out, so that a state that rows join and leave does not grow.

        Args:
            tensors: the joined conditioning on the device.
            context: its context positions.
        """
        kept, self.sources = np.unique(self.sources, return_inverse=True)
        added, sources = np.unique(other.sources, return_inverse=True)
        other.sources = sources + len(kept)
        numbers = np.full(len(self.attention_mask) + 1, _EMPTY)  # the last entry is for `_EMPTY` itself
        numbers[kept] = np.arange(len(kept))
        self.held = numbers[self.held]
        masks = (self.attention_mask[kept], other.attention_mask[added])
        self.attention_mask = np.concatenate([_padded(mask, context) for mask in masks])
        self.tensors = tensors


class EngineDecoder:
    """Runs decoder calls on an engine.

    Args:
        limits: the limits of the engine's set.

    Raises:
        BundleError: the engine aliases other tensors than the cache's.
    """

    def __init__(self, engine: Engine, memory: MemoryPool, bundle: Bundle, limits: EngineLimits) -> None:
        manifest = bundle.manifest
        self._engine, self._memory, self._limits = engine, memory, limits
        self._shape, self._state = manifest.shape, manifest.cache.state
        self._start = manifest.special_ids.decoder_start
        self._is_decoder_only = manifest.shape.slm_kind == "decoder-only"
        self._past_of = {part.present.name: part.past.name for part in self._state}
        self._in_place = bool(engine.entry.aliases)
        if self._in_place and dict(engine.entry.aliases) != self._past_of:
            wrong = {name for name, past in self._past_of.items() if engine.entry.aliases.get(name) != past}
            raise BundleError(
                f"{engine.entry.file} does not update all of the cache in place.",
                *(f"{name}: over {engine.entry.aliases.get(name)}, needs {self._past_of[name]}" for name in sorted(wrong)),
                remedy="build the engines again",
            )  # fmt: skip
        self._pool = BuffersPool(memory, engine.entry, self._state, capacity=limits.capacity)
        self._conditioned = tuple(t.name for t in engine.entry.inputs if ".encoder." in t.name)
        self._types = {tensor.name: tensor.dtype for tensor in engine.entry.inputs}
        # The most tokens of a call: 1 if no profile is for the logits of several.
        counted = LOGITS_TO_KEEP if self._is_decoder_only else INPUT_IDS
        bounds = (profile[counted].maximum[1] for profile in engine.entry.profiles if counted in profile)
        self._call_tokens = max(bounds, default=1)
        self.uncaptured = False  # whether the capture of a step was refused

    def prefill(self, tensors: Mapping[str, DeviceTensor], attention_mask: Ids) -> tuple[EngineState, Logits]:
        """The first call, on a conditioning.

        Args:
            tensors: the conditioning's tensors.
            attention_mask: its mask, [batch, context].

        Returns:
            The decoder's state, and logits [batch, vocab_size] of the first new token.
        """
        batch, context = attention_mask.shape
        self._check_rows(batch)
        self._check_memory(context)
        self._check_room(context + 1 if self._is_decoder_only else 1)
        lease = self._pool.lease(self._width(batch), 0 if self._is_decoder_only else self._bucket(context))
        state = EngineState(lease, self._in_type(tensors), attention_mask)
        self._write_conditioning(state, state.slots, state.sources)
        if self._is_decoder_only:
            return state, self._prompt_pass(state)
        return state, self._call(state, np.full((batch, 1), self._start, np.int64))[:, 0]

    def step(self, state: EngineState, input_ids: Ids) -> Logits:
        """Calls on ids [rows, sequence_length]: logits [rows, sequence_length, vocab_size].

        It is one call if the engine has room for as many tokens, otherwise several.
        """
        count, most = input_ids.shape[1], self._call_tokens
        self._check_room(state.longest + count)
        if 1 <= count <= most:
            return self._call(state, input_ids)
        logits: Logits = np.empty((*input_ids.shape, self._shape.vocab_size), np.float32)
        for first in range(0, count, most):
            logits[:, first : first + most] = self._call(state, input_ids[:, first : first + most])
        return logits

    def rewind(self, state: EngineState, lengths: Ids) -> None:
        """Set every row's number of cache positions back to `lengths` [rows].

        Raises:
            ValueError: a row is shorter than its length in `lengths`.
        """
        state.lengths = rewound(state.lengths, lengths)

    def step_argmax(self, state: EngineState, input_ids: Ids) -> tuple[Ids, Logits]:
        """One call on ids [batch, 1]: the ids [batch] with the highest logit, and these logits [batch]."""
        self._check_room(state.longest + 1)
        self._one_token(state, input_ids, greedy=True)
        return state.buffers.argmax_ids[state.slots, 0], state.buffers.max_logits[state.slots, 0]

    def select(self, state: EngineState, rows: Ids) -> None:
        """Select rows. Rows that keep their slot are not copied; the others are copied on the device."""
        if np.array_equal(rows, np.arange(len(state.slots))):
            return
        self._check_rows(len(rows))
        slots, sources, width = state.slots[rows], state.sources[rows], self._width(len(rows))
        if width > state.buffers.rows:
            self._move_to_buffers(state, slots, sources, self._pool.lease(width, state.buffers.positions))
            state.lengths = state.lengths[rows]
            return
        targets = _assigned(slots, sources, state.held[:width])
        moved = np.flatnonzero(targets != slots)
        self._copy_cache(state, state.buffers, targets[moved], slots[moved], parity=state.parity)
        others = moved[state.held[targets[moved]] != sources[moved]]
        state.slots, state.sources, state.width, state.lengths = targets, sources, width, state.lengths[rows]
        if len(others):
            self._write_conditioning(state, targets[others], sources[others])

    def join(self, state: EngineState, other: EngineState) -> None:
        """Append the rows of `other` behind those of `state`. `other` cannot be used afterwards.

        The rows of `state` stay in their slots if all rows fit into its buffers.

        Raises:
            UsageError: the rows are more than the engine accepts. Both states are as before.
            DeviceError: there is too little memory. Both states are as before.
        """
        count = len(state.slots) + len(other.slots)
        self._check_rows(count)
        width, context = self._width(count), _joined_context(state, other)
        positions = 0 if self._is_decoder_only else self._bucket(context)
        fits = width <= state.buffers.rows and positions <= state.buffers.positions
        lease = None if fits else self._pool.lease(width, positions)
        tensors = self._joined_conditioning(state, other, context)
        # Nothing has changed before this line, and nothing is refused after it.
        state.join_conditioning(other, tensors, context)
        if lease is not None:
            self._move_to_buffers(state, state.slots, state.sources, lease)
        state.width = width
        targets = np.setdiff1d(np.arange(width), state.slots)[: len(other.slots)]
        self._copy_cache(other, state.buffers, targets, other.slots, parity=state.parity)
        state.slots = np.concatenate([state.slots, targets])
        state.lengths = np.concatenate([state.lengths, other.lengths])
        state.sources = np.concatenate([state.sources, other.sources])
        self._write_conditioning(state, targets, other.sources)
        # Released last, so that its buffers are not reused while they are read.
        del other.lease, other.tensors

    def close(self) -> None:
        """Release the buffers and the captured graphs."""
        self._pool.close()

    def _call(self, state: EngineState, input_ids: Ids) -> Logits:
        """One call on ids [rows, sequence_length]: logits [rows, sequence_length, vocab_size]."""
        if input_ids.shape[1] > 1:
            return self._several_tokens(state, input_ids)
        self._one_token(state, input_ids)
        return self._in_order(state, state.buffers.logits[: state.width])

    def _several_tokens(self, state: EngineState, input_ids: Ids) -> Logits:
        """One call on ids [rows, sequence_length], of 2 to `_call_tokens` tokens, with the logits of each.

        It is not captured: the number of tokens changes from call to call, and every shape would need its own context.
        """
        buffers, (device, stream) = state.buffers, (self._memory.device, self._memory.stream)
        count = input_ids.shape[1]
        call = buffers.call(count, most=self._call_tokens)
        sizes = self._sizes(batch=state.width, context=buffers.positions, new=count, embedded=0)
        context = self._engine.context(self._profile(sizes))
        bindings = self._bindings(state, sizes)
        bindings |= {name: Bound(tensor.address, bindings[name].shape) for name, tensor in call.tensors.items()}
        context.bind(bindings)
        given: dict[str, Ids] = {INPUT_IDS: np.zeros((state.width, count), np.int64)}
        given[INPUT_IDS][state.slots] = input_ids
        if self._is_decoder_only:
            given[LOGITS_TO_KEEP] = np.tile(np.arange(count), (state.width, 1))
        for name, array in given.items():
            host = call.host(name, array.shape)
            host[...] = array
            device.copy_in(call.tensors[name].address, host, stream)
        self._set_lengths(state)
        device.copy_in(buffers.tensors[PAST_LENGTH].address, buffers.lengths[: state.width], stream)
        context.enqueue()
        logits: Logits = call.host(LOGITS, bindings[LOGITS].shape)
        device.copy_out(logits, call.tensors[LOGITS].address, stream)
        device.synchronize(stream)
        self._advance(state, state.lengths + count)
        return self._in_order(state, logits)

    def _set_lengths(self, state: EngineState) -> None:
        """Write the rows' lengths in host memory. An idle slot writes its first positions, which its next row overwrites."""
        state.buffers.lengths[: state.width] = 0
        state.buffers.lengths[state.slots] = state.lengths

    def _one_token(self, state: EngineState, input_ids: Ids, *, greedy: bool = False) -> None:
        """One call on ids [batch, 1]. Afterwards its outputs are in host memory: logits, or (`greedy`) the argmax only."""
        buffers, width = state.buffers, state.width
        buffers.ids[:width] = 0
        buffers.ids[state.slots] = input_ids
        self._set_lengths(state)
        device, stream, key = self._memory.device, self._memory.stream, (width, state.parity, greedy)
        graph = buffers.graphs.get(key)
        if graph is None:
            context = self._step_context(state)
            # The first call is not captured: TensorRT sets up new shapes in it, which cannot be captured.
            if key in buffers.warm and context.capturable():
                graph = buffers.graphs[key] = self._captured(context, buffers, width, greedy=greedy)
            else:
                self.uncaptured |= key in buffers.warm
                self._enqueue_step(context, buffers, width, greedy=greedy)
                buffers.warm.add(key)
        if graph is not None:
            device.launch(graph, stream)
        device.synchronize(stream)
        self._advance(state, state.lengths + 1)

    @staticmethod
    def _in_order(state: EngineState, logits: Logits) -> Logits:
        """A call's logits [slots, sequence_length, vocab_size] in the order of the rows."""
        in_order = np.array_equal(state.slots, np.arange(len(state.slots)))
        return logits[: len(state.slots)] if in_order else logits[state.slots]

    def _step_context(self, state: EngineState) -> EngineContext:
        """The execution context of this step's shape and cache, with all tensors bound."""
        buffers = state.buffers
        while self._pool.dropped:
            self._engine.drop_contexts(self._pool.dropped.pop())
        sizes = self._sizes(batch=state.width, context=buffers.positions, new=1, embedded=0)
        profile = self._profile(sizes)
        context = self._engine.context(profile, (buffers.number, state.width, state.parity))
        context.bind(self._bindings(state, sizes))
        return context

    def _captured(self, context: EngineContext, buffers: DecoderBuffers, width: int, *, greedy: bool) -> int:
        device, stream = self._memory.device, self._memory.stream
        device.begin_capture(stream)
        try:
            self._enqueue_step(context, buffers, width, greedy=greedy)
        except BaseException:
            # End the capture, or the stream stays unusable. That may fail for the same reason.
            with suppress(DeviceError):
                device.destroy_graph(device.end_capture(stream))
            raise
        return device.end_capture(stream)

    def _enqueue_step(self, context: EngineContext, buffers: DecoderBuffers, width: int, *, greedy: bool) -> None:
        device, stream = self._memory.device, self._memory.stream
        device.copy_in(buffers.tensors[INPUT_IDS].address, buffers.ids[:width], stream)
        device.copy_in(buffers.tensors[PAST_LENGTH].address, buffers.lengths[:width], stream)
        context.enqueue()
        outputs = (
            {ARGMAX_IDS: buffers.argmax_ids, MAX_LOGITS: buffers.max_logits} if greedy else {LOGITS: buffers.logits}
        )
        for name, array in outputs.items():
            device.copy_out(array[:width], buffers.tensors[name].address, stream)

    def _prompt_pass(self, state: EngineState) -> Logits:
        """The call on prompt embeddings [batch, context, hidden_size]: logits [batch, vocab_size] of each prompt's last position."""
        buffers, (batch, positions) = state.buffers, state.attention_mask.shape
        device, stream = self._memory.device, self._memory.stream
        sizes = self._sizes(batch=batch, context=positions, new=0, embedded=positions)
        context = self._engine.context(self._profile(sizes))
        bindings = self._bindings(state, sizes)
        bindings[PROMPT_EMBEDS] = Bound(state.tensors[PROMPT_EMBEDS].address, bindings[PROMPT_EMBEDS].shape)
        context.bind(bindings)
        lengths = state.attention_mask.sum(axis=1)
        buffers.tensors[LOGITS_TO_KEEP].write(lengths[:, None] - 1)
        buffers.tensors[PAST_LENGTH].clear()
        context.enqueue()
        device.copy_out(buffers.logits[:batch], buffers.tensors[LOGITS].address, stream)
        device.synchronize(stream)
        buffers.tensors[LOGITS_TO_KEEP].clear()
        self._advance(state, lengths)
        logits: Logits = buffers.logits[:batch, 0]
        return logits

    def _bindings(self, state: EngineState, sizes: Mapping[str, int]) -> dict[str, Bound]:
        """The address and shape of each tensor of a call."""
        buffers, entry = state.buffers, self._engine.entry
        shapes = shapes_of((*entry.inputs, *entry.outputs), sizes)
        bound = {name: Bound(tensor.address, shapes[name]) for name, tensor in buffers.tensors.items()}
        for present, past in self._past_of.items():
            cache = buffers.caches[past]
            bound[past] = Bound(cache[state.parity].address, shapes[past])
            # In place it is the same tensor, otherwise the other of the two.
            bound[present] = Bound(cache[(state.parity + 1) % len(cache)].address, shapes[present])
        return bound

    def _advance(self, state: EngineState, lengths: Ids) -> None:
        state.lengths = lengths
        if not self._in_place:
            state.parity = 1 - state.parity

    def _move_to_buffers(self, state: EngineState, slots: Ids, sources: Ids, lease: BufferLease) -> None:
        """Move the rows in these slots to other buffers."""
        targets = np.arange(len(slots))
        self._copy_cache(state, lease.buffers, targets, slots, parity=state.parity)
        before, state.lease = state.lease, lease
        state.slots, state.sources, state.width = targets, sources, lease.buffers.rows
        state.held = np.full(lease.buffers.rows, _EMPTY)
        self._write_conditioning(state, targets, sources)
        del before  # released last, so that its buffers are not reused while they are read

    def _copy_cache(self, state: EngineState, into: DecoderBuffers, targets: Ids, slots: Ids, *, parity: int) -> None:
        """Copy the cache of a state's slots to target slots. No target may also be a source.

        Args:
            parity: index of the target's current cache, if there are two.
        """
        for spec in self._state:
            source, target = (of.caches[spec.past.name] for of in (state.buffers, into))
            self._copy_rows(
                source[state.parity], slots, target[parity], targets, axis=spec.growing_axis, positions=state.longest
            )

    def _write_conditioning(self, state: EngineState, slots: Ids, sources: Ids) -> None:
        """Write rows of the conditioning, `sources`, to slots."""
        state.held[slots] = sources
        for name in self._conditioned:
            source, target = state.tensors[name], state.buffers.tensors[name]
            self._copy_rows(source, sources, target, slots, axis=CONTEXT_AXIS, positions=source.shape[CONTEXT_AXIS])
        if self._is_decoder_only:
            return
        tensor, taken = state.buffers.tensors[ENCODER_ATTENTION_MASK], np.flatnonzero(state.held >= 0)
        mask = np.zeros(tensor.shape, np.int64)  # the bucket's padding is 0
        mask[taken, : state.attention_mask.shape[1]] = state.attention_mask[state.held[taken]]
        tensor.write(mask)

    def _joined_conditioning(self, state: EngineState, other: EngineState, context: int) -> dict[str, DeviceTensor]:
        """New tensors for `EngineState.join_conditioning`, padded with zeros: the buffers' padding must be finite."""
        joined = {}
        for name in self._conditioned:
            kept = [np.unique(of.sources) for of in (state, other)]
            shape = list(state.tensors[name].shape)
            shape[0], shape[CONTEXT_AXIS] = sum(map(len, kept)), context
            tensor = joined[name] = DeviceTensor(
                self._memory, tuple(shape), state.tensors[name].dtype, purpose=name, remedy=_FEWER
            )
            tensor.clear()
            first = 0
            for of, rows in zip((state, other), kept, strict=True):
                source = of.tensors[name]
                targets = np.arange(first, first + len(rows))
                positions = min(context, source.shape[CONTEXT_AXIS])
                self._copy_rows(source, rows, tensor, targets, axis=CONTEXT_AXIS, positions=positions)
                first += len(rows)
        return joined

    def _copy_rows(
        self, source: DeviceTensor, rows: Ids, target: DeviceTensor, targets: Ids, *, axis: int, positions: int
    ) -> None:
        """Copy rows' first positions along an axis between tensors [rows, …] on the device."""
        if not positions:
            return
        # A row is `blocks` blocks of consecutive positions: one for each index of the axes between.
        blocks = prod(source.shape[1:axis])
        position = prod(source.shape[axis + 1 :]) * item_bytes(source.dtype)
        to_pitch, from_pitch = target.shape[axis] * position, source.shape[axis] * position
        for to, start, count in _runs(targets, rows):
            self._memory.device.copy_blocks(
                target.address + to * blocks * to_pitch,
                source.address + start * blocks * from_pitch,
                width=positions * position,
                count=count * blocks,
                to_pitch=to_pitch,
                from_pitch=from_pitch,
                stream=self._memory.stream,
            )

    def _in_type(self, tensors: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        """The conditioning converted to the decoder engine's types, which may differ from the projector engine's."""
        converted = {}
        for name, tensor in tensors.items():
            dtype = self._types.get(name, tensor.dtype)
            if dtype != tensor.dtype:
                array, tensor = tensor.read(), DeviceTensor(
                    self._memory, tensor.shape, dtype, purpose=name, remedy=_FEWER
                )  # fmt: skip
                tensor.write(array)
            converted[name] = tensor
        return converted

    def _sizes(self, *, batch: int, context: int, new: int, embedded: int) -> dict[str, int]:
        return {
            "batch": batch, "context": context, "sequence_length": new, "embeds_length": embedded,
            "num_logits": max(1, new), "capacity": self._limits.capacity,
        }  # fmt: skip

    def _profile(self, sizes: Mapping[str, int]) -> int:
        shapes = shapes_of(self._engine.entry.inputs, sizes)
        profile = self._engine.profile(shapes)
        if profile is None:
            raise BundleError(
                f"No profile of {self._engine.entry.file} covers a call within the limits of its set.",
                *(f"{name}: {list(shape)}" for name, shape in shapes.items() if not name.startswith("past_")),
                remedy="build the engines again",
            )
        return profile

    def _width(self, rows: int) -> int:
        """The number of slots for this many rows: the next power of two, at most the limit."""
        return int(min(1 << (rows - 1).bit_length(), self._limits.batch))

    def _bucket(self, context: int) -> int:
        """The padded number of context positions."""
        return min(-(-context // _BUCKET) * _BUCKET, self._limits.prompt * self._shape.context_per_token)

    def _check_memory(self, context: int) -> None:
        most = self._limits.prompt * self._shape.context_per_token
        if context > most:
            raise PromptError(
                f"Prompts of {context // self._shape.context_per_token} tokens are longer than the engines accept: "
                f"{self._limits.prompt}.",
                f"context positions: {context}; at most {most}",
                remedy="shorten them, or build the engines with a higher --max-prompt",
            )

    def _check_rows(self, rows: int) -> None:
        if rows > self._limits.batch:
            raise UsageError(
                f"{rows} rows are more than the engines accept: {self._limits.batch}.",
                "rows: the prompts of a batch, times num_beams or num_return_sequences",
                remedy="lower --batch-size, --num-beams or --num-return-sequences, or build the engines with a higher "
                "--max-batch",
            )

    def _check_room(self, positions: int) -> None:
        if positions > self._limits.capacity:
            raise UsageError(
                f"{positions} positions are more than the engines' cache has room for: {self._limits.capacity}.",
                f"the cache is for {self._limits.prompt} prompt tokens and {self._limits.new} new tokens",
                remedy="lower --max-new-tokens, or build the engines with a higher --max-new",
            )


def _joined_context(*states: EngineState) -> int:
    """The context positions that the rows of states use: up to the last one of their masks that is not 0."""
    used = [np.flatnonzero(state.attention_mask[state.sources].any(axis=0)) for state in states]
    return 1 + max(int(columns.max(initial=0)) for columns in used)


def _padded(mask: Ids, context: int) -> Ids:
    """The mask [rows, context] with the same first positions, then 0."""
    cut = mask[:, :context]
    return np.pad(cut, ((0, 0), (0, context - cut.shape[1])))


def _assigned(slots: Ids, sources: Ids, held: Ids) -> Ids:
    """Assign a distinct slot to each row.

    The first row in a slot keeps it. Every other row gets an idle slot, preferably one with the same conditioning.

    Args:
        slots, sources: [rows] the slot of each row, and its row of the conditioning.
        held: [slots] the row of the conditioning in each available slot.
    """
    targets = np.full(len(slots), _EMPTY)
    used = set()
    for row, slot in enumerate(slots.tolist()):
        if slot < len(held) and slot not in used:
            targets[row] = slot
            used.add(slot)
    idle = [slot for slot in range(len(held)) if slot not in used]
    for row in np.flatnonzero(targets == _EMPTY).tolist():
        alike = [slot for slot in idle if held[slot] == sources[row]]
        targets[row] = (alike or idle)[0]
        idle.remove(int(targets[row]))
    return targets


def _runs(targets: Sequence[int] | Array, sources: Sequence[int] | Array) -> Iterator[tuple[int, int, int]]:
    """Merge consecutive pairs into runs: first target, first source, length."""
    first, length = (0, 0), 0
    for target, source in zip(map(int, targets), map(int, sources), strict=True):
        if length and (target, source) == (first[0] + length, first[1] + length):
            length += 1
            continue
        if length:
            yield *first, length
        first, length = (target, source), 1
    if length:
        yield *first, length
