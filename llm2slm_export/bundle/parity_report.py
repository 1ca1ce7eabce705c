"""The parity report: how a bundle's graphs compared with the unmodified models when it was built."""

from typing import Literal

from llm2slm_export.contract import GraphName
from llm2slm_export.errors import Llm2SlmError
from llm2slm_export.files.strict_model import StrictModel


class ParityRow(StrictModel):
    """One comparison with the reference: `value` against `tolerance`, of tensor `tensor` in case `case`.

    `float32_error`: where the tolerance follows from it, what transformers' own float32 is off by, in the same measure.
    """

    graph: GraphName | Literal["pair"]
    case: str
    tensor: str
    measure: str
    value: float
    tolerance: float
    passed: bool
    float32_error: float | None = None

    @property
    def of_gate(self) -> bool:
        """Whether it is of the held-out prompts that a build was given."""
        return self.case.startswith("gate, ")


class ParityReport(StrictModel):
    """How a bundle was compared with the unpatched composition when it was built."""

    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """Whether something was compared, and all of it passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)


class ParityError(Llm2SlmError):
    """`report` holds every comparison that was made (`bundle.ParityReport`)."""

    def __init__(self, fact: str, *evidence: str, remedy: str, report: "ParityReport") -> None:
        super().__init__(fact, *evidence, remedy=remedy)
        self.report = report
