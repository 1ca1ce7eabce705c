"""Progress and losses of transformers' trainer."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerState

from llm2slm_export.authoring.progress import Progress

# transformers' names of logged values, in the order of a line.
_NAMES = {
    "epoch": "epoch", "loss": "loss", "eval_loss": "validation loss", "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}  # fmt: skip


class StepLog(TrainerCallback):
    """Reports a trainer's steps, and prints a line for its losses.

    Args:
        progress: receives the steps.
        say: prints a line.
    """

    def __init__(self, progress: Progress, say: Callable[[str], None]) -> None:
        self._progress, self._say = progress, say

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Begin the task, with the steps before a resumed checkpoint done."""
        self._progress.start("training", state.max_steps)
        self._progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Count a step."""
        self._progress.advance(1)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any], **_: Any) -> None:  # noqa: ARG002
        """Print the losses and learning rate; other values, such as run times, have no line."""
        if not logs.keys().isdisjoint({"loss", "eval_loss"}):
            values = ", ".join(f"{name} {logs[key]:.4g}" for key, name in _NAMES.items() if key in logs)
            self._say(f"step {state.global_step} of {state.max_steps}: {values}")
