"""From logits to tokens to text: options, logits processing, sampling, stopping.

Names, defaults and the order of processing are those of transformers' `generate`. numpy only: no runtime, no tokenizer.
"""

import difflib
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llm2slm_export.bundle import GenerationDefaults, SpecialIds
from llm2slm_export.errors import UsageError
from llm2slm_export.runtime.backend import Ids, Logits

FinishReason = Literal["stop", "length"]
Mask = npt.NDArray[np.bool_]

_UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def _whole(value: Any, least: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | np.integer) and bool(value >= least)


def _number(value: Any, least: float, most: float = math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    return bool(least <= value <= most and math.isfinite(value))


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_new_tokens", lambda v: _whole(v, 1), "a whole number, at least 1"),
    ("min_new_tokens", lambda v: _whole(v, 0), "a whole number, at least 0"),
    ("do_sample", lambda v: isinstance(v, bool), "True or False"),
    ("temperature", lambda v: _number(v, 0), "a number above 0"),
    ("top_k", lambda v: _whole(v, 0), "a whole number, at least 0 (0: no limit)"),
    ("top_p", lambda v: _number(v, 0, 1), "a number from 0 to 1"),
    ("min_p", lambda v: _number(v, 0, 1), "a number from 0 to 1"),
    ("repetition_penalty", lambda v: _number(v, 0) and v > 0, "a number above 0 (1: no penalty)"),
    ("seed", lambda v: v is None or _whole(v, 0), "a whole number, at least 0"),
    (
        "stop",
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
        "strings, none of them empty",
    ),
)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a response is generated. transformers' names and meanings, plus `seed` and `stop`.

    Args:
        seed: makes sampling repeatable; None draws anew every time.
        stop: strings that end a response; the text is cut before the first of them.

    Raises:
        UsageError: naming every value that cannot be used.
    """

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name}: must be {wanted}, got {getattr(self, name)!r}"
            for name, accepts, wanted in _RULES
            if not accepts(getattr(self, name))
        ]
        if not problems and self.min_new_tokens > self.max_new_tokens:
            problems.append(f"min_new_tokens: {self.min_new_tokens} is above max_new_tokens, {self.max_new_tokens}")
        if not problems and self.do_sample and self.temperature == 0:
            problems.append("temperature: must be above 0 to sample, got 0; do_sample=False is greedy")
        if problems:
            raise UsageError("These generation options cannot be used.", *problems, remedy="mend the values named")

    @classmethod
    def resolve(cls, defaults: GenerationDefaults, **overrides: Any) -> "GenerationOptions":
        """A bundle's defaults with a caller's overrides; an override of None means the default.

        Raises:
            UsageError: naming every unknown option, or every value that cannot be used.
        """
        names = [field.name for field in fields(cls)]
        unknown = [name for name in overrides if name not in names]
        if unknown:
            raise UsageError(
                f"Unknown generation option{'s' if len(unknown) > 1 else ''}.",
                *(_near_miss(name, names) for name in unknown),
                remedy=f"options: {', '.join(names)}",
            )
        given = {name: value for name, value in overrides.items() if value is not None}
        stop = given.get("stop")
        if isinstance(stop, str | list):
            given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(**(defaults.model_dump() | given))


def _near_miss(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return name + (f": did you mean {close[0]}?" if close else "")


def penalise_seen(scores: Logits, seen: Mask, penalty: float) -> Logits:
    """Scores [batch, vocab] with those of `seen` ids [batch, vocab] made smaller: `repetition_penalty`."""
    penalised = np.where(scores < 0, scores * penalty, scores / penalty)
    return np.where(seen, penalised, scores).astype(np.float32)


def forbid(scores: Logits, ids: Sequence[int]) -> Logits:
    """Scores [batch, vocab] with those of `ids` at minus infinity."""
    forbidden = scores.copy()
    forbidden[:, list(ids)] = -np.inf
    return forbidden


def keep_top_k(scores: Logits, top_k: int) -> Logits:
    """Scores [batch, vocab] with all below the k-th highest of their row at minus infinity."""
    k = min(top_k, scores.shape[1])
    threshold = np.partition(scores, -k, axis=1)[:, -k, None]  # [batch, 1]
    return np.where(scores < threshold, np.float32(-np.inf), scores)


def keep_top_p(scores: Logits, top_p: float) -> Logits:
    """Scores [batch, vocab] with all outside the smallest set of probability `top_p` at minus infinity."""
    order = np.argsort(scores, axis=1, kind="stable")
    cumulative = np.cumsum(softmax(np.take_along_axis(scores, order, axis=1)), axis=1, dtype=np.float64)
    removed_in_order = cumulative <= 1 - top_p
    removed_in_order[:, -1] = False
    removed = np.zeros_like(removed_in_order)
    np.put_along_axis(removed, order, removed_in_order, axis=1)
    return np.where(removed, np.float32(-np.inf), scores)


def keep_min_p(scores: Logits, min_p: float) -> Logits:
    """Scores [batch, vocab] with all less probable than `min_p` times the likeliest of their row at minus infinity."""
    probabilities = softmax(scores)
    removed = probabilities < min_p * probabilities.max(axis=1, keepdims=True)
    return np.where(removed, np.float32(-np.inf), scores)


def softmax(scores: Logits) -> Logits:
    """Probabilities [batch, vocab] of scores [batch, vocab]."""
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: Logits = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def warp(scores: Logits, options: GenerationOptions) -> Logits:
    """Scores [batch, vocab] as sampling sees them: temperature, top-k, top-p, min-p, in transformers' order."""
    if options.temperature != 1.0:
        scores = scores / np.float32(options.temperature)
    if options.top_k:
        scores = keep_top_k(scores, options.top_k)
    if options.top_p < 1.0:
        scores = keep_top_p(scores, options.top_p)
    if options.min_p:
        scores = keep_min_p(scores, options.min_p)
    return scores


def draw(probabilities: npt.NDArray[np.float32], generator: np.random.Generator) -> int:
    """One id from probabilities [vocab], by one uniform number: rows with streams of their own stay independent."""
    cumulative = np.cumsum(probabilities, dtype=np.float64)
    cumulative /= cumulative[-1]
    return int(np.searchsorted(cumulative, generator.random(), side="right"))


class TokenChooser:
    """Chooses the next token of every row of a batch, call after call.

    Args:
        special_ids: `eos` and `decoder_start` count.
        choices: ids from here on are never chosen: the tokenizer cannot produce them.
        batch: rows.
        first_row: index of the first row among all prompts, so that batch borders do not change what is drawn.
    """

    def __init__(
        self, options: GenerationOptions, *, special_ids: SpecialIds, choices: int, batch: int, first_row: int = 0
    ) -> None:
        self._options = options
        self._choices = choices
        self._eos = [id for id in special_ids.eos if id < choices]
        self._chosen = 0
        self._seen = np.zeros((batch, choices), bool)
        if special_ids.decoder_start is not None and special_ids.decoder_start < choices:
            self._seen[:, special_ids.decoder_start] = True
        entropy = secrets.randbits(64) if options.seed is None else options.seed
        rows = range(first_row, first_row + batch)
        self._generators = [np.random.default_rng([entropy, row]) for row in rows] if options.do_sample else []

    def choose(self, logits: Logits, active: Mask) -> Ids:
        """The next id of each row, [batch], from logits [batch, vocab]; that of a row not `active` [batch] is any id."""
        # Cutting first equals suppressing them (score minus infinity) at any later point.
        scores = logits[:, : self._choices]
        if self._options.repetition_penalty != 1.0:
            scores = penalise_seen(scores, self._seen, self._options.repetition_penalty)
        if self._chosen < self._options.min_new_tokens:
            scores = forbid(scores, self._eos)
        ids = self._sample(scores, active) if self._options.do_sample else scores.argmax(axis=1)
        self._seen[np.arange(len(ids)), ids] = True
        self._chosen += 1
        return ids

    def _sample(self, scores: Logits, active: Mask) -> Ids:
        probabilities = softmax(warp(scores, self._options))
        ids = np.zeros(len(scores), np.int64)
        for row in np.flatnonzero(active):
            ids[row] = draw(probabilities[row], self._generators[row])
        return ids


class TextStream:
    """The text of a growing response: never half a character, never a part of a stop string.

    Args:
        decode: ids → text, special tokens left out.
        stop: strings that end the text, which is cut before the first of them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        # A window of ids is decoded, not all of them; `_shown` is the part of it whose text is out.
        self._start = self._read = 0
        self._shown = self._text = self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; "" where none did."""
        self._ids.append(token_id)
        piece = self._piece()
        if not piece or piece.endswith(_UNFINISHED_CHARACTER):
            return ""
        self._start, self._read = self._read, len(self._ids)
        self._shown = self._decode(self._ids[self._start :])
        return self._release(piece, last=False)

    def finish(self) -> str:
        """What was held back, at the end of a response."""
        whole = self._decode(self._ids)
        piece = whole[len(self._text) :] if whole.startswith(self._text) else self._piece()
        return self._release(piece, last=True)

    def _piece(self) -> str:
        window = self._decode(self._ids[self._start :])
        if window.startswith(self._shown):
            return window[len(self._shown) :]
        # A byte that spoils the character before it: what is out stays out.
        return self._decode(self._ids[self._read :])

    def _release(self, piece: str, *, last: bool) -> str:
        self._text += piece
        self._held += piece
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        self.stopped = bool(found)
        kept = 0 if last else self._stop_prefix()
        end = min(found) if found else len(self._held) - kept
        out, self._held = self._held[:end], self._held[end:]
        return out

    def _stop_prefix(self) -> int:
        """The length of the longest end of the held text that a stop string begins with."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)
