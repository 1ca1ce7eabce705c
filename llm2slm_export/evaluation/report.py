"""The evaluation report: the JSON that `eval` writes, and the source of its tables and its page."""

import math
from typing import Annotated, Literal, Protocol

from llm2slm_export.files.strict_model import WHOLE_NUMBER, StrictModel

Kind = Literal["pair", "baseline", "control"]


class ScoreEntry(StrictModel):
    """A metric, in percent (`loss`: nats per token). `low`, `high`: 95 % interval. `p`: p value against the pair."""

    value: float
    low: float
    high: float
    p: float | None


class LengthBucket(StrictModel):
    """Scores on the examples whose first reference has `shortest` to `longest` words."""

    shortest: int
    longest: int
    examples: int
    scores: dict[str, float]
    length_ratio: float


class SpeedEntry(StrictModel):
    """Times of one prompt at a time; medians in ms.

    Args:
        stages_ms: tokenize, encode, project, prefill.
        read_ms: time to the first token, the sum of the stages.
        ms_per_token: time of every later token.
        total_ms: end to end, at the responses' own lengths, by percentile (`p50`, `p90`, `p99`).
        new_tokens: median length of those responses.
        points: for each prompt, number of new tokens and end-to-end time.
    """

    stages_ms: dict[str, float]
    read_ms: float
    ms_per_token: float
    total_ms: dict[str, float]
    new_tokens: float
    points: tuple[tuple[int, float], ...]

    def total_at(self, new_tokens: int) -> float:
        """Predicted time in ms of a response of `new_tokens` tokens."""
        return self.read_ms + (new_tokens - 1) * self.ms_per_token


class SystemEntry(StrictModel):
    """One system.

    Args:
        length_ratio: words per word of the first references.
        unfinished: fraction of responses that end at the length limit.
        decoder_mb: MB of weights that one decoder step reads.
        truncated: number of truncated prompts.
    """

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
    """Response lengths, in tokens, at which the pair is faster than another system.

    They are from `first` to `last`; None: unbounded. `never`: the pair is slower at all lengths.
    """

    against: str
    first: int | None
    last: int | None
    never: bool
    speed_up_per_token: float


class DataEntry(StrictModel):
    """The held-out data. `overlap_checked`: the training data that it was checked against; None: not checked."""

    path: str
    sha256: str
    examples: int
    references: int
    tasks: dict[str, int]
    overlap_checked: str | None


class EvaluationReport(StrictModel):
    """All results of an evaluation."""

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
        """The bundle, which is the first system."""
        return self.systems[0]

    @property
    def main_metric(self) -> str:
        """The metric for single-number summaries."""
        known = self.pair.scores
        return next(metric for metric in ("bleu", "rougeL", "chrf", "exact_match", "loss") if metric in known)


class Paced(Protocol):
    """A timed system: ms to the first token, and ms per later token."""

    @property
    def read_ms(self) -> float:
        """Time to the first token."""
        ...

    @property
    def ms_per_token(self) -> float:
        """Time of every later token."""
        ...


def break_even(against: str, pair: Paced, other: Paced) -> BreakEven:
    """The response lengths at which the pair is faster, with time = read_ms + (n - 1) · ms_per_token."""
    extra = pair.read_ms - other.read_ms
    gain = other.ms_per_token - pair.ms_per_token
    ratio = other.ms_per_token / pair.ms_per_token
    # The pair is faster if extra < (n - 1) · gain.
    if gain > 0:
        first = max(1, int(extra // gain) + 2) if extra >= 0 else 1
        return BreakEven(against=against, first=first, last=None, never=False, speed_up_per_token=ratio)
    if extra >= 0:
        return BreakEven(against=against, first=None, last=None, never=True, speed_up_per_token=ratio)
    last = None if gain == 0 else math.ceil(extra / gain)
    return BreakEven(against=against, first=1, last=last, never=False, speed_up_per_token=ratio)


def gap_recovered(pair: float, llm: float, slm: float, *, lower_is_better: bool) -> float | None:
    """The fraction of the gap between SLM alone and LLM alone that the pair closes; None if the LLM is not better."""
    gap = slm - llm if lower_is_better else llm - slm
    return None if gap <= 0 else abs(pair - slm) / gap * (1 if (pair < slm) == lower_is_better else -1)
