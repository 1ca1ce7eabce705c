"""Every processor and warper against transformers' own, and all of them in transformers' order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llm2slm_export.bundle.manifest import GenerationDefaults, SpecialIds
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.generation.logits_processors import (
    BadWords,
    Processors,
    forbid,
    forbid_repeats,
    force,
    highest,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical_p,
    log_softmax,
    penalise_seen,
    softmax,
    warp,
)
from llm2slm_export.inference.generation.options import GenerationOptions
from tests.support.made import EOS, made_by_generate

BATCH, VOCAB = 5, 211
DEFAULTS = GenerationDefaults(max_new_tokens=16)


def options(**overrides: Any) -> GenerationOptions:
    return GenerationOptions.resolve(DEFAULTS, **overrides)


def random_scores(seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (BATCH, vocab)).astype(np.float32)


def random_ids(seed: int, length: int, below: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, (BATCH, length))


def theirs(processors: Sequence[Any], scores: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """`scores` after transformers' processors."""
    import torch

    processed = torch.from_numpy(scores)
    history = torch.from_numpy(np.zeros((len(scores), 0), np.int64) if ids is None else ids)
    for processor in processors:
        processed = processor(history, processed)
    return processed.numpy()


def same(ours: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(expected))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert ours.dtype == np.float32


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("top_k", [1, 7, 50, VOCAB, 10_000])
def test_top_k_is_transformers(top_k: int, seed: int) -> None:
    from transformers import TopKLogitsWarper

    scores = random_scores(seed)
    np.testing.assert_array_equal(keep_top_k(scores, top_k), theirs([TopKLogitsWarper(top_k)], scores))
    expected = theirs([TopKLogitsWarper(top_k, min_tokens_to_keep=3)], scores)
    np.testing.assert_array_equal(keep_top_k(scores, top_k, least=3), expected)


@pytest.mark.parametrize("vocab", [VOCAB, 20_000])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_transformers(top_p: float, vocab: int) -> None:
    from transformers import TopPLogitsWarper

    for seed, spread in enumerate([0.1, 0.5, 1, 2]):
        scores = random_scores(seed, vocab) * np.float32(spread)
        np.testing.assert_array_equal(keep_top_p(scores, top_p), theirs([TopPLogitsWarper(top_p)], scores))
        expected = theirs([TopPLogitsWarper(top_p, min_tokens_to_keep=3)], scores)
        np.testing.assert_array_equal(keep_top_p(scores, top_p, least=3), expected)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9])
def test_top_p_keeps_as_many_equally_likely_ids_as_transformers(top_p: float) -> None:
    from transformers import TopPLogitsWarper

    scores = np.zeros((BATCH, VOCAB), np.float32)
    scores[1:, ::3] = 2
    # Which of them, torch's sort leaves open.
    expected = np.sort(theirs([TopPLogitsWarper(top_p)], scores), axis=1)
    np.testing.assert_array_equal(np.sort(keep_top_p(scores, top_p), axis=1), expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.3, 1.0])
def test_min_p_is_transformers(min_p: float, seed: int) -> None:
    from transformers import MinPLogitsWarper

    scores = random_scores(seed)
    np.testing.assert_array_equal(keep_min_p(scores, min_p), theirs([MinPLogitsWarper(min_p)], scores))
    expected = theirs([MinPLogitsWarper(min_p, min_tokens_to_keep=3)], scores)
    np.testing.assert_array_equal(keep_min_p(scores, min_p, least=3), expected)


# Among thousands, the rounding of the entropy and of the sum decides on a few at the border. Theirs is in float64:
# in float32 the order in which a CPU adds up decides on more.
@pytest.mark.parametrize(("vocab", "border"), [(VOCAB, 0), (20_000, 5)])
@pytest.mark.parametrize("typical_p", [0.01, 0.2, 0.7, 0.95, 0.999])
def test_typical_p_is_transformers(typical_p: float, vocab: int, border: int) -> None:
    from transformers import TypicalLogitsWarper

    for seed, spread in enumerate([0.1, 0.5, 1, 2]):
        scores = random_scores(seed, vocab) * np.float32(spread)
        scores[1:3, 5:90] = -np.inf
        scores[3, 7:] = -np.inf
        for least in 1, 3:
            ours = keep_typical_p(scores, typical_p, least=least)
            warper = TypicalLogitsWarper(typical_p, min_tokens_to_keep=least)
            expected = theirs([warper], scores.astype(np.float64)).astype(np.float32)
            assert (ours != expected).sum(axis=1).max() <= border
            np.testing.assert_array_equal(ours[np.isfinite(ours)], scores[np.isfinite(ours)])


@pytest.mark.parametrize("length", [0, 1, 9])
@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_transformers(penalty: float, length: int) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    scores, ids = random_scores(), random_ids(1, length, below=VOCAB + 9)
    expected = theirs([RepetitionPenaltyLogitsProcessor(penalty)], scores, ids)
    np.testing.assert_array_equal(penalise_seen(scores, ids, penalty=penalty), expected)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 30])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_repeat_ngram_is_transformers(size: int, length: int) -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    scores, ids = random_scores(), random_ids(2, length, below=3)
    ids[0] += VOCAB - 2  # ids of no score among them
    ours = forbid_repeats(scores, ids, size=size)
    np.testing.assert_array_equal(ours, theirs([NoRepeatNGramLogitsProcessor(size)], scores, ids))
    assert length < 30 or np.isinf(ours[1:]).any(axis=1).all()


@pytest.mark.parametrize("length", [0, 1, 2, 3, 12])
def test_bad_words_are_transformers(length: int) -> None:
    from transformers import NoBadWordsLogitsProcessor

    scores, ids = random_scores(), random_ids(3, length, below=3)
    # An EOS alone is ignored; a word in which it is the end is not.
    words = ((9,), (1,), (0, 5), (1, 1), (0, 7), (2, 0, 1), (0, 0, 200), (1, 2, 0, 3), (9,))
    expected = theirs([NoBadWordsLogitsProcessor([list(word) for word in words], list(EOS))], scores, ids)
    np.testing.assert_array_equal(BadWords(words, eos=EOS)(scores, ids), expected)
    assert BadWords(((1,), (7,)), eos=EOS)(scores, ids) is scores


def test_forbid_is_transformers_min_new_tokens() -> None:
    from transformers import MinNewTokensLengthLogitsProcessor

    scores = random_scores()
    expected = theirs([MinNewTokensLengthLogitsProcessor(0, 3, list(EOS))], scores)
    np.testing.assert_array_equal(forbid(scores, EOS), expected)


def test_force_is_transformers_forced_bos_and_eos() -> None:
    from transformers import ForcedBOSTokenLogitsProcessor, ForcedEOSTokenLogitsProcessor

    scores = random_scores()
    for processor in ForcedBOSTokenLogitsProcessor(5), ForcedEOSTokenLogitsProcessor(2, 5):
        np.testing.assert_array_equal(force(scores, 5), theirs([processor], scores, random_ids(0, 1)))


def test_softmax_is_torchs() -> None:
    import torch

    scores = keep_top_k(random_scores(), 60)
    np.testing.assert_allclose(softmax(scores), torch.from_numpy(scores).softmax(1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(log_softmax(scores), torch.from_numpy(scores).log_softmax(1).numpy(), rtol=1e-5)


def test_the_highest_come_in_order_and_of_equals_the_first() -> None:
    scores = np.array([[1, 3, 2, 3, 3, 0], [-np.inf, -np.inf, 1, -np.inf, -np.inf, 2], [0] * 6], np.float32)
    np.testing.assert_array_equal(highest(scores, 2), [[1, 3], [5, 2], [0, 1]])
    np.testing.assert_array_equal(highest(scores, 4), [[1, 3, 4, 2], [5, 2, 0, 1], [0, 1, 2, 3]])
    scores = random_scores()
    np.testing.assert_array_equal(highest(scores, VOCAB), np.argsort(-scores, axis=1))


@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_warpers_is_transformers(seed: int, least: int) -> None:
    asked = {"temperature": 1.7, "top_k": 60, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.8, "do_sample": True}
    beams = {"num_beams": 2, "eos": [1, 2, 3]} if least > 1 else {}
    scores = random_scores(seed)
    warpers = made_by_generate(start=1, max_new_tokens=16, **asked, **beams)
    assert len(warpers) == 5
    same(warp(scores, options(**asked), least=least), theirs(warpers, scores))


EVERYTHING = {
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": ((9,), (1,), (0, 3), (3, 4), (2, 3, 5)),
    "min_new_tokens": 3,
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 1,
}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.001, "typical_p": 0.9}


@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, SAMPLING, {"num_beams": 3, **SAMPLING}])
@pytest.mark.parametrize("without", [*EVERYTHING, None])
@pytest.mark.parametrize("start", [0, None])
def test_all_processors_over_several_tokens_are_transformers(
    start: int | None, without: str | None, extra: dict[str, Any]
) -> None:
    from transformers import SuppressTokensLogitsProcessor

    asked = {name: value for name, value in EVERYTHING.items() if name != without} | extra | {"max_new_tokens": 7}
    ids = np.zeros((BATCH, 0 if start is None else 1), np.int64)
    made = made_by_generate(start=ids.shape[1], suppress_tokens=list(range(200, VOCAB)), **asked)
    assert any(isinstance(processor, SuppressTokensLogitsProcessor) for processor in made)
    special_ids = SpecialIds(prompt_pad=0, pad=0, eos=EOS, decoder_start=start)
    ours = Processors(options(**asked), special_ids=special_ids, num_tokens=200, rows=BATCH)
    random = np.random.default_rng(5)
    for call in range(7):
        scores = random_scores(call)
        scores[:, [0, 3, 4, 5, 7]] += 5
        expected = theirs(made, scores, ids)
        assert np.isinf(expected[:, 200:]).all()
        same(ours(scores[:, :200]), expected[:, :200])
        # Rows change places, as beams do, and what they hold changes with them.
        order = random.integers(0, BATCH, BATCH)
        ours.keep(order)
        chosen = random.choice([0, 2, 3, 4, 9], BATCH)
        ours.append(chosen)
        ids = np.concatenate([ids[order], chosen[:, None]], axis=1)
        np.testing.assert_array_equal(ours.generated, ids[:, 0 if start is None else 1 :])


def test_forced_bos_is_the_second_token_where_there_is_no_start_token() -> None:
    for start, forced_at in [(0, 0), (None, 1)]:
        special_ids = SpecialIds(prompt_pad=0, pad=0, eos=EOS, decoder_start=start)
        ours = Processors(options(forced_bos_token_id=3), special_ids=special_ids, num_tokens=VOCAB, rows=BATCH)
        for call in range(3):
            assert (np.isfinite(ours(random_scores())).sum(axis=1) == (1 if call == forced_at else VOCAB)).all()
            ours.append(np.full(BATCH, 2))


def test_options_that_leave_no_token_are_refused() -> None:
    special_ids = SpecialIds(prompt_pad=0, pad=0, eos=(1,), decoder_start=None)
    ours = Processors(
        options(no_repeat_ngram_size=1, min_new_tokens=9), special_ids=special_ids, num_tokens=2, rows=BATCH
    )
    scores = random_scores(vocab=2)
    ours(scores)
    ours.append(np.zeros(BATCH, np.int64))
    with pytest.raises(UsageError, match="exclude every token after 1 token"):
        ours(scores)


def test_ids_of_no_token_are_refused() -> None:
    special_ids = SpecialIds(prompt_pad=0, pad=0, eos=(1,), decoder_start=None)
    with pytest.raises(UsageError, match="forced_bos_token_id: 200"):
        Processors(options(forced_bos_token_id=200), special_ids=special_ids, num_tokens=200, rows=1)


def test_scores_given_are_left_as_they_were() -> None:
    special_ids = SpecialIds(prompt_pad=0, pad=0, eos=EOS, decoder_start=0)
    asked = EVERYTHING | SAMPLING | {"forced_bos_token_id": None}
    ours = Processors(options(**asked), special_ids=special_ids, num_tokens=VOCAB, rows=BATCH)
    scores = random_scores()
    ours(scores)
    np.testing.assert_array_equal(scores, random_scores())
