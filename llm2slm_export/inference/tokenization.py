"""From prompts to the ids the LLM reads. It refuses what cannot be read, all of it at once; it knows no model."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import tokenizers
from tokenizers import Tokenizer

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.errors import BundleError, PromptError, UnknownTokenError, UsageError, listed
from llm2slm_export.inference.runtime.forks import ForkSafeLock

# Of a longer text, so many characters are tokenized before the rest: enough to see that it is too long.
FIRST_CHARACTERS = 65_536
FIRST_PER_TOKEN = 16  # of the most tokens that are read
# No text is tokenized beyond so many times the first characters, whatever its normalizer would make of it.
MOST_PARTS = 16
# So many tokens more than twice the most, and no text that goes on makes them fit again.
CLEARLY_TOO_LONG = 64

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PromptIds:
    """One prompt as the LLM reads it.

    Args:
        ids: with the special tokens that the LLM's tokenizer adds.
        dropped: tokens cut because there were too many; of a very long text, those of the part that was tokenized.
        ms: what tokenizing took.
    """

    ids: tuple[int, ...]
    dropped: int
    ms: float


@dataclass(frozen=True)
class _Tokenized:
    """A text's ids, or those of its first `characters`, by which it is too long. `tail`: ids that close any prompt."""

    ids: list[int]
    tail: int
    characters: int


class PromptTokenizer:
    """The LLM's tokenizer behind the pair's template. Threads may share one.

    Args:
        bundle: an opened bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._manifest, self._template = bundle.manifest, bundle.manifest.template
        self._path = bundle.path(bundle.manifest.tokenizer.llm)
        self._tokenizer = open_tokenizer(self._path)
        self._splitting: Tokenizer | None = None
        self._opening = ForkSafeLock()

    def read(
        self, prompts: Sequence[str], *, truncate: bool, room: int | None = None, split_special_tokens: bool = False
    ) -> list[PromptIds]:
        """The ids of every prompt.

        Args:
            truncate: cut prompts that are too long instead of refusing them.
            room: cut them to so many tokens, where the response leaves no more.
            split_special_tokens: take text that spells a special token as any other text, as transformers' tokenizers do.

        Raises:
            UsageError: no prompts, something else than a sequence of strings, or `split_special_tokens` where the prompt
                template itself holds special tokens.
            PromptError: prompts that are empty or too long: the first ones are named, all are counted.
            UnknownTokenError: nothing but prompts with tokens that the pair has no row for, all of them in `prompts`.
        """
        # A copy: checking an iterator would use it up.
        prompts = prompts if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
        _check_prompts(prompts)
        tokenizer = self._split() if split_special_tokens else self._tokenizer
        most = self._manifest.max_prompt_tokens
        cut = (most if room is None else min(most, max(1, room))) if truncate else None
        rows: list[PromptIds] = []
        problems: dict[int, str] = {}
        unknown: dict[int, str] = {}
        for index, prompt in enumerate(prompts):
            started = perf_counter()
            text = self._template.fill(prompt)
            tokenized = self._tokenized(tokenizer, text)
            ids, dropped = _shortened(tokenized, cut)
            if cut is None and tokenized.characters < len(text):
                problems[index] = _too_many_characters(tokenized, len(text), most)
            elif not 0 < len(ids) <= most:
                problems[index] = f"{len(ids)} tokens, at most {most}" if ids else "no tokens"
            elif beyond := [id for id in dict.fromkeys(ids) if id >= self._rows]:
                unknown[index] = self._without_rows(beyond)
            # Of what is refused nothing is kept: there may be a hundred thousand of them.
            rows.append(PromptIds(() if problems else tuple(ids), dropped, (perf_counter() - started) * 1e3))
        self._refuse(problems, unknown, len(rows), split=split_special_tokens)
        return rows

    def _split(self) -> Tokenizer:
        """The tokenizer that takes text for text, whatever it spells."""
        with self._opening:
            if self._splitting is None:
                # One of its own: the setting is the tokenizer's, and other threads are using that one.
                tokenizer = open_tokenizer(self._path)
                tokenizer.encode_special_tokens = True
                held = [
                    part
                    for part in self._template.around
                    if _encode(tokenizer, part, special_tokens=False).ids
                    != _encode(self._tokenizer, part, special_tokens=False).ids
                ]
                if held:
                    raise UsageError(
                        f"split_special_tokens would take the prompt template of {self._manifest.name!r} apart: it holds "
                        "special tokens.",
                        *map(repr, held),
                        remedy="leave out split_special_tokens (--split-special-tokens)",
                    )
                self._splitting = tokenizer
            return self._splitting

    def _tokenized(self, tokenizer: Tokenizer, text: str) -> _Tokenized:
        """A text tokenized, or as much of it as shows that it is too long.

        What a tokenizer makes of a text's beginning hardly depends on what follows, so that a beginning of more than twice
        as many tokens as are read is not the beginning of a text that fits.
        """
        most = self._manifest.max_prompt_tokens
        first = max(FIRST_CHARACTERS, FIRST_PER_TOKEN * most)
        parts = [len(text)] if len(text) <= first else [first, min(len(text), first * MOST_PARTS)]
        for characters in parts:
            encoded = _encode(tokenizer, text[:characters], special_tokens=self._template.special_tokens)
            tail = 1 if encoded.special_tokens_mask and encoded.special_tokens_mask[-1] else 0
            if len(encoded.ids) > 2 * most + CLEARLY_TOO_LONG:
                break
        return _Tokenized(encoded.ids, tail, characters)

    @property
    def _rows(self) -> float:
        """Ids from here on have no row in the pair's tables."""
        known = self._manifest.prompt_vocab
        return float("inf") if known is None else known

    def _without_rows(self, ids: Sequence[int]) -> str:
        named = [f"{self._tokenizer.id_to_token(id)!r} (id {id})" for id in ids[:3]]
        more = [f"{len(ids) - 3} more"] if len(ids) > 3 else []
        return f"{', '.join([*named, *more])}: the pair's tables have {self._manifest.prompt_vocab} rows"

    def _refuse(self, problems: Mapping[int, str], unknown: Mapping[int, str], total: int, *, split: bool) -> None:
        refused = {**problems, **unknown}
        if not refused:
            return
        fact = f"{len(refused)} of {total} prompts cannot be run by {self._manifest.name!r}."
        cure = "leave the tokens named out" if split else (
            "leave the tokens named out, or, where they are special tokens, have them taken as text with "
            "split_special_tokens=True (--split-special-tokens)"
        )  # fmt: skip
        if not problems:
            raise UnknownTokenError(fact, remedy=cure, prompts=unknown)
        cuts = "shorten the prompts named, or have them cut with truncate=True (--truncate)"
        raise PromptError(fact, remedy=f"{cuts}; {cure}" if unknown else cuts, prompts=refused)


def _shortened(tokenized: _Tokenized, cut: int | None) -> tuple[list[int], int]:
    """The ids that are read, and how many are dropped."""
    ids = tokenized.ids
    dropped = max(0, len(ids) - cut) if cut is not None else 0
    if not dropped:
        return ids, 0
    # The model expects the end-of-sequence token that its tokenizer appends.
    end = len(ids) - tokenized.tail
    return ids[: end - dropped] + ids[end:], dropped


def _too_many_characters(tokenized: _Tokenized, characters: int, most: int) -> str:
    if len(tokenized.ids) > most:
        return f"{len(tokenized.ids)} tokens in the first {tokenized.characters} of {characters} characters, at most {most}"
    return f"{characters} characters, at most {tokenized.characters}"


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


def tokens_without_rows(tokenizer: Tokenizer, rows: int) -> list[str]:
    """The tokens that a tokenizer can produce and a table of so many rows has none for, by id."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return [token for token, id in sorted(vocabulary.items(), key=lambda item: item[1]) if id >= rows]


def _encode(tokenizer: Tokenizer, text: str, *, special_tokens: bool) -> tokenizers.Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=special_tokens)
    except BaseException as error:
        # What Rust panics with is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(
            "The LLM's tokenizer fails on a prompt.",
            f"{str(error).splitlines()[0][:200] if str(error) else type(error).__name__}, on {_short(text)}",
            remedy="leave the prompt out, or build the bundle with the tokenizer that its model was published with",
        ) from error


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise UsageError(
            "The prompts are one string, not a sequence of strings.", f"got: {_short(prompts)}",
            remedy=f"give [{_short(prompts)}]",
        )  # fmt: skip
    if not isinstance(prompts, list):
        raise UsageError(
            f"The prompts are a {type(prompts).__name__}.", f"got: {_short(prompts)}", remedy="give a list of strings"
        )
    if not prompts:
        raise UsageError("There are no prompts.", f"got: {prompts!r}", remedy="give at least one prompt")
    wrong = [f"prompt {i}: {type(prompt).__name__}" for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    if wrong:
        raise UsageError("Some prompts are not strings.", *listed(wrong), remedy="give strings")
    empty = {i: _short(prompt) for i, prompt in enumerate(prompts) if not prompt.strip()}
    if empty:
        raise PromptError("Some prompts are empty.", remedy="leave them out, or give them text", prompts=empty)
    broken = dict(_broken(prompts))
    if broken:
        raise PromptError(
            "Some prompts are not Unicode text: they hold lone surrogates.",
            remedy="read them as UTF-8, or drop the characters named",
            prompts=broken,
        )


def _broken(prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The index of each prompt that is no Unicode text, and what it holds."""
    for index, prompt in enumerate(prompts):
        if found := _SURROGATE.search(prompt):
            yield index, f"{found[0]!a} at character {found.start()}"


def _short(value: object) -> str:
    """A value's beginning, for a message."""
    shown = repr(value[:60] if isinstance(value, str) else value)
    return shown if len(shown) <= 80 and not (isinstance(value, str) and len(value) > 60) else f"{shown[:79]}…"
