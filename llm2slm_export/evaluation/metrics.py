"""Scores of several systems on the same examples: value, confidence interval, and significance test against one system.

BLEU and chrF are sacrebleu's, ROUGE is rouge-score's. Every metric is computed from sums of per-example statistics, so
that one test and one bootstrap serve all. sacrebleu's own test is not used: it counts trials with a strictly larger
difference than observed, without ties, and so calls two systems significantly different that differ in one sentence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.errors import UsageError

MetricName = Literal["bleu", "chrf", "rouge", "exact_match", "loss"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
ROUGE = ("rouge1", "rouge2", "rougeL")
TRIALS, RESAMPLES = 10_000, 1_000
LOWER_IS_BETTER = frozenset({"loss"})
_CHUNK = 256  # trials in memory at a time

ValueOf = Callable[[Array], Array]


def parse_metrics(text: str) -> tuple[MetricName, ...]:
    """Parse a list of metrics such as `bleu,chrf`.

    Raises:
        UsageError: the message lists every unknown name.
    """
    given = dict.fromkeys(part.strip() for part in text.split(","))
    wanted = tuple(metric for metric in METRICS if metric in given)
    unknown = [repr(name) for name in given if name not in METRICS]
    if unknown:
        raise UsageError(
            f"{', '.join(unknown)} {'is not a metric' if len(unknown) == 1 else 'are not metrics'}.",
            remedy=f"choose from {', '.join(METRICS)}",
        )
    return wanted


@dataclass(frozen=True)
class Score:
    """A metric of one system.

    Args:
        value: in percent; `loss`: nats per token.
        low, high: 95 % confidence interval, from a bootstrap over examples.
        p: p value of the two-sided paired approximate randomization test against the first system; None for the first.
    """

    value: float
    low: float
    high: float
    p: float | None


@dataclass(frozen=True)
class SystemResponses:
    """One system's responses.

    Args:
        texts: in the examples' order.
        loss: [examples, 2], sum of the negative log-likelihoods (nats) of the first reference's tokens, and their
            number; None if not requested.
    """

    texts: tuple[str, ...]
    loss: Array | None = None


def score(
    answers: Mapping[str, SystemResponses],
    references: Sequence[Sequence[str]],
    wanted: Sequence[MetricName],
    *,
    seed: int,
) -> dict[str, dict[str, Score]]:
    """Compute every metric of every system, and test the others against the first system.

    Args:
        answers: responses by system.
        references: one or more of every example.
        wanted: the metrics.
        seed: of test and bootstrap.

    Returns:
        scores by system and metric; `rouge` gives three.
    """
    results: dict[str, dict[str, Score]] = {name: {} for name in answers}
    compared = next(iter(answers))
    for metric, (by_system, value_of) in _statistics(answers, references, wanted).items():
        # All systems share trials and resamples, so that their p values are comparable.
        for name, own in by_system.items():
            other = by_system[compared] if name != compared else None
            results[name][metric] = _tested(own, other, value_of, np.random.default_rng(seed))
    return results


def plain_scores(
    texts: Sequence[str], references: Sequence[Sequence[str]], wanted: Sequence[MetricName]
) -> dict[str, float]:
    """Metric values without intervals or tests, for subsets of the examples."""
    only = {"": SystemResponses(tuple(texts))}
    found = _statistics(only, references, [metric for metric in wanted if metric != "loss"])
    return {metric: float(value_of(rows[""].sum(axis=0)[None])[0]) for metric, (rows, value_of) in found.items()}


def signatures(wanted: Sequence[MetricName], references: Sequence[Sequence[str]]) -> dict[str, str]:
    """The definition of each metric, for reproduction."""
    from importlib.metadata import version

    found: dict[str, str] = {}
    for metric in wanted:
        if metric in ("bleu", "chrf"):
            sacrebleu_metric = _corpus_metric(metric, references)
            sacrebleu_metric.corpus_score([r[0] for r in references], None)  # the signature includes reference counts
            found[metric] = str(sacrebleu_metric.get_signature())
        elif metric == "rouge":
            found[metric] = f"rouge-score {version('rouge-score')}, stemmed, F1, maximum over references"
        elif metric == "exact_match":
            found[metric] = "fraction of responses equal to a reference, ignoring leading and trailing white space"
        else:
            found[metric] = "nats per token of the first reference and EOS, teacher-forced"
    return found


def _corpus_metric(metric: MetricName, references: Sequence[Sequence[str]]) -> Any:
    """A sacrebleu metric with its references. `force`: no warning about responses that end in a lone full stop."""
    import sacrebleu

    columns = _columns(references)
    return sacrebleu.BLEU(force=True, references=columns) if metric == "bleu" else sacrebleu.CHRF(references=columns)


def _columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References in sacrebleu's layout: one list per reference number, None for examples with fewer."""
    return [[row[i] if i < len(row) else None for row in references] for i in range(max(map(len, references)))]


def _statistics(
    answers: Mapping[str, SystemResponses], references: Sequence[Sequence[str]], wanted: Sequence[MetricName]
) -> dict[str, tuple[dict[str, Array], ValueOf]]:
    """By metric: the statistics [examples, k] of every system, and the function from their sums to the metric."""
    found: dict[str, tuple[dict[str, Array], ValueOf]] = {}
    for metric in wanted:
        if metric in ("bleu", "chrf"):
            corpus = _corpus_metric(metric, references)
            # sacrebleu has no public API for sentence statistics.
            rows = {
                name: np.array(corpus._extract_corpus_statistics(list(answer.texts), None), float)
                for name, answer in answers.items()
            }
            found[metric] = rows, _of_corpus(corpus)
        elif metric == "rouge":
            by_system = {name: _rouge(answer.texts, references) for name, answer in answers.items()}
            for column, part in enumerate(ROUGE):
                found[part] = {name: _per_example(rows[:, column]) for name, rows in by_system.items()}, _ratio
        elif metric == "exact_match":
            found[metric] = {n: _per_example(_exact(a.texts, references)) for n, a in answers.items()}, _ratio
        else:
            found[metric] = {n: answer.loss for n, answer in answers.items() if answer.loss is not None}, _ratio
    return found


def _of_corpus(metric: Any) -> ValueOf:
    def values(sums: Array) -> Array:
        return np.array([metric._compute_score_from_stats(row.tolist()).score for row in sums])

    return values


def _ratio(sums: Array) -> Array:
    ratios: Array = sums[:, 0] / sums[:, 1]
    return ratios


def _per_example(values: Array) -> Array:
    return np.stack([100 * values, np.ones_like(values)], axis=1)


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    """F1 [examples, 3] of ROUGE-1, ROUGE-2 and ROUGE-L, each against the best reference."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    rows = (scorer.score_multi(list(right), text) for text, right in zip(texts, references, strict=True))
    return np.array([[row[metric].fmeasure for metric in ROUGE] for row in rows])


def _exact(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    return np.array(
        [text.strip() in {r.strip() for r in right} for text, right in zip(texts, references, strict=True)], float
    )


def _tested(own: Array, other: Array | None, value_of: ValueOf, rng: np.random.Generator) -> Score:
    """A metric with its bootstrap interval and, against another system, its p value.

    Args:
        own, other: statistics [examples, k]
        value_of: maps sums over examples [trials, k] to values [trials]
        rng: of bootstrap and test.
    """
    count = len(own)
    resampled = [
        # Multinomial counts of the examples instead of drawn examples: [trials, examples] @ [examples, k].
        value_of(rng.multinomial(count, np.full(count, 1 / count), size=min(_CHUNK, RESAMPLES - first)) @ own)
        for first in range(0, RESAMPLES, _CHUNK)
    ]
    low, high = np.percentile(np.concatenate(resampled), [2.5, 97.5])
    value = float(value_of(own.sum(axis=0)[None])[0])
    return Score(value, float(low), float(high), None if other is None else _p_value(own, other, value_of, rng))


def _p_value(own: Array, other: Array, value_of: ValueOf, rng: np.random.Generator) -> float:
    """The fraction of trials, with responses swapped at random, whose difference is at least the observed one."""
    total, difference = (own + other).sum(axis=0), own - other
    observed = abs(float(value_of(own.sum(axis=0)[None])[0] - value_of(other.sum(axis=0)[None])[0]))
    extreme = 0
    for first in range(0, TRIALS, _CHUNK):
        signs = rng.choice([-1.0, 1.0], size=(min(_CHUNK, TRIALS - first), len(own)))
        swapped = signs @ difference
        apart = value_of((total + swapped) / 2) - value_of((total - swapped) / 2)
        extreme += int((np.abs(apart) >= observed - 1e-9).sum())
    return (extreme + 1) / (TRIALS + 1)
