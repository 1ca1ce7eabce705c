"""Errors at fp32: a tensor's distance from float64, relative to that of transformers' own float32.

Two correct float32 computations round differently, and a model may amplify the difference: a T5 with large weights
turns 1e-7 into 1e-4. The amplification is measured on transformers' own float32.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.parity.tolerances import FLOOR, MARGIN
from llm2slm_export.bundle.parity_report import ParityRow
from llm2slm_export.contract import GraphName

MEASURE = "max |error| / max |reference|"


@dataclass(frozen=True)
class _Measured:
    graph: GraphName | Literal["pair"]
    case: str
    tensor: str
    value: float
    float32_error: float


@dataclass
class Measurements:
    """Errors relative to float64. They are judged over all cases: in a single small case, rounding may cancel out."""

    taken: list[_Measured] = field(default_factory=list)

    def add(
        self, graph: GraphName | Literal["pair"], case: str, tensor: str, got: Array, float32: Array, float64: Array
    ) -> None:
        """Record a tensor of a case: the bundle's, transformers' in float32, and transformers' in float64."""
        value, own = (relative(off(given, float64), size(float64)) for given in (got, float32))
        self.taken.append(_Measured(graph, case, tensor, value, own))

    def tolerances(self) -> dict[tuple[str, str], tuple[float, float]]:
        """By graph and tensor: the tolerance, and the largest error of transformers' float32."""
        worst: dict[tuple[str, str], float] = defaultdict(float)
        for one in self.taken:
            if np.isfinite(one.float32_error):
                worst[one.graph, one.tensor] = max(worst[one.graph, one.tensor], one.float32_error)
        names = {(one.graph, one.tensor) for one in self.taken}
        return {name: (max(FLOOR, MARGIN * worst[name]), worst[name]) for name in names}

    def rows(self) -> Iterator[ParityRow]:
        """The recorded comparisons as parity rows."""
        tolerances = self.tolerances()
        for one in self.taken:
            tolerance, own = tolerances[one.graph, one.tensor]
            yield ParityRow.judged(one.graph, one.case, one.tensor, MEASURE, one.value, tolerance, float32_error=own)


def off(got: Array, expected: Array) -> float:
    """The largest absolute error."""
    return float(np.abs(got.astype(np.float64) - expected).max())


def size(expected: Array) -> float:
    """The largest absolute value."""
    return float(np.abs(expected).max())


def relative(error: float, size: float) -> float:
    """`error` / `size`; for an all-zero reference (a zero-initialized projector), 0 without error and infinity with."""
    if size == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / size
