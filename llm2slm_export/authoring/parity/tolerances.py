"""Rounding: what float32 may be off by. A float32 tensor is judged by its distance from float64, not from another float32.

Two correct float32 computations differ by what each rounds, and a model may make much of it: a T5 with large weights turns
1e-7 into 1e-4. How much it makes is measured on transformers' own float32.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llm2slm_export.bundle.parity_report import ParityRow
from llm2slm_export.contract import GraphName

Array = npt.NDArray[Any]

MEASURE = "max |error| / max |reference|"
# A tensor passes within so many times what transformers' float32 is off by in the worst of the cases, or within the floor.
# Of 23 random T5, BART, Llama and GPT-2 pairs with weights scaled by 0.5 to 4, the largest multiple seen above 1e-6 was 2.0.
MARGIN = 16.0
FLOOR = 2e-6


@dataclass(frozen=True)
class _Measured:
    graph: GraphName | Literal["pair"]
    case: str
    tensor: str
    value: float
    float32_error: float


@dataclass
class Measurements:
    """Comparisons with float64, judged once all cases are known: a single one, of one token say, may round luckily."""

    taken: list[_Measured] = field(default_factory=list)

    def add(
        self, graph: GraphName | Literal["pair"], case: str, tensor: str, got: Array, float32: Array, float64: Array
    ) -> None:
        """Take a tensor of a case, as the bundle, transformers in float32 and transformers in float64 give it."""
        value, own = (relative(off(given, float64), size(float64)) for given in (got, float32))
        self.taken.append(_Measured(graph, case, tensor, value, own))

    def tolerances(self) -> dict[tuple[str, str], tuple[float, float]]:
        """By graph and tensor: the tolerance, and what transformers' float32 is off by at most."""
        worst: dict[tuple[str, str], float] = defaultdict(float)
        for one in self.taken:
            if np.isfinite(one.float32_error):
                worst[one.graph, one.tensor] = max(worst[one.graph, one.tensor], one.float32_error)
        names = {(one.graph, one.tensor) for one in self.taken}
        return {name: (max(FLOOR, MARGIN * worst[name]), worst[name]) for name in names}

    def rows(self) -> Iterator[ParityRow]:
        """The comparisons, judged."""
        tolerances = self.tolerances()
        for one in self.taken:
            tolerance, own = tolerances[one.graph, one.tensor]
            yield ParityRow(
                graph=one.graph, case=one.case, tensor=one.tensor, measure=MEASURE, value=one.value, tolerance=tolerance,
                passed=one.value <= tolerance, float32_error=own,
            )  # fmt: skip


def off(got: Array, expected: Array) -> float:
    """The largest error."""
    return float(np.abs(got.astype(np.float64) - expected).max())


def size(expected: Array) -> float:
    """The largest value."""
    return float(np.abs(expected).max())


def relative(error: float, size: float) -> float:
    """`error` / `size`. Of a reference that is all zeros, as what a projector that starts at zero leads to, no error is none."""
    if size == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / size
