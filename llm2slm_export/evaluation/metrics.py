"""Scores of many systems on the same examples: value, confidence interval, and whether they differ from one of them.

BLEU and chrF are sacrebleu's, with its approximate randomisation test and bootstrap. ROUGE, exact match and loss are
means over examples (the loss: over tokens), tested and resampled here in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from llm2slm_export.errors import UsageError

MetricName = Literal["bleu", "chrf", "rouge", "exact_match", "loss"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
ROUGE = ("rouge1", "rouge2", "rougeL")
TRIALS, RESAMPLES = 10_000, 1_000
LOWER_IS_BETTER = frozenset({"loss"})
_CHUNK = 256  # trials that are held in memory together

Array = npt.NDArray[Any]


def parse_metrics(text: str) -> tuple[MetricName, ...]:
    """`bleu,chrf` and the like.

    Raises:
        UsageError: names that are no metric, all of them.
    """
    given = dict.fromkeys(part.strip() for part in text.split(","))
    wanted = tuple(metric for metric in METRICS if metric in given)
    unknown = [repr(name) for name in given if name not in METRICS]
    if unknown:
        raise UsageError(
            f"{', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the metrics.",
            remedy=f"choose from {', '.join(METRICS)}",
        )
    return wanted


@dataclass(frozen=True)
class Score:
    """A metric of one system.

    Args:
        value: in per cent, but for `loss`: nats per token.
        low, high: the 95 % confidence interval, from a bootstrap over examples.
        p: of the two-sided paired approximate randomisation test against the system compared with; None for itself.
    """

    value: float
    low: float
    high: float
    p: float | None


@dataclass(frozen=True)
class Answers:
    """What one system made of every example.

    Args:
        texts: its responses, in the examples' order.
        loss: [examples, 2]: the sum of the negative log-likelihoods (nats) of the first reference's tokens, and their
            number; None where it was not asked for.
    """

    texts: tuple[str, ...]
    loss: Array | None = None


def score(
    answers: Mapping[str, Answers],
    references: Sequence[Sequence[str]],
    wanted: Sequence[MetricName],
    *,
    seed: int,
) -> dict[str, dict[str, Score]]:
    """Every metric of every system; the first system is the one that the others are compared with.

    Args:
        references: of every example, one or more.
        seed: of the test and the bootstrap; BLEU's and chrF's is sacrebleu's own (SACREBLEU_SEED, 12345).

    Returns:
        by system, by metric; `rouge` is three of them.
    """
    results: dict[str, dict[str, Score]] = {name: {} for name in answers}
    corpus: list[MetricName] = [metric for metric in wanted if metric in ("bleu", "chrf")]
    if corpus:
        for name, scores in _corpus_scores(answers, references, corpus).items():
            results[name] |= scores
    for metric, statistics in _example_statistics(answers, references, wanted).items():
        compared = next(iter(answers))
        # The same trials and resamples for every system: differences between their p values are not chance.
        for name, own in statistics.items():
            results[name][metric] = _ratio_score(own, statistics[compared] if name != compared else None, seed)
    return results


def plain_scores(
    texts: Sequence[str], references: Sequence[Sequence[str]], wanted: Sequence[MetricName]
) -> dict[str, float]:
    """Values alone, without intervals or tests: for parts of the examples."""
    values: dict[str, float] = {}
    for metric in wanted:
        if metric in ("bleu", "chrf"):
            values[metric] = float(_corpus_metric(metric, references).corpus_score(list(texts), None).score)
    only = {"": Answers(tuple(texts))}
    for metric_name, statistics in _example_statistics(only, references, [m for m in wanted if m != "loss"]).items():
        values[metric_name] = _ratio(statistics[""].sum(axis=0))
    return values


def signatures(wanted: Sequence[MetricName], references: Sequence[Sequence[str]]) -> dict[str, str]:
    """How each metric was computed, for whoever wants to compute the same."""
    from importlib.metadata import version

    said: dict[str, str] = {}
    for metric in wanted:
        if metric in ("bleu", "chrf"):
            sacrebleu_metric = _corpus_metric(metric, references)
            sacrebleu_metric.corpus_score([r[0] for r in references], None)  # it knows its references from then on
            said[metric] = f"{sacrebleu_metric.get_signature()}|ar:{TRIALS}|bs:{RESAMPLES}"
        elif metric == "rouge":
            said[metric] = f"rouge-score {version('rouge-score')}, stemmed, F1, the best reference counts"
        elif metric == "exact_match":
            said[metric] = "share of responses that are one of the references, outer white space aside"
        else:
            said[metric] = "nats per token of the first reference and its end, given what comes before"
    return said


def _corpus_scores(
    answers: Mapping[str, Answers], references: Sequence[Sequence[str]], wanted: Sequence[MetricName]
) -> dict[str, dict[str, Score]]:
    from sacrebleu.significance import PairedTest

    test = PairedTest(
        [(name, list(answer.texts)) for name, answer in answers.items()],
        {metric: _corpus_metric(metric, references) for metric in wanted},
        references=None,  # the metrics hold them, tokenized once for all systems
        test_type="ar",
        n_samples=TRIALS,
        n_ar_confidence=RESAMPLES,
    )
    _, found = test()
    # sacrebleu's own name of each metric, in the order given; "System" comes first.
    columns = dict(zip(wanted, [column for column in found if column != "System"], strict=True))
    return {
        name: {metric: _sacrebleu_score(found[columns[metric]][row], found[columns[metric]][0]) for metric in wanted}
        for row, name in enumerate(answers)
    }


def _sacrebleu_score(result: Any, first: Any) -> Score:
    p = None if result.p_value is None else float(result.p_value)
    if p is not None and result.score == first.score:
        p = 1.0  # sacrebleu counts trials that are further apart: between equal systems there is none, and p would be 0.0001
    return Score(float(result.score), float(result.mean - result.ci), float(result.mean + result.ci), p)


def _corpus_metric(metric: MetricName, references: Sequence[Sequence[str]]) -> Any:
    """A sacrebleu metric that holds the references. `force`: no warning that a response ends in a lone full stop."""
    import sacrebleu

    columns = _columns(references)
    return sacrebleu.BLEU(force=True, references=columns) if metric == "bleu" else sacrebleu.CHRF(references=columns)


def _columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """One list per reference number, None where an example has fewer: what sacrebleu takes."""
    return [[row[i] if i < len(row) else None for row in references] for i in range(max(map(len, references)))]


def _example_statistics(
    answers: Mapping[str, Answers], references: Sequence[Sequence[str]], wanted: Sequence[MetricName]
) -> dict[str, dict[str, Array]]:
    """By metric, by system: [examples, 2], a sum and what it is to be divided by."""
    statistics: dict[str, dict[str, Array]] = {}
    if "rouge" in wanted:
        by_system = {name: _rouge(answer.texts, references) for name, answer in answers.items()}
        for column, metric in enumerate(ROUGE):
            statistics[metric] = {name: _per_example(rows[:, column]) for name, rows in by_system.items()}
    if "exact_match" in wanted:
        statistics["exact_match"] = {name: _per_example(_exact(a.texts, references)) for name, a in answers.items()}
    if "loss" in wanted:
        statistics["loss"] = {name: answer.loss for name, answer in answers.items() if answer.loss is not None}
    return statistics


def _per_example(values: Array) -> Array:
    return np.stack([100 * values, np.ones_like(values)], axis=1)


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    """F1 [examples, 3] of ROUGE-1, ROUGE-2 and ROUGE-L against the best reference of each."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    rows = (scorer.score_multi(list(right), text) for text, right in zip(texts, references, strict=True))
    return np.array([[row[metric].fmeasure for metric in ROUGE] for row in rows])


def _exact(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    return np.array(
        [text.strip() in {r.strip() for r in right} for text, right in zip(texts, references, strict=True)], float
    )


def _ratio(sums: Array) -> float:
    return float(sums[0] / sums[1])


def _ratio_score(own: Array, other: Array | None, seed: int) -> Score:
    """A ratio of sums over examples with its bootstrap interval and, against another system's, its p value."""
    rng = np.random.default_rng(seed)
    count, value = len(own), _ratio(own.sum(axis=0))
    resampled: list[float] = []
    for _ in range(0, RESAMPLES, _CHUNK):
        sums = own[rng.integers(count, size=(min(_CHUNK, RESAMPLES - len(resampled)), count))].sum(axis=1)
        resampled += (sums[:, 0] / sums[:, 1]).tolist()
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(value, float(low), float(high), None if other is None else _p_value(own, other, rng))


def _p_value(own: Array, other: Array, rng: np.random.Generator) -> float:
    """Swap the systems' answers at random, and see how often they come out as far apart as they are."""
    difference, both = own - other, own + other
    observed = abs(_ratio(own.sum(axis=0)) - _ratio(other.sum(axis=0)))
    total, extreme = both.sum(axis=0), 0
    for first in range(0, TRIALS, _CHUNK):
        signs = rng.choice([-1.0, 1.0], size=(min(_CHUNK, TRIALS - first), len(own)))
        # Half the sum plus or minus half the swapped difference: the two systems after the swaps.
        swapped = signs @ difference
        a, b = (total + swapped) / 2, (total - swapped) / 2
        extreme += int((np.abs(a[:, 0] / a[:, 1] - b[:, 0] / b[:, 1]) >= observed - 1e-12).sum())
    return (extreme + 1) / (TRIALS + 1)
