"""What an evaluation found: the JSON that `eval` writes, and what its tables and its page are made from."""

import math
from typing import Annotated, Literal, Protocol

from llm2slm_export.files.strict_model import WHOLE_NUMBER, StrictModel

Kind = Literal["pair", "baseline", "control"]


class ScoreEntry(StrictModel):
    """A metric: in per cent, or for `loss` nats per token. `low`, `high`: 95 % interval. `p`: against the pair."""

    value: float
    low: float
    high: float
    p: float | None


class LengthBucket(StrictModel):
    """The examples whose first reference has from `shortest` to `longest` words, and the system's scores on them."""

    shortest: int
    longest: int
    examples: int
    scores: dict[str, float]
    length_ratio: float


class SpeedEntry(StrictModel):
    """Times of one prompt at a time, medians in ms.

    Args:
        stages_ms: tokenize, encode, project, prefill.
        read_ms: their sum: everything before the first token is known.
        ms_per_token: of every later token.
        total_ms: end to end at the responses' own lengths, by percentile (`p50`, `p90`, `p99`).
        new_tokens: the median length of those responses.
        points: each of those prompts' number of new tokens and total.
    """

    stages_ms: dict[str, float]
    read_ms: float
    ms_per_token: float
    total_ms: dict[str, float]
    new_tokens: float
    points: tuple[tuple[int, float], ...]

    def total_at(self, new_tokens: int) -> float:
        """Predicted ms of a response of so many tokens."""
        return self.read_ms + (new_tokens - 1) * self.ms_per_token


class SystemEntry(StrictModel):
    """One system. `length_ratio`: its words per word of the first reference. `unfinished`: share of its responses cut at
    the limit. `decoder_mb`: what every step reads, at most. `truncated`: prompts that were cut."""

    name: str
    kind: Kind
    description: str
    parameters: int
    decoder_mb: float
    scores: dict[str, ScoreEntry]
    tasks: dict[str, dict[str, float]]
    buckets: tuple[LengthBucket, ...]
    length_ratio: float
    unfinished: float
    truncated: int
    speed: SpeedEntry | None


class BreakEven(StrictModel):
    """Response lengths, in tokens, at which the pair is faster than another system: from, until; None: no such end.

    `never`: at none.
    """

    against: str
    first: int | None
    last: int | None
    never: bool
    speed_up_per_token: float


class DataEntry(StrictModel):
    """`overlap_checked`: the training data whose prompts were looked for, and not found; None: it was not there."""

    path: str
    sha256: str
    examples: int
    references: int
    tasks: dict[str, int]
    overlap_checked: str | None


class EvaluationReport(StrictModel):
    """Everything `eval` found out about a bundle."""

    format: Literal["llm2slm-evaluation"] = "llm2slm-evaluation"
    version: Annotated[Literal[1], WHOLE_NUMBER] = 1
    bundle: str
    name: str
    head: str
    precision: dict[str, str]
    composition: str | None
    data: DataEntry
    settings: dict[str, str | int | float | bool | None]
    signatures: dict[str, str]
    systems: tuple[SystemEntry, ...]
    break_even: tuple[BreakEven, ...]
    gap_recovered: dict[str, float]
    notes: tuple[str, ...]
    hardware: dict[str, str | int]
    versions: dict[str, str]
    seconds: float

    @property
    def pair(self) -> SystemEntry:
        """The bundle itself: the first system."""
        return self.systems[0]

    @property
    def main_metric(self) -> str:
        """The metric that one number is wanted of."""
        known = self.pair.scores
        return next(metric for metric in ("bleu", "rougeL", "chrf", "exact_match", "loss") if metric in known)


class Paced(Protocol):
    """Something timed: ms before the first token, and ms for each later one."""

    @property
    def read_ms(self) -> float: ...

    @property
    def ms_per_token(self) -> float: ...


def break_even(against: str, pair: Paced, other: Paced) -> BreakEven:
    """At which response lengths the pair is faster: read + (n - 1) · ms per token on both sides."""
    extra = pair.read_ms - other.read_ms
    gain = other.ms_per_token - pair.ms_per_token
    ratio = other.ms_per_token / pair.ms_per_token
    # Faster where extra < (n - 1) · gain.
    if gain > 0:
        first = max(1, int(extra // gain) + 2) if extra >= 0 else 1
        return BreakEven(against=against, first=first, last=None, never=False, speed_up_per_token=ratio)
    if extra >= 0:
        return BreakEven(against=against, first=None, last=None, never=True, speed_up_per_token=ratio)
    last = None if gain == 0 else math.ceil(extra / gain)
    return BreakEven(against=against, first=1, last=last, never=False, speed_up_per_token=ratio)


def gap_recovered(pair: float, llm: float, slm: float, *, lower_is_better: bool) -> float | None:
    """The share of the distance from the SLM alone to the LLM alone; None where the LLM is no better."""
    gap = slm - llm if lower_is_better else llm - slm
    return None if gap <= 0 else abs(pair - slm) / gap * (1 if (pair < slm) == lower_is_better else -1)
