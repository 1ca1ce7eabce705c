"""Decoder steps on tensors that never move, so that a CUDA graph of a step can be captured once and replayed.

A captured graph holds addresses and shapes: of the ids, the cache, what the decoder is conditioned on and the logits. So
there is a set of tensors for each number of rows, of positions conditioned on and of the cache's positions, with a graph
of its own; a state borrows one for as long as it has that shape.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llm2slm_export.contract import LOGITS
from llm2slm_export.inference.runtime.backend import Array
from llm2slm_export.inference.runtime.forks import ForkSafeLock

_GRAPH_ID = "gpu_graph_id"  # of a run: the captured graph to replay, or to capture; -1: neither
_NEITHER = "-1"


class StepShape(NamedTuple):
    """What a captured step depends on. `context`: of an encoder-decoder's cross-attention; 0 for a decoder-only SLM."""

    batch: int
    context: int
    capacity: int


@dataclass(eq=False)
class CapturedStep:
    """One step's tensors.

    Args:
        inputs: by name, all of the decoder's; a cache's are its outputs too.
        logits: [batch, 1, vocab], on the device.
        number: its graph's, of no other in the session.
        holds: what the decoder is conditioned on, as its state names it; None before anything is written.
        steps: that it has made: the first is the one that captures.
    """

    shape: StepShape
    inputs: dict[str, Any]
    logits: Any
    number: int
    holds: tuple[object, bytes] | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        self.captured, self.launched = run_options(self.number), run_options(None)

    def bind(self, session: Any, outputs: Mapping[str, str]) -> None:
        """Bind everything to calls of a session.

        Args:
            outputs: by name, the input whose memory an output has.
        """
        self.binding, self.session = session.io_binding(), session
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, source in outputs.items():
            self.binding.bind_ortvalue_output(name, self.inputs[source])
        self.binding.bind_ortvalue_output(LOGITS, self.logits)

    def run(self, *, captured: bool) -> None:
        """One call of the decoder.

        Args:
            captured: by replaying the graph of the first; launched node by node otherwise.
        """
        self.session.run_with_iobinding(self.binding, self.captured if captured else self.launched)
        self.steps += 1

    def read(self) -> Array:
        """The logits [batch, 1, vocab], in host memory."""
        array: Array = self.logits.numpy()
        return array


def run_options(graph: int | None) -> Any:
    """Those of a call that captures and replays that graph; None: one that is launched node by node."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, _NEITHER if graph is None else str(graph))
    return options


class BorrowedStep:
    """A borrowed step. It goes back when nobody holds the lease any more."""

    def __init__(self, steps: "StepPool", step: CapturedStep) -> None:
        self.step = step
        self._back = weakref.finalize(self, steps.give_back, step)
        self._back.atexit = False

    def give_back(self) -> None:
        """Give it back now."""
        self._back()


class StepPool:
    """The steps of a decoder that nobody has borrowed, the latest used last.

    Args:
        most: that are kept; the one that was not used for longest goes first. Each has its own cache.
        forget: called with the number of one that goes.
    """

    def __init__(self, most: int, forget: Callable[[int], object] = lambda _: None) -> None:
        self._most, self._free, self._lock = most, OrderedDict[int, CapturedStep](), ForkSafeLock()
        self._numbers, self._forget = 0, forget

    def number(self) -> int:
        """The number of a graph that is about to be made."""
        with self._lock:
            self._numbers += 1
            return self._numbers

    def borrow(self, shape: StepShape, holds: tuple[object, bytes]) -> BorrowedStep | None:
        """A free step of that shape, one that holds just that where there is one; None where all are in use."""
        with self._lock:
            free = [step for step in self._free.values() if step.shape == shape]
            if not free:
                return None
            chosen = next((step for step in reversed(free) if step.holds == holds), free[-1])
            del self._free[chosen.number]
        return BorrowedStep(self, chosen)

    def lend(self, step: CapturedStep) -> BorrowedStep:
        """A new step, borrowed from the start."""
        return BorrowedStep(self, step)

    def give_back(self, step: CapturedStep) -> None:
        """Called by leases."""
        with self._lock:
            self._free[step.number] = step
            gone = [self._free.popitem(last=False)[0] for _ in range(len(self._free) - self._most)]
        for number in gone:
            self._forget(number)

    def clear(self) -> None:
        """Let go of all that are free."""
        with self._lock:
            gone = list(self._free)
            self._free.clear()
        for number in gone:
            self._forget(number)
