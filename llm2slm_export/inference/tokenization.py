"""Tokenization of prompts with the LLM's tokenizer. All invalid prompts are refused in one error."""

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

# A longer text is first tokenized up to this many characters, which usually shows that it is too long.
FIRST_CHARACTERS = 65_536
FIRST_PER_TOKEN = 16  # at least this many characters per token of the maximum prompt length
# No text is tokenized beyond this multiple of the first characters, whatever its normalizer does.
MOST_PARTS = 16
# If a beginning has this many tokens more than twice the maximum, the whole text cannot fit.
CLEARLY_TOO_LONG = 64

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PromptIds:
    """A tokenized prompt.

    Args:
        ids: token ids, with the special tokens that the LLM's tokenizer adds.
        dropped: number of truncated tokens. A very long text is tokenized in part, and only that part's tokens count.
        ms: milliseconds of tokenization.
    """

    ids: tuple[int, ...]
    dropped: int
    ms: float


@dataclass(frozen=True)
class _Tokenized:
    """The ids of a text's first `characters`, which are all of them unless it is too long.

    `tail`: number of special tokens at the end.
    """

    ids: list[int]
    tail: int
    characters: int


class PromptTokenizer:
    """The prompt template and the LLM's tokenizer. Thread-safe.

    Args:
        bundle: an opened bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._manifest, self._template = bundle.manifest, bundle.manifest.template
        self._path = bundle.path(bundle.manifest.tokenizer.llm)
        self._tokenizer = open_tokenizer(self._path)
        self._text_only: Tokenizer | None = None
        self._opening = ForkSafeLock()

    def read(
        self, prompts: Sequence[str], *, truncate: bool, room: int | None = None, split_special_tokens: bool = False
    ) -> list[PromptIds]:
        """Tokenize prompts.

        Args:
            truncate: truncate prompts that are too long instead of refusing them.
            room: maximum tokens of a truncated prompt, if that is below the pair's maximum.
            split_special_tokens: tokenize special tokens in prompts as plain text, as in transformers' tokenizers.

        Raises:
            UsageError: no prompts, not a sequence of strings, or `split_special_tokens` with special tokens in the prompt
                template.
            PromptError: prompts are empty or too long, with their number and the first of them.
            UnknownTokenError: the only problem are ids outside the pair's embedding tables; `prompts` has all of them.
        """
        # A list, because the checks would exhaust an iterator.
        prompts = prompts if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
        _check_prompts(prompts)
        tokenizer = self._text_only_tokenizer() if split_special_tokens else self._tokenizer
        most = self._manifest.max_prompt_tokens
        cut = (most if room is None else min(most, max(1, room))) if truncate else None
        rows: list[PromptIds] = []
        problems: dict[int, str] = {}
        unknown: dict[int, str] = {}
        for index, prompt in enumerate(prompts):
            started = perf_counter()
            text = self._template.fill(prompt)
            tokenized = self._tokenized(tokenizer, text)
            ids, dropped = _truncated(tokenized, cut)
            if cut is None and tokenized.characters < len(text):
                problems[index] = _too_many_characters(tokenized, len(text), most)
            elif not 0 < len(ids) <= most:
                problems[index] = f"{len(ids)} tokens, at most {most}" if ids else "no tokens"
            elif beyond := [id for id in dict.fromkeys(ids) if id >= self._rows]:
                unknown[index] = self._unknown_tokens(beyond)
            # After the first problem no ids are kept, to save memory with many prompts.
            rows.append(PromptIds(() if problems else tuple(ids), dropped, (perf_counter() - started) * 1e3))
        self._refuse(problems, unknown, len(rows), split=split_special_tokens)
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _text_only_tokenizer(self) -> Tokenizer:
        """A tokenizer that encodes special tokens in prompts as plain text."""
        with self._opening:
            if self._text_only is None:
                # A second tokenizer: the setting is global to one, and other threads may be using the first.
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
                        f"The prompt template of {self._manifest.name!r} has special tokens, which split_special_tokens would "
                        "split.",
                        *map(repr, held),
                        remedy="leave out split_special_tokens (--split-special-tokens)",
                    )
                self._text_only = tokenizer
            return self._text_only

    def _tokenized(self, tokenizer: Tokenizer, text: str) -> _Tokenized:
        """Tokenize a text, or enough of its beginning to show that it is too long.

        The tokens of a beginning hardly depend on the rest of the text. If it has more than twice the maximum number of
        tokens, the whole text does not fit.
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
        """Rows of the pair's embedding tables. Ids from here on are refused."""
        known = self._manifest.prompt_vocab
        return float("inf") if known is None else known

    def _unknown_tokens(self, ids: Sequence[int]) -> str:
        named = [f"{self._tokenizer.id_to_token(id)!r} (id {id})" for id in ids[:3]]
        more = [f"{len(ids) - 3} more"] if len(ids) > 3 else []
        return f"{', '.join([*named, *more])}: the pair's tables have {self._manifest.prompt_vocab} rows"

    def _refuse(self, problems: Mapping[int, str], unknown: Mapping[int, str], total: int, *, split: bool) -> None:
        refused = {**problems, **unknown}
        if not refused:
            return
        fact = f"{len(refused)} of {total} prompts cannot be run by {self._manifest.name!r}."
        cure = "remove these tokens" if split else (
            "remove these tokens, or, if they are special tokens, tokenize them as text with "
            "split_special_tokens=True (--split-special-tokens)"
        )  # fmt: skip
        if not problems:
            raise UnknownTokenError(fact, remedy=cure, prompts=unknown)
        cuts = "shorten these prompts, or set truncate=True (--truncate)"
        raise PromptError(fact, remedy=f"{cuts}; {cure}" if unknown else cuts, prompts=refused)


def _truncated(tokenized: _Tokenized, cut: int | None) -> tuple[list[int], int]:
    """The ids after truncation to `cut` tokens, and the number of dropped ids."""
    ids = tokenized.ids
    dropped = max(0, len(ids) - cut) if cut is not None else 0
    if not dropped:
        return ids, 0
    # The appended end-of-sequence token is kept, because the model expects it.
    end = len(ids) - tokenized.tail
    return ids[: end - dropped] + ids[end:], dropped


def _too_many_characters(tokenized: _Tokenized, characters: int, most: int) -> str:
    if len(tokenized.ids) > most:
        return f"{len(tokenized.ids)} tokens in the first {tokenized.characters} of {characters} characters, at most {most}"
    return f"{characters} characters, at most {tokenized.characters}"


def open_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.json, with its padding and truncation disabled: a training run may have saved them.

    Raises:
        BundleError: the file is not a valid tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    except BaseException as error:
        # A panic in Rust is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(
            f"{path} cannot be opened as a tokenizer.", " ".join(str(error).split())[:500],
            remedy="copy the bundle again, or build it again",
        ) from error  # fmt: skip
    return tokenizer


def tokens_without_rows(tokenizer: Tokenizer, rows: int) -> list[str]:
    """A tokenizer's tokens with ids from `rows` on, sorted by id: an embedding table of `rows` rows lacks them."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return [token for token, id in sorted(vocabulary.items(), key=lambda item: item[1]) if id >= rows]


def _encode(tokenizer: Tokenizer, text: str, *, special_tokens: bool) -> tokenizers.Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=special_tokens)
    except BaseException as error:
        # A panic in Rust is not an Exception.
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
        raise PromptError(
            "Some prompts are empty.", remedy="remove the empty prompts, or give them text", prompts=empty
        )
    broken = dict(_surrogates(prompts))
    if broken:
        raise PromptError(
            "Some prompts are not Unicode text: they hold lone surrogates.",
            remedy="read them as UTF-8, or drop these characters",
            prompts=broken,
        )


def _surrogates(prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The index of each prompt with lone surrogates, and the first of them."""
    for index, prompt in enumerate(prompts):
        if (found := lone_surrogate(prompt)) is not None:
            yield index, found


def lone_surrogate(text: str) -> str | None:
    """The first lone surrogate of a text and its place; None: there is none."""
    found = _SURROGATE.search(text)
    return None if found is None else f"{found[0]!a} at character {found.start()}"


def _short(value: object) -> str:
    """The repr of a value, shortened for a message."""
    shown = repr(value[:60] if isinstance(value, str) else value)
    return shown if len(shown) <= 80 and not (isinstance(value, str) and len(value) > 60) else f"{shown[:79]}…"
