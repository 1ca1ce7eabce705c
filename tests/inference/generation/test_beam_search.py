"""Beam search: token for token and score for score transformers', in any batch, and draws with its probabilities."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import count, permutations, product
from typing import Any

import numpy as np
import pytest

from llm2slm_export.bundle.manifest import SpecialIds
from llm2slm_export.inference.generation.beam_search import BeamSearch, Hypothesis
from llm2slm_export.inference.generation.logits_processors import log_softmax
from tests.support.chi_square import p_value, p_value_of_two
from tests.support.tiers import tiered
from tests.support.tiny import EOS, NUM_TOKENS, VOCAB, Stops, options, tiny

PROCESSING: dict[str, dict[str, Any]] = {
    "nothing": {},
    "penalty": {"repetition_penalty": 1.4, "min_new_tokens": 4},
    "ngrams and words": {
        "no_repeat_ngram_size": 2,
        "bad_words_ids": ((91,), (182,), (0, 158), (182, 182), (150, 178), (158, 158), (4, 10), (0, 103)),
        "forced_eos_token_id": 1,
    },
    "everything": {
        "repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "bad_words_ids": ((158, 158), (223,)),
        "min_new_tokens": 3, "forced_bos_token_id": 5, "forced_eos_token_id": 91,
    },
}  # fmt: skip


def same(ours: list[list[Hypothesis]], theirs: Any) -> None:
    flat = [hypothesis for best in ours for hypothesis in best]
    assert [list(hypothesis.token_ids) for hypothesis in flat] == theirs.ids
    np.testing.assert_allclose([hypothesis.score for hypothesis in flat], theirs.scores, rtol=1e-4)
    for hypothesis, expected in zip(flat, theirs.logprobs, strict=True):
        np.testing.assert_allclose(hypothesis.logprobs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("slm", "num_beams", "early_stopping"),
    tiered(
        product(["t5", "llama"], [2, 3, 4, 5], [False, True, "never"]),
        fast=[("t5", 4, False), ("llama", 4, True)],
        slow=[("t5", 3, "never"), ("llama", 5, "never")],
    ),
)
def test_beam_search_is_transformers_generate(slm: str, num_beams: int, early_stopping: bool | str) -> None:
    model, lengths = tiny(slm), Counter[int]()
    for case, length_penalty, processing in zip(
        count(), *zip(*product([-1.0, 0.0, 1.0, 2.0], PROCESSING.values()), strict=True), strict=False
    ):
        asked = {
            "num_beams": num_beams,
            "num_return_sequences": 1 + case % num_beams,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            **processing,
        }
        eos = (EOS, (91,), (1, 91))[case % 3]
        together = model.search(range(5), eos=eos, **asked)
        same(together, model.generate(range(5), eos=eos, **asked))
        if case % 2:
            prompt = case % 5
            alone = model.search([prompt], eos=eos, **asked)
            same(alone, model.generate([prompt], eos=eos, **asked))
            # Equal but for the rounding of the model's logits.
            assert [h.token_ids for h in alone[0]] == [h.token_ids for h in together[prompt]]
        lengths.update(len(hypothesis.token_ids) for best in together for hypothesis in best)
    assert len(lengths) > 3, "these prompts do not finish at different times"


def stops_at_a_sum(ids: Sequence[int]) -> bool:
    return len(ids) > 1 and sum(ids) % 7 == 0


def stops_at_some(ids: Sequence[int]) -> bool:
    return any(token_id in (10, 158, 182, 226, 150) for token_id in ids)


def stops_always(ids: Sequence[int]) -> bool:
    return len(ids) >= 3


@pytest.mark.parametrize("stops", [stops_at_a_sum, stops_at_some, stops_always])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_stop_strings_end_beams_as_transformers_stopping_criteria(
    slm: str, early_stopping: bool | str, stops: Stops
) -> None:
    model = tiny(slm)
    for length_penalty in -1.0, 0.0, 2.0:
        asked = {
            "num_beams": 3,
            "num_return_sequences": 3,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
        }
        together = model.search(range(5), stops=stops, eos=(1, 91), **asked)
        same(together, model.generate(range(5), stops=stops, eos=(1, 91), **asked))
        for hypothesis in (hypothesis for best in together for hypothesis in best):
            ids = hypothesis.token_ids
            assert (hypothesis.finish_reason == "stop") == (ids[-1] in (1, 91) or stops(ids))
            assert not any(stops(ids[:end]) for end in range(1, len(ids)))


@pytest.mark.parametrize("max_new_tokens", [1, 2, 12])
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_any_length_is_transformers(slm: str, max_new_tokens: int) -> None:
    model = tiny(slm)
    for eos in EOS, (91,), ():
        for num_beams in 2, 4:
            asked = {"num_beams": num_beams, "num_return_sequences": 2, "max_new_tokens": max_new_tokens}
            hypotheses = model.search(range(5), eos=eos, **asked)
            same(hypotheses, model.generate(range(5), eos=eos, **asked))
            for hypothesis in (hypothesis for best in hypotheses for hypothesis in best):
                assert hypothesis.finish_reason == ("stop" if hypothesis.token_ids[-1] in eos else "length")
                assert not set(hypothesis.token_ids[:-1]) & set(eos)


def search(
    logits: np.ndarray, *, eos: Sequence[int] = (1,), num_tokens: int | None = None, **asked: Any
) -> tuple[BeamSearch, list[int]]:
    """A search in which every row always has the same logits [vocab], and the rows of its calls."""
    made = BeamSearch(
        options(**asked),
        special_ids=SpecialIds(prompt_pad=0, pad=0, eos=tuple(eos), decoder_start=0),
        num_tokens=num_tokens or len(logits),
        prompts=range(2),
    )
    rows = [2]
    while (advance := made.advance(np.tile(logits, (rows[-1], 1)))) is not None:
        rows.append(len(advance.rows))
    return made, rows


def test_finished_prompts_leave() -> None:
    model = tiny("t5")
    made = BeamSearch(
        options(num_beams=3, early_stopping=True, max_new_tokens=12),
        special_ids=model.special_ids(),
        num_tokens=NUM_TOKENS,
        prompts=range(5),
    )
    of, ids, counts = np.arange(5), np.zeros((5, 0), np.int64), []
    while (advance := made.advance(model.logits(of, ids))) is not None:
        of, ids = of[advance.rows], np.concatenate([ids[advance.rows], advance.ids[:, None]], axis=1)
        counts.append(len(of))
        assert set(Counter(of.tolist()).values()) == {3}
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] > 0
    assert [len(best) for best in made.results()] == [1] * 5


def test_ids_of_no_token_are_never_chosen_but_count_in_the_softmax() -> None:
    logits = np.array([0, 0, 1, 2, 9, 9], np.float32)
    made, _ = search(logits, num_tokens=4, num_beams=2, max_new_tokens=2)
    (best,), _ = made.results()
    assert best.token_ids == (3, 3)
    np.testing.assert_allclose(best.logprobs, log_softmax(logits[None])[0, [3, 3]], rtol=1e-6)


def test_where_fewer_sequences_are_possible_the_rest_scores_the_worst() -> None:
    made, _ = search(np.arange(9, dtype=np.float32), num_beams=3, num_return_sequences=3, forced_bos_token_id=1)
    for best, *rest in made.results():
        assert (best.token_ids, best.finish_reason, best.score) == ((1,), "stop", 0)
        assert all(hypothesis.score <= -1e8 for hypothesis in rest)


def test_the_smallest_vocabulary() -> None:
    made, rows = search(np.array([1, 0], np.float32), num_beams=5, num_return_sequences=2, max_new_tokens=3)
    assert rows[1:] == [10, 10]
    assert [hypothesis.token_ids for hypothesis in made.results()[0]] == [(0, 0, 0), (0, 0, 1)]


SAMPLING = {"do_sample": True, "num_beams": 2, "top_k": 0}


@pytest.mark.slow
def test_one_step_of_beam_sampling_draws_without_replacement() -> None:
    draws = 20_000
    logits = np.random.default_rng(0).normal(0, 1, 7).astype(np.float32)
    made = BeamSearch(
        options(**SAMPLING, seed=3, num_return_sequences=2, max_new_tokens=1),
        special_ids=SpecialIds(prompt_pad=0, pad=0, eos=(1,), decoder_start=None),
        num_tokens=6,
        prompts=range(draws),
    )
    assert made.advance(np.broadcast_to(logits, (draws, 7))) is None
    p = np.exp(log_softmax(logits[None, :6]))[0].astype(float)
    # Four are drawn, one after the other; the two most likely of them are the results.
    expected: Counter[tuple[int, ...]] = Counter()
    for order in permutations(range(6), 4):
        best = tuple(sorted(order, key=lambda token: -p[token])[:2])
        expected[best] += draws * math.prod(
            p[token] / (1 - p[list(order[:at])].sum()) for at, token in enumerate(order)
        )
    drawn = Counter(tuple(h.token_ids[0] for h in best) for best in made.results())
    assert set(drawn) <= set(expected)
    assert p_value(np.array([drawn[pair] for pair in expected]), np.array([*expected.values()])) > 1e-4


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 4.0, "top_k": 20},
        {
            "temperature": 1.5,
            "top_p": 0.6,
            "min_p": 0.02,
            "typical_p": 0.9,
            "length_penalty": 0.0,
            "repetition_penalty": 1.3,
        },
    ],
    ids=["top_k", "others"],
)
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_beam_sampling_follows_transformers_probabilities(slm: str, asked: dict[str, Any]) -> None:
    import torch

    draws, model = 1500, tiny(slm)
    asked = {**SAMPLING, "num_beams": 3, "max_new_tokens": 3, **asked}
    torch.manual_seed(0)
    theirs = Counter(map(tuple, model.generate([2] * draws, eos=(91, 1), **asked).ids))
    found = model.search([2] * draws, eos=(91, 1), streams=range(draws), seed=0, **asked)
    ours = Counter(best.token_ids for (best,) in found)
    either = sorted({*ours, *theirs})
    assert len(either) > 5
    assert p_value_of_two(np.array([ours[ids] for ids in either]), np.array([theirs[ids] for ids in either])) > 1e-4


@pytest.mark.parametrize(
    "asked", [{"temperature": 3.0}, {"temperature": 3.0, "top_k": 30}, {"temperature": 2.0, "top_p": 0.5}]
)
def test_beam_sampling_repeats_with_a_seed_in_any_batch(asked: dict[str, Any]) -> None:
    model = tiny("llama")
    asked = {**SAMPLING, "num_beams": 4, "num_return_sequences": 4, "seed": 5, **asked}
    together = model.search(range(5), **asked)
    backwards = model.search([4, 3, 1], **asked)
    for prompt, best in zip([4, 3, 1], backwards, strict=True):
        assert [h.token_ids for h in best] == [h.token_ids for h in together[prompt]]
    assert together != model.search(range(5), **{**asked, "seed": 6})
    assert model.search(range(5), **{**asked, "seed": None}) != model.search(range(5), **{**asked, "seed": None})


def test_the_vocabulary_has_ids_of_no_token() -> None:
    assert tiny("t5").logits([0], np.zeros((1, 0), np.int64)).shape == (1, VOCAB)
    assert NUM_TOKENS < VOCAB
