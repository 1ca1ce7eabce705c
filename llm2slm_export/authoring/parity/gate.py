"""The gate: held-out prompts on which a bundle of a reduced precision is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from llm2slm_export.errors import UsageError


@dataclass(frozen=True)
class Gate:
    """Held-out prompts on which a bundle of a reduced precision must predict the reference's tokens.

    Args:
        prompts: texts, as for `run`; prompts too long for the pair are left out.
        differing: maximum fraction of next tokens that differ; None: 0.005 for each graph at fp16, bf16, int8 or w8a8,
            0.02 for each at int4.
    """

    prompts: tuple[str, ...]
    differing: float | None = None

    def label(self, prompts: int) -> str:
        """The case of the gate's parity rows. `prompts`: the number that fits the pair."""
        return f"gate, {prompts} of {len(self.prompts)} prompts"

    def require_held_out(self, calibration: Sequence[str]) -> None:
        """Refuse calibration prompts that the gate measures on.

        Raises:
            UsageError: prompts are in both.
        """
        shared = sorted(set(self.prompts) & set(calibration))
        if shared:
            raise UsageError(
                f"{len(shared)} of the gate's prompts are also calibration prompts.",
                *(repr(prompt) for prompt in shared[:5]),
                remedy="give --gate and --calibrate different prompts",
            )
