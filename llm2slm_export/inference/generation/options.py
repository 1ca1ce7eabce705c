"""Generation options, and the rules for their values and combinations."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from llm2slm_export.bundle.manifest import MOST_NEW_TOKENS, MOST_ROWS, GenerationDefaults
from llm2slm_export.errors import UsageError

FinishReason = Literal["stop", "length"]

_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
_BEAMS_ONLY = ("length_penalty", "early_stopping")


def is_whole(value: Any, least: int, most: int | None = None) -> bool:
    """Whether a value is a whole number, Python's or NumPy's, from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return bool(least <= value and (most is None or value <= most))


def is_number(value: Any, least: float, most: float = math.inf) -> bool:
    """Whether a value is a finite number, Python's or NumPy's, from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    return bool(least <= value <= most and math.isfinite(value))


def _words(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(word, tuple) and word and all(is_whole(token_id, 0) for token_id in word) for word in value
    )


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "max_new_tokens",
        lambda v: is_whole(v, 1, MOST_NEW_TOKENS),
        f"a whole number, at least 1 and at most {MOST_NEW_TOKENS:,}",
    ),
    ("min_new_tokens", lambda v: is_whole(v, 0), "a whole number, at least 0"),
    ("do_sample", lambda v: isinstance(v, bool), "True or False"),
    (
        "num_beams",
        lambda v: is_whole(v, 1, MOST_ROWS),
        f"a whole number, at least 1 and at most {MOST_ROWS:,} (1: no beam search)",
    ),
    (
        "num_return_sequences",
        lambda v: is_whole(v, 1, MOST_ROWS),
        f"a whole number, at least 1 and at most {MOST_ROWS:,}",
    ),
    # length ** length_penalty must stay within float32.
    ("length_penalty", lambda v: is_number(v, -8, 8), "a number from -8 to 8"),
    ("early_stopping", lambda v: isinstance(v, bool) or v == "never", "True, False or 'never'"),
    # Beyond these bounds float32 scores overflow or become equal.
    ("temperature", lambda v: is_number(v, 0, 1e6) and (v == 0 or v >= 1e-6), "a number from 1e-6 to 1e6"),
    ("top_k", lambda v: is_whole(v, 0), "a whole number, at least 0 (0: no limit)"),
    ("top_p", lambda v: is_number(v, 0, 1), "a number from 0 to 1"),
    ("min_p", lambda v: is_number(v, 0, 1), "a number from 0 to 1"),
    ("typical_p", lambda v: is_number(v, 0, 1) and v > 0, "a number above 0, at most 1 (1: no limit)"),
    ("repetition_penalty", lambda v: is_number(v, 1e-6, 1e6), "a number from 1e-6 to 1e6 (1: no penalty)"),
    ("no_repeat_ngram_size", lambda v: is_whole(v, 0), "a whole number, at least 0 (0: no limit)"),
    ("bad_words_ids", _words, "non-empty sequences of token ids"),
    ("forced_bos_token_id", lambda v: v is None or is_whole(v, 0), "a token id"),
    ("forced_eos_token_id", lambda v: v is None or is_whole(v, 0), "a token id"),
    ("seed", lambda v: v is None or is_whole(v, 0), "a whole number, at least 0"),
    (
        "stop",
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
        "non-empty strings",
    ),
    ("output_scores", lambda v: isinstance(v, bool), "True or False"),
)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Generation options, with transformers' names and meanings, plus `seed` and `stop`.

    Args:
        bad_words_ids: sequences of token ids that are never generated.
        forced_bos_token_id: the token after the decoder start token.
        forced_eos_token_id: the last token of a response that reaches `max_new_tokens`.
        seed: random seed of sampling; None: a different one in each call.
        stop: strings that end a response. The text is cut before the first of them.
        output_scores: also return the log-probability of each token.

    Raises:
        UsageError: values are invalid or contradict each other, all of them named.
    """

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    bad_words_ids: tuple[tuple[int, ...], ...]
    forced_bos_token_id: int | None
    forced_eos_token_id: int | None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    output_scores: bool = False

    def __post_init__(self) -> None:
        _refuse(_problems({field.name: getattr(self, field.name) for field in fields(self)}, given=()))

    @classmethod
    def resolve(
        cls, defaults: GenerationDefaults, *, others: Sequence[str] = (), **overrides: Any
    ) -> "GenerationOptions":
        """Apply a caller's overrides to a bundle's defaults. An override of None means the default.

        Args:
            others: names of options that the caller accepts besides these, for the error.

        Raises:
            UsageError: options are unknown; or values are invalid, contradict each other, or are overrides without effect.
                All of them are named.
        """
        own = [field.name for field in fields(cls)]
        names = [*own, *others]
        unknown = [name for name in overrides if name not in own]
        if unknown:
            raise UsageError(
                f"Unknown generation option{'s' if len(unknown) > 1 else ''}.",
                *(_near_miss(name, names) for name in unknown),
                remedy=f"options: {', '.join(names)}",
            )
        given = {name: _frozen(value) for name, value in overrides.items() if value is not None}
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        unset: dict[str, Any] = {"seed": cls.seed, "stop": cls.stop, "output_scores": cls.output_scores}
        values = unset | defaults.model_dump() | given
        _refuse(_problems(values, given=given))
        return cls(**values)

    def check_ids(self, num_tokens: int) -> None:
        """Refuse token ids from `num_tokens` on, the number of ids of the SLM's tokenizer.

        Raises:
            UsageError: options have such ids, all of them named.
        """
        named: dict[str, Iterable[int | None]] = {
            "bad_words_ids": {token_id for word in self.bad_words_ids for token_id in word},
            "forced_bos_token_id": [self.forced_bos_token_id],
            "forced_eos_token_id": [self.forced_eos_token_id],
        }
        beyond = {name: sorted(i for i in ids if i is not None and i >= num_tokens) for name, ids in named.items()}
        problems = [f"{name}: {', '.join(map(str, ids))}" for name, ids in beyond.items() if ids]
        if problems:
            raise UsageError(
                "These generation options have token ids outside the vocabulary.",
                *problems,
                remedy=f"give ids below {num_tokens}",
            )


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _near_miss(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return name + (f": did you mean {close[0]}?" if close else "")


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise UsageError("These generation options cannot be used.", *problems, remedy="fix or remove these options")


def _problems(values: Mapping[str, Any], *, given: Iterable[str]) -> list[str]:
    """Problems of options, one line each. `given` are the options that the caller set."""
    wrong = {
        name: f"{name}: must be {wanted}, got {values[name]!r}"
        for name, accepts, wanted in _RULES
        if not accepts(values[name])
    }
    # Invalid values are left out of the checks of combinations.
    fit = {name: value for name, value in values.items() if name not in wrong}
    return [*wrong.values(), *_contradictions(fit), *_without_effect(fit, given)]


def _contradictions(fit: Mapping[str, Any]) -> list[str]:
    problems = []
    if {"min_new_tokens", "max_new_tokens"} <= fit.keys() and fit["min_new_tokens"] > fit["max_new_tokens"]:
        problems.append(f"min_new_tokens: {fit['min_new_tokens']} is above max_new_tokens, {fit['max_new_tokens']}")
    if fit.get("do_sample") and fit.get("temperature") == 0:
        problems.append("temperature: must be above 0 to sample, got 0; do_sample=False is greedy")
    if {"num_return_sequences", "num_beams", "do_sample"} <= fit.keys():
        sequences, beams = fit["num_return_sequences"], fit["num_beams"]
        if sequences > beams and (beams > 1 or not fit["do_sample"]):
            several = "sampling" if beams == 1 else "as many beams, or sampling without beams"
            problems.append(f"num_return_sequences: {sequences} is above num_beams, {beams}; use {several}")
    return problems


def _without_effect(fit: Mapping[str, Any], given: Iterable[str]) -> list[str]:
    given = set(given)
    problems = []
    if fit.get("do_sample") is False:
        problems += [f"{name}: has no effect without do_sample=True" for name in _SAMPLING_ONLY if name in given]
    if fit.get("num_beams") == 1:
        problems += [f"{name}: has no effect without num_beams above 1" for name in _BEAMS_ONLY if name in given]
    return problems
