"""Decoder steps on tensors at fixed addresses, so that a step can be captured once as a CUDA graph and replayed.

A captured graph contains the addresses and shapes of the ids, the cache, the conditioning and the logits. There is one set
of tensors, with its own graph, for each combination of rows, context positions and cache capacity. A state borrows a set
while it has that shape.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llm2slm_export.arrays import Array
from llm2slm_export.contract import LOGITS
from llm2slm_export.inference.runtime.forks import ForkSafeLock

_GRAPH_ID = "gpu_graph_id"  # run option: number of the graph to capture or replay; -1: neither
_NEITHER = "-1"


class StepShape(NamedTuple):
    """The shape of a captured step. `context`: positions of cross-attention; 0 for a decoder-only SLM."""

    batch: int
    context: int
    capacity: int


@dataclass(eq=False)
class CapturedStep:
    """The tensors of a step.

    Args:
        inputs: all inputs of the decoder by name. The cache's inputs are also its outputs.
        logits: [batch, 1, vocab_size], on the device.
        number: the number of its CUDA graph, unique in the session.
        holds: identity of the conditioning in its tensors; None before anything is written.
        runs: number of runs. The first one captures the graph.
    """

    shape: StepShape
    inputs: dict[str, Any]
    logits: Any
    number: int
    holds: tuple[object, bytes] | None = None
    runs: int = 0

    def __post_init__(self) -> None:
        self.captured, self.launched = run_options(self.number), run_options(None)

    def bind(self, session: Any, outputs: Mapping[str, str]) -> None:
        """Bind all tensors to calls of a session.

        Args:
            outputs: of each output of the cache, the input whose memory it shares.
        """
        self.binding, self.session = session.io_binding(), session
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, source in outputs.items():
            self.binding.bind_ortvalue_output(name, self.inputs[source])
        self.binding.bind_ortvalue_output(LOGITS, self.logits)

    def run(self, *, captured: bool) -> None:
        """Run the decoder once.

        Args:
            captured: capture the CUDA graph in the first run and replay it in later ones; False: launch node by node.
        """
        self.session.run_with_iobinding(self.binding, self.captured if captured else self.launched)
        self.runs += 1

    def read(self) -> Array:
        """The logits [batch, 1, vocab_size] in host memory."""
        array: Array = self.logits.numpy()
        return array


def run_options(graph: int | None) -> Any:
    """RunOptions of a call that captures or replays a CUDA graph; None: the call is launched node by node."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, _NEITHER if graph is None else str(graph))
    return options


class BorrowedStep:
    """A borrowed step. It returns to its pool when this object is garbage-collected."""

    def __init__(self, pool: "StepPool", step: CapturedStep) -> None:
        self.step = step
        self._back = weakref.finalize(self, pool.give_back, step)
        self._back.atexit = False

    def give_back(self) -> None:
        """Return the step now."""
        self._back()


class StepPool:
    """The unused steps of a decoder, in order of their last use.

    Args:
        most: maximum number of unused steps. The least recently used is dropped first. Each one holds a cache.
        forget: called with the number of a dropped step.
    """

    def __init__(self, most: int, forget: Callable[[int], object] = lambda _: None) -> None:
        self._most, self._free, self._lock = most, OrderedDict[int, CapturedStep](), ForkSafeLock()
        self._numbers, self._forget = 0, forget

    def number(self) -> int:
        """A new graph number."""
        with self._lock:
            self._numbers += 1
            return self._numbers

    def borrow(self, shape: StepShape, holds: tuple[object, bytes]) -> BorrowedStep | None:
        """Borrow an unused step of this shape, preferably one that `holds` the same conditioning; None if there is none."""
        with self._lock:
            free = [step for step in self._free.values() if step.shape == shape]
            if not free:
                return None
            chosen = next((step for step in reversed(free) if step.holds == holds), free[-1])
            del self._free[chosen.number]
        return BorrowedStep(self, chosen)

    def lend(self, step: CapturedStep) -> BorrowedStep:
        """Borrow a new step, which later returns to this pool."""
        return BorrowedStep(self, step)

    def give_back(self, step: CapturedStep) -> None:
        """Add a step to the unused ones. `BorrowedStep` calls this."""
        with self._lock:
            self._free[step.number] = step
            gone = [self._free.popitem(last=False)[0] for _ in range(len(self._free) - self._most)]
        for number in gone:
            self._forget(number)

    def clear(self) -> None:
        """Drop all unused steps."""
        with self._lock:
            gone = list(self._free)
            self._free.clear()
        for number in gone:
            self._forget(number)
