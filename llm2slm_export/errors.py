"""The errors a user can see. Each states the fact, the evidence and the remedy.

Llm2SlmError
├── UsageError            an invalid call or command (exit code 2)
├── MissingExtraError     an optional dependency is not installed
├── RecipeError           a recipe file or an override
├── CompositionError      a composition on disk, or models that do not fit together
├── BundleError           a bundle on disk, or a decoder whose logits are not finite
├── EncodingError         an encoding on disk, or an encoding of another pair
├── DataError             training or prompt data
├── PromptError           a prompt that cannot be run
│   └── UnknownTokenError     a prompt with a token id outside the pair's embedding tables
├── ResponseError         a given response that cannot be scored
├── QueueFullError        more requests wait than a scheduler holds
├── ClosedError           a scheduler that has been closed, or whose thread has failed
├── DeadlineError         a request that was not finished in time
├── RequestCancelledError a request that was cancelled
├── DeviceError           an unavailable device
├── EngineError           a TensorRT engine that cannot be built or run
├── TrainingError         training that cannot continue
└── ParityError           an exported graph that does not match the reference (bundle/parity_report.py)
"""

import importlib.util
from collections.abc import Iterable, Mapping

LISTED = 5  # reasons of one kind shown in a message; the rest are counted


class Llm2SlmError(Exception):
    """The base of all errors a user can see.

    Args:
        fact: what happened, in one sentence, with the value at fault.
        evidence: the reasons, one line each (paths, expected and actual values).
        remedy: the command to type or the value to change.
    """

    exit_code = 1

    def __init__(self, fact: str, *evidence: str, remedy: str) -> None:
        # A message may quote an untrusted file: escapes keep a terminal from executing its control sequences.
        self.fact, self.evidence, self.remedy = printable(fact), tuple(map(printable, evidence)), printable(remedy)
        super().__init__("\n".join([self.fact, *(f"  - {line}" for line in self.evidence), f"  → {self.remedy}"]))


class UsageError(Llm2SlmError):
    exit_code = 2


class MissingExtraError(Llm2SlmError):
    pass


class RecipeError(Llm2SlmError):
    exit_code = 2


class CompositionError(Llm2SlmError):
    pass


class BundleError(Llm2SlmError):
    pass


class EncodingError(Llm2SlmError):
    pass


class DataError(Llm2SlmError):
    pass


class PromptError(Llm2SlmError):
    """Prompts that cannot be run.

    Args:
        prompts: the reason for each prompt that is refused, by its index in the call. The first ones become evidence.
    """

    def __init__(self, fact: str, *evidence: str, remedy: str, prompts: Mapping[int, str] | None = None) -> None:
        self.prompts = dict(sorted((prompts or {}).items()))
        reasons = (f"prompt {index}: {reason}" for index, reason in self.prompts.items())
        super().__init__(fact, *evidence, *listed(reasons), remedy=remedy)


class UnknownTokenError(PromptError):
    """Prompts with token ids outside the pair's embedding tables. Prompts that are not in `prompts` can be run."""


class ResponseError(Llm2SlmError):
    """Given responses that cannot be scored.

    Args:
        responses: the reason for each response that is refused, by the index of its prompt and its own.
        prompts: number of prompts. The first reasons become evidence, with the prompt's index if there are several.
    """

    def __init__(
        self,
        fact: str,
        *evidence: str,
        remedy: str,
        responses: Mapping[tuple[int, int], str] | None = None,
        prompts: int = 1,
    ) -> None:
        self.responses = dict(sorted((responses or {}).items()))
        reasons = (
            f"prompt {prompt}, response {index}: {reason}" if prompts > 1 else f"response {index}: {reason}"
            for (prompt, index), reason in self.responses.items()
        )
        super().__init__(fact, *evidence, *listed(reasons), remedy=remedy)


class QueueFullError(Llm2SlmError):
    pass


class ClosedError(UsageError):
    pass


class DeadlineError(Llm2SlmError):
    pass


class RequestCancelledError(Llm2SlmError):
    pass


class DeviceError(Llm2SlmError):
    pass


class EngineError(Llm2SlmError):
    pass


class TrainingError(Llm2SlmError):
    pass


def printable(text: str) -> str:
    """Escape control characters, lone surrogates and bidirectional controls in text. Line breaks and tabs stay."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    return (
        character
        if character.isprintable() or character in "\n\t" or (character.isspace() and character > "\x9f")
        else ascii(character)[1:-1]
    )


def require_extra(extra: str, *modules: str, purpose: str) -> None:
    """Check that the modules of an extra are installed, without importing them.

    Raises:
        MissingExtraError: a module is not installed; the remedy is the pip command.
    """
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise MissingExtraError(
            f"{purpose} needs the [{extra}] extra.",
            f"not installed: {', '.join(missing)}",
            remedy=f"pip install 'llm2slm-export[{extra}]'",
        )


def listed(reasons: Iterable[str]) -> list[str]:
    """The first `LISTED` reasons, and the number of the others."""
    reasons = list(reasons)
    return reasons if len(reasons) <= LISTED else [*reasons[:LISTED], f"and {len(reasons) - LISTED} more"]
