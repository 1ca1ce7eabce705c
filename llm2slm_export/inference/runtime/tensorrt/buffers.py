"""Device buffers of a decoder's states: tensors at fixed addresses, reused by one state after another."""

import weakref
from collections import deque
from itertools import count
from math import prod

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.manifest import EngineEntry
from llm2slm_export.contract import (
    ARGMAX_IDS,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    MAX_LOGITS,
    PAST_LENGTH,
    StateSpec,
)
from llm2slm_export.inference.runtime.tensorrt.engine import Dims, shape_of
from llm2slm_export.inference.runtime.tensorrt.memory import DeviceTensor, MemoryPool

_MAX_UNUSED = 4  # unused sets of buffers that are kept with their captured graphs
_numbers = count()

StepKey = tuple[int, int, bool]

_REMEDY = (
    "run fewer rows at a time (--batch-size, --num-beams), or build the engines with a lower --max-prompt or --max-new"
)


class CallBuffers:
    """The tensors of a decoder call whose size depends on the number of its tokens, for calls of several tokens.

    Attributes:
        tokens: the most tokens of a call.
        tensors: inputs and outputs on the device, by name.

    Args:
        entry: the decoder engine.
        rows: number of rows.
    """

    def __init__(self, memory: MemoryPool, entry: EngineEntry, *, rows: int, tokens: int) -> None:
        self.tokens, self._memory = tokens, memory
        sizes = {"batch": rows, "sequence_length": tokens, "num_logits": tokens}
        of_call = (INPUT_IDS, LOGITS_TO_KEEP, LOGITS, ARGMAX_IDS, MAX_LOGITS)
        specs = [spec for spec in (*entry.inputs, *entry.outputs) if spec.name in of_call]
        self.tensors: dict[str, DeviceTensor] = {}
        for spec in specs:
            shape = shape_of(spec, sizes)
            purpose = f"{spec.name} {list(shape)} of the decoder"
            self.tensors[spec.name] = DeviceTensor(memory, shape, spec.dtype, purpose=purpose, remedy=_REMEDY)
        # Flat, because a copy is of contiguous memory and a call may have fewer rows and tokens.
        self._host = {
            spec.name: memory.host((prod(self.tensors[spec.name].shape),), spec.dtype)
            for spec in specs
            if spec.name in (INPUT_IDS, LOGITS_TO_KEEP, LOGITS)
        }

    def host(self, name: str, shape: Dims) -> Array:
        """An input, or the logits, of a call in host memory, contiguous.

        Args:
            shape: the tensor's shape in this call.
        """
        return self._host[name][: prod(shape)].reshape(shape)

    def close(self) -> None:
        """Release host memory, which the garbage collector does not. The stream must be idle."""
        for array in self._host.values():
            self._memory.give_back_host(array)
        self._host.clear()


class DecoderBuffers:
    """All tensors of a decoder engine for a number of rows and of context positions, in calls of one token.

    Those that calls of several tokens need besides are allocated by the first of these calls (`call`).

    Attributes:
        caches: the cache's tensors by the name of the past: one if the engine updates it in place, otherwise two, which calls
            read and write alternately.
        ids, lengths: inputs in host memory.
        logits, argmax_ids, max_logits: outputs in host memory.
        graphs: captured CUDA graphs of steps, by the number of rows, the cache that is read, and whether the step is greedy.
        warm: keys of steps that have run once.

    Args:
        entry: the decoder engine.
        state: the decoder's state.
        rows: number of rows.
        positions: context positions; 0 for a decoder-only SLM.
        capacity: positions of the cache.
    """

    def __init__(
        self,
        memory: MemoryPool,
        entry: EngineEntry,
        state: tuple[StateSpec, ...],
        *,
        rows: int,
        positions: int,
        capacity: int,
    ) -> None:
        self.number, self.rows, self.positions = next(_numbers), rows, positions
        self._memory, self._entry = memory, entry
        self._call: CallBuffers | None = None
        sizes = {
            "batch": rows,
            "context": positions,
            "sequence_length": 1,
            "embeds_length": 0,
            "num_logits": 1,
            "capacity": capacity,
        }
        outputs_of = {part.past.name: part.present.name for part in state}

        def tensor(name: str, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
            purpose = f"{name} {list(shape)} of the decoder"
            return DeviceTensor(memory, shape, dtype, purpose=purpose, remedy=_REMEDY)

        self.tensors: dict[str, DeviceTensor] = {}
        self.caches: dict[str, tuple[DeviceTensor, ...]] = {}
        specs = {spec.name: spec for spec in (*entry.inputs, *entry.outputs)}
        for spec in (*entry.inputs, *(specs[name] for name in (LOGITS, ARGMAX_IDS, MAX_LOGITS))):
            shape = shape_of(spec, sizes)
            if spec.name in outputs_of:
                copies = 1 if outputs_of[spec.name] in entry.aliases else 2
                self.caches[spec.name] = tuple(tensor(spec.name, shape, spec.dtype) for _ in range(copies))
            else:
                self.tensors[spec.name] = tensor(spec.name, shape, spec.dtype)
        self.ids, self.lengths, self.logits, self.argmax_ids, self.max_logits = (
            memory.host(self.tensors[name].shape, specs[name].dtype)
            for name in (INPUT_IDS, PAST_LENGTH, LOGITS, ARGMAX_IDS, MAX_LOGITS)
        )
        self.graphs: dict[StepKey, int] = {}
        self.warm: set[StepKey] = set()

    def call(self, tokens: int, *, most: int) -> CallBuffers:
        """Tensors for a call of several tokens. The next call of more tokens replaces them. The stream must be idle.

        Args:
            most: the most tokens of any call.

        Raises:
            DeviceError: there is too little memory.
        """
        if self._call is None or self._call.tokens < tokens:
            if self._call is not None:
                self._call.close()
                self._call = None  # first, so that its memory is used again
            # Powers of two, because the number of tokens of drafts changes from call to call.
            room = min(1 << (tokens - 1).bit_length(), most)
            self._call = CallBuffers(self._memory, self._entry, rows=self.rows, tokens=room)
        return self._call

    def clear(self) -> None:
        """Set all tensors to zero: attention multiplies unwritten positions by 0, and 0 times NaN or infinity is NaN."""
        for cache in self.caches.values():
            for tensor in cache:
                tensor.clear()
        for tensor in self.tensors.values():
            tensor.clear()

    def close(self) -> None:
        """Release graphs and host memory, which the garbage collector does not. The stream must be idle."""
        for graph in self.graphs.values():
            self._memory.device.destroy_graph(graph)
        self.graphs.clear()
        self.warm.clear()
        for array in (self.ids, self.lengths, self.logits, self.argmax_ids, self.max_logits):
            self._memory.give_back_host(array)
        if self._call is not None:
            self._call.close()
            self._call = None


class BufferLease:
    """A lease of a set of buffers. It ends when this object is garbage-collected."""

    def __init__(self, buffers: DecoderBuffers, returned: "deque[DecoderBuffers]") -> None:
        self.buffers = buffers
        weakref.finalize(self, returned.append, buffers).atexit = False


class BuffersPool:
    """The sets of a decoder's buffers: those in use, and a few unused ones that are kept for states of equal size."""

    def __init__(self, memory: MemoryPool, entry: EngineEntry, state: tuple[StateSpec, ...], *, capacity: int) -> None:
        self._memory, self._entry, self._state, self._capacity = memory, entry, state, capacity
        self._open: dict[int, DecoderBuffers] = {}
        self._unused: list[DecoderBuffers] = []
        self._returned: deque[DecoderBuffers] = deque()  # see MemoryPool
        self.dropped: list[int] = []  # numbers of dropped sets; the decoder removes them and drops their contexts
        memory.on_pressure.append(self.drop_unused)

    def lease(self, rows: int, positions: int) -> BufferLease:
        """Lease a set for a number of rows and context positions, filled with zeros.

        Raises:
            DeviceError: there is too little memory.
        """
        self._collect()
        fitting = [b for b in self._unused if (b.rows, b.positions) == (rows, positions)]
        if fitting:
            buffers = fitting[-1]
            self._unused.remove(buffers)
        else:
            buffers = DecoderBuffers(
                self._memory, self._entry, self._state, rows=rows, positions=positions, capacity=self._capacity
            )
            self._open[buffers.number] = buffers
        while len(self._unused) > _MAX_UNUSED:
            self._drop(self._unused.pop(0))
        buffers.clear()
        return BufferLease(buffers, self._returned)

    def drop_unused(self) -> None:
        """Drop all unused sets."""
        self._collect()
        while self._unused:
            self._drop(self._unused.pop())

    def close(self) -> None:
        """Release all sets, including those in use. The stream must be idle."""
        self._memory.on_pressure.remove(self.drop_unused)
        for buffers in self._open.values():
            buffers.close()
        self._open.clear()
        self._unused.clear()

    def _collect(self) -> None:
        while self._returned:
            self._unused.append(self._returned.popleft())

    def _drop(self, buffers: DecoderBuffers) -> None:
        self._memory.device.synchronize(self._memory.stream)
        del self._open[buffers.number]
        self.dropped.append(buffers.number)
        buffers.close()
