"""Ties: tokens whose logits differ by less than float32 rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.parity.measurements import size
from llm2slm_export.authoring.parity.reference_outputs import ReferenceBatch


@dataclass(frozen=True)
class Ties:
    """Tokens that float32 rounding may select instead of the reference's; none at a reduced precision.

    Args:
        tolerance: of the chained graphs' logits, relative to the largest.
        tokens: by case, [batch, response, vocabulary].
    """

    tolerance: float = 0.0
    tokens: Mapping[str, Array] = field(default_factory=dict)


def find_ties(cases: Sequence[ReferenceBatch], exact: dict[str, Array], tolerance: float) -> Ties:
    """Find tokens whose float64 logits differ from the reference token's by less than the tolerance can decide.

    Args:
        cases: batches with the reference's tokens.
        exact: by case, float64 logits [batch, response, vocabulary]; emptied, because they are large.
        tolerance: see `Ties`.
    """
    tokens = {}
    for case in cases:
        logits = exact.pop(case.name)
        # Each of the two logits may be off by the tolerance.
        within = 2 * tolerance * size(logits[case.written.numpy()])
        reference = np.take_along_axis(logits, case.generated.numpy()[:, :, None], axis=2)
        tokens[case.name] = np.abs(logits - reference) <= within
    return Ties(tolerance, tokens)
