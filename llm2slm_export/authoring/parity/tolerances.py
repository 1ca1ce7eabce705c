"""Tolerances of the parity check, by precision."""

from dataclasses import dataclass

from llm2slm_export.contract import EnginePrecision, Precision

# fp32: a tensor's error may be this multiple of transformers' worst float32 error over all cases (`measurements.py`); it
# may always be the floor. Of 23 random T5, BART, Llama and GPT-2 pairs with weights scaled by 0.5 to 4, the largest
# multiple seen above 1e-6 was 2.0.
MARGIN = 16.0
FLOOR = 2e-6


@dataclass(frozen=True)
class Tolerances:
    """Tolerances of a precision.

    Args:
        tensor: maximum error of a tensor, as root mean square error over root mean square: robust to single outliers.
            None at fp32, which has `MARGIN` and `FLOOR`.
        tokens: maximum fraction of teacher-forced next tokens that differ, on the few dozen prompts that every pair is
            checked with; the pair has the largest of its graphs.
        gate: the same on the prompts of a gate; the pair has the sum of its graphs.
    """

    tensor: float | None
    tokens: float
    gate: float


TOLERANCES: dict[Precision | EnginePrecision, Tolerances] = {
    "fp32": Tolerances(tensor=None, tokens=0.0, gate=0.0),
    "fp16": Tolerances(tensor=0.02, tokens=0.05, gate=0.005),
    "bf16": Tolerances(tensor=0.05, tokens=0.05, gate=0.005),
    "int8": Tolerances(tensor=0.10, tokens=0.05, gate=0.005),
    "int4": Tolerances(tensor=0.50, tokens=0.25, gate=0.02),
    "w8a8": Tolerances(tensor=0.15, tokens=0.05, gate=0.005),
}
# Nats per token on the prompts of a gate: rejects only an unrelated distribution, because the fraction of differing
# tokens is the gate.
DIVERGENCE = 1.0
