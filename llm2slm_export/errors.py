"""The errors a user can see. Every one says the fact, the evidence and what to type next.

Llm2SlmError
├── UsageError            a call or command that cannot mean anything (exit code 2)
├── MissingExtraError     an optional dependency is not installed
├── RecipeError           a recipe file or an override
├── CompositionError      a composition on disk, or models that do not fit together
├── BundleError           a bundle on disk, or one whose decoder gives no finite logits
├── EncodingError         an encoding on disk, or one that another pair made
├── DataError             training or prompt data
├── PromptError           a prompt that cannot be run
│   └── UnknownTokenError     one with a token that the pair has no row for
├── DeviceError           a device that cannot be had
├── EngineError           an engine that cannot be built or run
├── TrainingError         training that cannot go on
└── ParityError           an exported graph that does not match the reference (bundle/parity_report.py)
"""

import importlib.util
from collections.abc import Iterable, Mapping

LISTED = 5  # reasons of a kind named in one message; the rest are counted


class Llm2SlmError(Exception):
    """A failure with a message made for the person who reads it.

    Args:
        fact: what happened, one sentence, with the value at fault in it.
        evidence: every reason found, one line each (paths, expected against got).
        remedy: what to type or change next.
    """

    exit_code = 1

    def __init__(self, fact: str, *evidence: str, remedy: str) -> None:
        # A file that somebody else wrote may be quoted: its text is shown, and never obeyed by a terminal.
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
    """Prompts that hold tokens without a row in the pair's tables. The prompts that are not in `prompts` can be run."""


class DeviceError(Llm2SlmError):
    pass


class EngineError(Llm2SlmError):
    pass


class TrainingError(Llm2SlmError):
    pass


def printable(text: str) -> str:
    """Text with its control characters, lone surrogates and changes of direction as escapes; lines and tabs stay."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    return (
        character
        if character.isprintable() or character in "\n\t" or (character.isspace() and character > "\x9f")
        else ascii(character)[1:-1]
    )


def require_extra(extra: str, *modules: str, purpose: str) -> None:
    """Raise `MissingExtraError` naming the pip line unless every module can be found. Imports nothing."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise MissingExtraError(
            f"{purpose} needs the [{extra}] extra.",
            f"not installed: {', '.join(missing)}",
            remedy=f"pip install 'llm2slm-export[{extra}]'",
        )


def listed(reasons: Iterable[str]) -> list[str]:
    """The first few of many reasons, and how many more there are."""
    reasons = list(reasons)
    return reasons if len(reasons) <= LISTED else [*reasons[:LISTED], f"and {len(reasons) - LISTED} more"]
