"""Scores of many systems on the same examples: value, confidence interval, and whether they differ from one of them.

BLEU and chrF are sacrebleu's, ROUGE is rouge-score's. Every metric is computed from sums over examples of a few numbers,
so that one test and one bootstrap serve all. Not sacrebleu's own test: it counts the trials that are further apart than
the systems are, and not those that are as far, so that two systems that differ in one sentence differ "significantly".
"""

from collections.abc import Callable, Mapping, Sequence
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
ValueOf = Callable[[Array], Array]


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
        seed: of the test and the bootstrap.

    Returns:
        by system, by metric; `rouge` is three of them.
    """
    results: dict[str, dict[str, Score]] = {name: {} for name in answers}
    compared = next(iter(answers))
    for metric, (by_system, value_of) in _statistics(answers, references, wanted).items():
        # The same trials and resamples for every system: differences between their p values are not chance.
        for name, own in by_system.items():
            other = by_system[compared] if name != compared else None
            results[name][metric] = _tested(own, other, value_of, np.random.default_rng(seed))
    return results


def plain_scores(
    texts: Sequence[str], references: Sequence[Sequence[str]], wanted: Sequence[MetricName]
) -> dict[str, float]:
    """Values alone, without intervals or tests: for parts of the examples."""
    only = {"": Answers(tuple(texts))}
    found = _statistics(only, references, [metric for metric in wanted if metric != "loss"])
    return {metric: float(value_of(rows[""].sum(axis=0)[None])[0]) for metric, (rows, value_of) in found.items()}


def signatures(wanted: Sequence[MetricName], references: Sequence[Sequence[str]]) -> dict[str, str]:
    """How each metric was computed, for whoever wants to compute the same."""
    from importlib.metadata import version

    said: dict[str, str] = {}
    for metric in wanted:
        if metric in ("bleu", "chrf"):
            sacrebleu_metric = _corpus_metric(metric, references)
            sacrebleu_metric.corpus_score([r[0] for r in references], None)  # it knows its references from then on
            said[metric] = str(sacrebleu_metric.get_signature())
        elif metric == "rouge":
            said[metric] = f"rouge-score {version('rouge-score')}, stemmed, F1, the best reference counts"
        elif metric == "exact_match":
            said[metric] = "share of responses that are one of the references, outer white space aside"
        else:
            said[metric] = "nats per token of the first reference and its end, given what comes before"
    return said


def _corpus_metric(metric: MetricName, references: Sequence[Sequence[str]]) -> Any:
    """A sacrebleu metric that holds the references. `force`: no warning that a response ends in a lone full stop."""
    import sacrebleu

    columns = _columns(references)
    return sacrebleu.BLEU(force=True, references=columns) if metric == "bleu" else sacrebleu.CHRF(references=columns)


def _columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """One list per reference number, None where an example has fewer: what sacrebleu takes."""
    return [[row[i] if i < len(row) else None for row in references] for i in range(max(map(len, references)))]


def _statistics(
    answers: Mapping[str, Answers], references: Sequence[Sequence[str]], wanted: Sequence[MetricName]
) -> dict[str, tuple[dict[str, Array], ValueOf]]:
    """By metric: by system, the numbers [examples, k] that are summed, and what the metric makes of their sums."""
    found: dict[str, tuple[dict[str, Array], ValueOf]] = {}
    for metric in wanted:
        if metric in ("bleu", "chrf"):
            corpus = _corpus_metric(metric, references)
            # sacrebleu has no public name for its numbers of each sentence.
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
    """F1 [examples, 3] of ROUGE-1, ROUGE-2 and ROUGE-L against the best reference of each."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    rows = (scorer.score_multi(list(right), text) for text, right in zip(texts, references, strict=True))
    return np.array([[row[metric].fmeasure for metric in ROUGE] for row in rows])


def _exact(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    return np.array(
        [text.strip() in {r.strip() for r in right} for text, right in zip(texts, references, strict=True)], float
    )


def _tested(own: Array, other: Array | None, value_of: ValueOf, rng: np.random.Generator) -> Score:
    """A metric with its bootstrap interval and, against another system's, its p value.

    Args:
        own, other: [examples, k]
        value_of: [trials, k], sums over examples, to [trials]
    """
    count = len(own)
    resampled = [
        # How often each example is drawn, instead of the examples drawn: [trials, examples] @ [examples, k].
        value_of(rng.multinomial(count, np.full(count, 1 / count), size=min(_CHUNK, RESAMPLES - first)) @ own)
        for first in range(0, RESAMPLES, _CHUNK)
    ]
    low, high = np.percentile(np.concatenate(resampled), [2.5, 97.5])
    value = float(value_of(own.sum(axis=0)[None])[0])
    return Score(value, float(low), float(high), None if other is None else _p_value(own, other, value_of, rng))


def _p_value(own: Array, other: Array, value_of: ValueOf, rng: np.random.Generator) -> float:
    """Swap the systems' answers at random, and count how often they come out at least as far apart as they are."""
    total, difference = (own + other).sum(axis=0), own - other
    observed = abs(float(value_of(own.sum(axis=0)[None])[0] - value_of(other.sum(axis=0)[None])[0]))
    extreme = 0
    for first in range(0, TRIALS, _CHUNK):
        signs = rng.choice([-1.0, 1.0], size=(min(_CHUNK, TRIALS - first), len(own)))
        swapped = signs @ difference
        apart = value_of((total + swapped) / 2) - value_of((total - swapped) / 2)
        extreme += int((np.abs(apart) >= observed - 1e-9).sum())
    return (extreme + 1) / (TRIALS + 1)
