"""From prompts to the ids the LLM reads. It refuses what cannot be read, all of it at once; it knows no model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from tokenizers import Tokenizer

from llm2slm_export.bundle import Bundle
from llm2slm_export.errors import BundleError, PromptError, UsageError


@dataclass(frozen=True)
class PromptIds:
    """One prompt as the LLM reads it.

    Args:
        ids: with the special tokens that the LLM's tokenizer adds.
        dropped: tokens cut because there were too many.
        ms: what tokenizing took.
    """

    ids: tuple[int, ...]
    dropped: int
    ms: float


class PromptTokenizer:
    """The LLM's tokenizer behind the pair's template.

    Args:
        bundle: an opened bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        self._tokenizer = open_tokenizer(bundle.path(bundle.manifest.tokenizer.llm))

    def read(self, prompts: Sequence[str], *, truncate: bool, room: int | None = None) -> list[PromptIds]:
        """The ids of every prompt.

        Args:
            truncate: cut prompts that are too long instead of refusing them.
            room: cut them to so many tokens, where the response leaves no more.

        Raises:
            UsageError: no prompts, or something else than a sequence of strings.
            PromptError: prompts that are empty or too long, all of them named.
        """
        # A copy: checking an iterator would use it up.
        prompts = prompts if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
        _check_prompts(prompts)
        most = self._manifest.max_prompt_tokens
        cut = (most if room is None else min(most, max(1, room))) if truncate else None
        rows = [self._read_one(prompt, cut) for prompt in prompts]
        problems = [
            f"prompt {index}: no tokens" if not row.ids else f"prompt {index}: {len(row.ids)} tokens, at most {most}"
            for index, row in enumerate(rows)
            if not 0 < len(row.ids) <= most
        ]
        if problems:
            raise PromptError(
                f"{len(problems)} of {len(rows)} prompts cannot be run by {self._manifest.name!r}.",
                *problems,
                remedy="shorten the prompts named, or have them cut with truncate=True (--truncate)",
            )
        return rows

    def _read_one(self, prompt: str, cut: int | None) -> PromptIds:
        started = perf_counter()
        # Not str.format: a template may hold other braces.
        encoded = self._tokenizer.encode(self._manifest.prompt_template.replace("{prompt}", prompt))
        ids: list[int] = encoded.ids
        dropped = max(0, len(ids) - cut) if cut is not None else 0
        if dropped:
            # The model expects the end-of-sequence token that its tokenizer appends.
            tail = 1 if encoded.special_tokens_mask[-1] else 0
            ids = ids[: len(ids) - tail - dropped] + ids[len(ids) - tail :]
        return PromptIds(tuple(ids), dropped, (perf_counter() - started) * 1e3)


def open_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.json`, without the padding and truncation that a training run may have left in it.

    Raises:
        BundleError: it is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    except BaseException as error:
        # What Rust panics with is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(
            f"{path} is not a tokenizer that can be opened.", " ".join(str(error).split())[:500],
            remedy="copy the bundle again, or build it again",
        ) from error  # fmt: skip
    return tokenizer


def _check_prompts(prompts: Sequence[str]) -> None:
    if not isinstance(prompts, str | list):
        raise UsageError(
            f"The prompts are a {type(prompts).__name__}.", f"got: {prompts!r}", remedy="give a list of strings"
        )
    if isinstance(prompts, str):
        raise UsageError(
            "The prompts are one string, not a sequence of strings.", f"got: {prompts!r}", remedy=f"give [{prompts!r}]"
        )
    if not prompts:
        raise UsageError("There are no prompts.", f"got: {prompts!r}", remedy="give at least one prompt")
    wrong = [f"prompt {i}: {type(prompt).__name__}" for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    if wrong:
        raise UsageError("Some prompts are not strings.", *wrong, remedy="give strings")
    empty = [f"prompt {i}: {prompt!r}" for i, prompt in enumerate(prompts) if not prompt.strip()]
    if empty:
        raise PromptError("Some prompts are empty.", *empty, remedy="leave them out, or give them text")
    broken = [f"prompt {i}: {prompt!a}" for i, prompt in enumerate(prompts) if _has_surrogate(prompt)]
    if broken:
        raise PromptError(
            "Some prompts are not Unicode text: they hold lone surrogates.",
            *broken,
            remedy="read them as UTF-8, or drop the characters shown as \\ud8xx … \\udfxx",
        )


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
