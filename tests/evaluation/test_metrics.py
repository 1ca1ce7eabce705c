"""Scores against the libraries that define them, and tests that must come out as statistics says they do."""

import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from llm2slm_export.errors import UsageError
from llm2slm_export.evaluation.metrics import METRICS, SystemResponses, parse_metrics, plain_scores, score, signatures

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "two",
    "dogs",
    "ran",
    "after",
    "it",
    "through",
    "the",
    "old",
    "garden",
    "gate",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(count)]


def noisy(texts: list[str], share: float, seed: int) -> tuple[str, ...]:
    rng = random.Random(seed)
    return tuple(" ".join(w for w in text.split() if rng.random() > share) or "x" for text in texts)


REFERENCES = [[text] for text in sentences(120)]
REFERENCES[3].append("another way to say it")
FIRST = [row[0] for row in REFERENCES]


def losses(mean: float, seed: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 9, size=len(FIRST))
    return np.stack([tokens * (mean + 0.1 * rng.standard_normal(len(FIRST))), tokens], axis=1)


def test_values_are_the_libraries_own() -> None:
    texts = noisy(FIRST, 0.2, 1)
    found = score({"a": SystemResponses(texts, losses(1.0, 0))}, REFERENCES, METRICS, seed=0)["a"]
    columns: list[list[str | None]] = [[*FIRST], [r[1] if len(r) > 1 else None for r in REFERENCES]]
    assert found["bleu"].value == pytest.approx(sacrebleu.BLEU().corpus_score(list(texts), columns).score)
    assert found["chrf"].value == pytest.approx(sacrebleu.CHRF().corpus_score(list(texts), columns).score)
    scorer = RougeScorer(["rouge2"], use_stemmer=True)
    best = [max(scorer.score(r, t)["rouge2"].fmeasure for r in row) for row, t in zip(REFERENCES, texts, strict=True)]
    assert found["rouge2"].value == pytest.approx(100 * np.mean(best))
    exact = [text in row for text, row in zip(texts, REFERENCES, strict=True)]
    assert found["exact_match"].value == pytest.approx(100 * np.mean(exact))
    own = losses(1.0, 0)
    assert found["loss"].value == pytest.approx(own[:, 0].sum() / own[:, 1].sum())
    assert all(one.low < one.value < one.high and one.p is None for one in found.values())
    plain = plain_scores(texts, REFERENCES, METRICS)
    assert plain == {name: pytest.approx(one.value) for name, one in found.items() if name != "loss"}


def test_a_better_system_is_significantly_better_and_the_same_one_is_not() -> None:
    answers = {
        "pair": SystemResponses(noisy(FIRST, 0.1, 1), losses(1.0, 1)),
        "worse": SystemResponses(noisy(FIRST, 0.5, 2), losses(2.0, 2)),
        "same": SystemResponses(noisy(FIRST, 0.1, 1), losses(1.0, 1)),
        "alike": SystemResponses(noisy(FIRST, 0.1, 3), losses(1.0, 3)),
    }
    found = score(answers, REFERENCES, METRICS, seed=0)
    for metric, one in found["worse"].items():
        assert one.p is not None
        assert one.p < 0.01, metric
    assert {one.p for one in found["same"].values()} == {1.0}
    for metric, one in found["alike"].items():
        assert one.p is not None
        assert one.p > 0.05, metric


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_differences_are_not_significant_whatever_the_metric(count: int) -> None:
    worse = tuple("x" if i < count else text for i, text in enumerate(FIRST))
    found = score({"a": SystemResponses(tuple(FIRST)), "b": SystemResponses(worse)}, REFERENCES, METRICS[:-1], seed=0)[
        "b"
    ]
    for metric, one in found.items():
        assert one.p is not None
        # Of 2^count ways to swap them, two are as far apart as they are.
        assert one.p == pytest.approx(2 / 2**count, abs=0.03), metric


def test_intervals_stay_inside_what_is_possible() -> None:
    found = score(
        {"a": SystemResponses(("the cat sat on a mat", *("x",) * 5))}, [["the cat sat on a mat"]] * 6, ("bleu",), seed=0
    )
    assert 0 <= found["a"]["bleu"].low <= found["a"]["bleu"].value <= found["a"]["bleu"].high <= 100


def test_p_values_are_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    values = []
    for seed in range(60):
        a, b = (np.stack([rng.random(40), np.ones(40)], axis=1) for _ in range(2))
        one = score(
            {"a": SystemResponses(("",) * 40, a), "b": SystemResponses(("",) * 40, b)},
            [["x"]] * 40,
            ("loss",),
            seed=seed,
        )
        values.append(one["b"]["loss"].p)
    assert 0.35 < np.mean([v for v in values if v is not None]) < 0.65
    assert sum(v < 0.05 for v in values if v is not None) <= 9


def test_signatures_say_how_each_metric_was_computed() -> None:
    found = signatures(METRICS, REFERENCES)
    assert list(found) == list(METRICS)
    assert "nrefs:var" in found["bleu"]
    assert "tok:13a" in found["bleu"]


def test_metrics_by_name() -> None:
    assert parse_metrics("loss, bleu") == ("bleu", "loss")
    with pytest.raises(UsageError, match="'blue', 'wer'"):
        parse_metrics("blue,wer,chrf")
