"""What a decoder's state has on the device: tensors at addresses that stay, planned once and used by one state after another."""

import weakref
from collections import deque
from itertools import count

from llm2slm_export.bundle.manifest import EngineEntry
from llm2slm_export.contract import ARGMAX_IDS, INPUT_IDS, LOGITS, MAX_LOGITS, PAST_LENGTH, StateSpec
from llm2slm_export.inference.runtime.tensorrt.engine import shape_of
from llm2slm_export.inference.runtime.tensorrt.memory import DeviceTensor, MemoryPool

_KEPT = 4  # sets of buffers that no state uses: a set's captured graphs go with it
_numbers = count()

StepKey = tuple[int, int, bool]

_REMEDY = (
    "run fewer rows at a time (--batch-size, --num-beams), or build the engines with a lower --max-prompt or --max-new"
)


class DecoderBuffers:
    """Every tensor of a decoder engine for so many rows and so many positions that it is conditioned on.

    `caches`: by the name of the past, one tensor where the engine writes it in place, else two, of which a call reads one
    and writes the other. `ids`, `length`: host memory that goes in; `logits`, or `argmax_ids` and `max_logits`, that comes
    out. `graphs`: what was captured of a step, by the rows it runs, the cache it reads first, and whether it is greedy;
    `warm`: steps that have run once.

    Args:
        entry: the decoder engine.
        state: the decoder's cache.
        capacity: positions that it has room for.
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
        self._memory = memory
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
        self.ids, self.length, self.logits, self.argmax_ids, self.max_logits = (
            memory.host(self.tensors[name].shape, specs[name].dtype)
            for name in (INPUT_IDS, PAST_LENGTH, LOGITS, ARGMAX_IDS, MAX_LOGITS)
        )
        self.graphs: dict[StepKey, int] = {}
        self.warm: set[StepKey] = set()

    def clear(self) -> None:
        """Zeros everywhere: what is not written is multiplied by 0, which not every bit pattern survives."""
        for cache in self.caches.values():
            for tensor in cache:
                tensor.clear()
        for tensor in self.tensors.values():
            tensor.clear()

    def close(self) -> None:
        """Give back what the garbage collector does not; the stream must have done all that it was given."""
        for graph in self.graphs.values():
            self._memory.device.destroy_graph(graph)
        self.graphs.clear()
        self.warm.clear()
        for array in (self.ids, self.length, self.logits, self.argmax_ids, self.max_logits):
            self._memory.give_back_host(array)


class BufferLease:
    """The use of a set of buffers, until nothing refers to this any more."""

    def __init__(self, buffers: DecoderBuffers, returned: "deque[DecoderBuffers]") -> None:
        self.buffers = buffers
        weakref.finalize(self, returned.append, buffers).atexit = False


class BuffersPool:
    """A decoder's buffers: those in use, and a few sets that are kept for the next state of that size."""

    def __init__(self, memory: MemoryPool, entry: EngineEntry, state: tuple[StateSpec, ...], *, capacity: int) -> None:
        self._memory, self._entry, self._state, self._capacity = memory, entry, state, capacity
        self._open: dict[int, DecoderBuffers] = {}
        self._unused: list[DecoderBuffers] = []
        self._returned: deque[DecoderBuffers] = deque()  # see MemoryPool
        self.dropped: list[int] = []  # numbers of the sets that have gone since somebody looked
        memory.on_pressure.append(self.drop_unused)

    def lease(self, rows: int, positions: int) -> BufferLease:
        """A set for so many rows and positions, all zeros.

        Raises:
            DeviceError: the device has no room.
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
        while len(self._unused) > _KEPT:
            self._drop(self._unused.pop(0))
        buffers.clear()
        return BufferLease(buffers, self._returned)

    def drop_unused(self) -> None:
        """Let go of every set that no state uses."""
        self._collect()
        while self._unused:
            self._drop(self._unused.pop())

    def close(self) -> None:
        """Let go of all of them, those in use too: nothing may run any more."""
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
