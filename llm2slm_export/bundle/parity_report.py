"""The parity report: a bundle's graphs compared with the unmodified models at build time."""

from typing import Literal

from llm2slm_export.contract import GraphName
from llm2slm_export.errors import Llm2SlmError
from llm2slm_export.files.strict_model import StrictModel


class ParityRow(StrictModel):
    """One comparison with the reference.

    Args:
        case: the name of the batch of prompts.
        tensor: the compared tensor.
        measure: the name of the error measure.
        value, tolerance: the measured error, and the largest one that passes.
        float32_error: the error of transformers' own float32, in the same measure; None if the tolerance is not based on it.
    """

    graph: GraphName | Literal["pair"]
    case: str
    tensor: str
    measure: str
    value: float
    tolerance: float
    passed: bool
    float32_error: float | None = None

    @classmethod
    def judged(
        cls, graph: GraphName | Literal["pair"], case: str, tensor: str, measure: str, value: float, tolerance: float,
        *, float32_error: float | None = None,
    ) -> "ParityRow":  # fmt: skip
        """A comparison that passes if its value is within the tolerance; NaN never is."""
        return cls(
            graph=graph, case=case, tensor=tensor, measure=measure, value=value, tolerance=tolerance,
            passed=value <= tolerance, float32_error=float32_error,
        )  # fmt: skip

    @property
    def of_gate(self) -> bool:
        """Whether it belongs to the gate: the held-out prompts given to the build."""
        return self.case.startswith("gate, ")


class ParityReport(StrictModel):
    """All comparisons with the unmodified models at build time."""

    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """Whether there are comparisons and all of them passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)


class ParityError(Llm2SlmError):
    """An exported graph does not match the reference. `report` holds all comparisons."""

    def __init__(self, fact: str, *evidence: str, remedy: str, report: "ParityReport") -> None:
        super().__init__(fact, *evidence, remedy=remedy)
        self.report = report
