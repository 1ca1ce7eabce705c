"""The choice of tokens: greedy as transformers', draws that follow its probabilities, and streams that stay apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llm2slm_export.bundle.manifest import GenerationDefaults, SpecialIds
from llm2slm_export.inference.generation.options import GenerationOptions
from llm2slm_export.inference.generation.sampler import Sampler
from tests.support.chi_square import p_value
from tests.support.made import made_by_generate
from tests.support.tiers import tiered
from tests.support.tiny import EOS, tiny

BATCH, VOCAB = 5, 211
DEFAULTS = GenerationDefaults(max_new_tokens=16)
SPECIAL_IDS = SpecialIds(prompt_pad=0, pad=0, eos=(1, 7), decoder_start=0)


def sampler(
    *,
    num_tokens: int = VOCAB,
    special_ids: SpecialIds = SPECIAL_IDS,
    rows: Sequence[tuple[int, int]] = tuple((row, 0) for row in range(BATCH)),
    **overrides: Any,
) -> Sampler:
    options = GenerationOptions.resolve(DEFAULTS, **overrides)
    return Sampler(options, special_ids=special_ids, num_tokens=num_tokens, rows=rows)


def random_logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (BATCH, VOCAB)).astype(np.float32)


PROCESSING = {
    "nothing": {},
    "penalty": {"repetition_penalty": 1.4, "min_new_tokens": 4},
    "ngrams": {"no_repeat_ngram_size": 2, "forced_eos_token_id": 1},
    "words": {"bad_words_ids": ((91,), (182,), (0, 158), (182, 182), (150, 178), (158, 158), (4, 10), (0, 103))},
    "forced": {"forced_bos_token_id": 5, "forced_eos_token_id": 91, "min_new_tokens": 2},
    "one": {"max_new_tokens": 1, "no_repeat_ngram_size": 1},
}
PROCESSING["everything"] = {
    "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": ((158, 158), (223,)),
    "min_new_tokens": 3, "forced_bos_token_id": 5, "forced_eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("asked", PROCESSING.values(), ids=PROCESSING)
@pytest.mark.parametrize("eos", [EOS, (91,), ()])
@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_greedy_is_transformers_generate(slm: str, eos: tuple[int, ...], asked: dict[str, Any]) -> None:
    if not eos:
        asked = {name: value for name, value in asked.items() if name != "min_new_tokens"}
    model = tiny(slm)
    for prompts in range(5), [3]:
        expected = model.generate(prompts, eos=eos, **asked)
        ids, logprobs = model.choose(prompts, eos=eos, **asked)
        assert ids == expected.ids
        for ours, theirs in zip(logprobs, expected.logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


HISTORY = [3, 4, 5, 3]
DRAWS = 20_000
SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "high temperature": {"temperature": 2.5},
    "top_k": {"top_k": 6},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.6},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": ((6,), (3, 8), (5, 3, 9), (4, 3, 10), (1,))},
    "min_new_tokens": {"min_new_tokens": 9},
}
SAMPLING["all"] = {
    "temperature": 1.6, "top_k": 18, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2, "bad_words_ids": ((6,), (3, 8)), "min_new_tokens": 9,
}  # fmt: skip


@pytest.mark.parametrize("asked", tiered(SAMPLING, fast=("all",), slow=("top_p", "typical_p", "no_repeat_ngram_size")))
def test_draws_follow_transformers_probabilities(asked: dict[str, Any]) -> None:
    import torch

    vocab, num_tokens = 40, 36
    given: dict[str, Any] = {"top_k": 0, **asked, "do_sample": True}
    logits = np.random.default_rng(2).normal(0, 1.3, vocab).astype(np.float32)
    logits[[1, 4, 6, 8, 9, 10]] += 1.5  # what is forbidden or penalised is likely
    scores = torch.from_numpy(logits[None])
    suppressed = list(range(num_tokens, vocab))
    for processor in made_by_generate(start=1, max_new_tokens=16, suppress_tokens=suppressed, **given):
        scores = processor(torch.tensor([[0, *HISTORY]]), scores)
    expected = scores[0].double().softmax(0).numpy()

    ours = sampler(num_tokens=num_tokens, rows=[(row, 0) for row in range(DRAWS)], seed=1, **given)
    for token_id in HISTORY:
        certain = np.full(vocab, -1e4, np.float32)
        certain[token_id] = 1e4
        assert (ours.choose(np.broadcast_to(certain, (DRAWS, vocab))) == token_id).all()
    drawn = np.bincount(ours.choose(np.broadcast_to(logits, (DRAWS, vocab))), minlength=vocab)
    assert drawn[expected == 0].sum() == 0
    assert p_value(drawn, expected * DRAWS) > 1e-4


def test_the_test_of_draws_sees_a_wrong_distribution() -> None:
    expected = np.array([0.3, 0.25, 0.25, 0.2]) * DRAWS
    assert p_value(expected.astype(int), expected) > 0.99
    assert p_value((expected * [1.05, 1, 1, 0.925]).astype(int), expected) < 1e-4


def test_a_seed_repeats_and_a_row_does_not_depend_on_its_batch_mates() -> None:
    logits = random_logits()
    first, again = sampler(do_sample=True, seed=4), sampler(do_sample=True, seed=4)
    alone = sampler(do_sample=True, seed=4, rows=[(BATCH - 1, 0)])
    backwards = sampler(do_sample=True, seed=4, rows=[(row, 0) for row in reversed(range(BATCH))])
    for _ in range(20):
        chosen = first.choose(logits)
        np.testing.assert_array_equal(chosen, again.choose(logits))
        np.testing.assert_array_equal(chosen[::-1], backwards.choose(logits[::-1]))
        assert alone.choose(logits[-1:])[0] == chosen[-1]


def test_rows_that_leave_take_their_streams_and_ids_with_them() -> None:
    asked = {"do_sample": True, "seed": 4, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_new_tokens": 40}
    everyone, some = (sampler(**asked) for _ in range(2))
    left = np.arange(BATCH)
    for call in range(30):
        logits = random_logits(call)
        chosen = everyone.choose(logits)
        np.testing.assert_array_equal(chosen[left], some.choose(logits[left]))
        if call in (3, 9, 10):
            kept = np.delete(np.arange(len(left)), call % len(left))
            some.keep(kept)
            left = left[kept]
    assert len(left) == 2


def test_the_sequences_of_a_prompt_are_drawn_apart() -> None:
    rows = [(prompt, sequence) for prompt in range(2) for sequence in range(3)]
    logits = np.broadcast_to(random_logits()[0] / 4, (6, VOCAB))
    ours = sampler(do_sample=True, num_return_sequences=3, seed=0, rows=rows)
    drawn = np.stack([ours.choose(logits) for _ in range(8)], axis=1)
    assert len(np.unique(drawn, axis=0)) == 6
    # More sequences leave the first as they were.
    fewer = sampler(do_sample=True, seed=0, rows=[(0, 0), (1, 0)])
    np.testing.assert_array_equal(drawn[[0, 3]], np.stack([fewer.choose(logits[:2]) for _ in range(8)], axis=1))


def test_without_a_seed_draws_differ() -> None:
    logits = np.zeros((BATCH, VOCAB), np.float32)
    a, b = (sampler(do_sample=True, top_k=0) for _ in range(2))
    assert [a.choose(logits).tolist() for _ in range(5)] != [b.choose(logits).tolist() for _ in range(5)]


def test_logprobs_are_those_of_the_processed_scores() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)).repeat(BATCH, axis=0)
    ours = sampler(num_tokens=4, do_sample=True, seed=0, top_k=2, output_scores=True)
    chosen = ours.choose(logits)
    assert set(chosen) == {0, 1}
    np.testing.assert_allclose(np.exp(ours.logprobs()), np.array([0.625, 0.375])[chosen], rtol=1e-5)
    assert ours.logprobs().dtype == np.float32


def test_ids_of_no_token_are_never_chosen() -> None:
    logits = random_logits()
    logits[:, 200:] += 100
    for sampling in {}, {"do_sample": True, "seed": 0}:
        ours = sampler(num_tokens=200, **sampling)
        assert max(ours.choose(logits).max() for _ in range(10)) < 200
