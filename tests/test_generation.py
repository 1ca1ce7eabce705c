"""Logits processing against transformers' own processors; sampling; options; text streaming."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from llm2slm_export.bundle import GenerationDefaults, SpecialIds
from llm2slm_export.errors import UsageError
from llm2slm_export.generation import (
    GenerationOptions,
    TextStream,
    TokenChooser,
    forbid,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_seen,
    warp,
)

BATCH, VOCAB = 5, 211
DEFAULTS = GenerationDefaults(max_new_tokens=16)
SPECIAL_IDS = SpecialIds(prompt_pad=0, pad=0, eos=(1, 7), decoder_start=0)


def options(**overrides: Any) -> GenerationOptions:
    return GenerationOptions.resolve(DEFAULTS, **overrides)


def random_logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (BATCH, VOCAB)).astype(np.float32)


def chooser(*, choices: int = VOCAB, special_ids: SpecialIds = SPECIAL_IDS, first_row: int = 0, **overrides: Any):
    return TokenChooser(
        options(**overrides), special_ids=special_ids, choices=choices, batch=BATCH, first_row=first_row
    )


def theirs(processors: Sequence[Any], logits: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """`logits` after transformers' processors."""
    import torch

    scores = torch.from_numpy(logits)
    history = torch.from_numpy(np.zeros((BATCH, 0), np.int64) if ids is None else ids)
    for processor in processors:
        scores = processor(history, scores)
    return scores.numpy()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("top_k", [1, 7, 50, VOCAB, 10_000])
def test_top_k_is_transformers(top_k: int, seed: int) -> None:
    from transformers import TopKLogitsWarper

    logits = random_logits(seed)
    np.testing.assert_array_equal(keep_top_k(logits, top_k), theirs([TopKLogitsWarper(top_k)], logits))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_transformers(top_p: float, seed: int) -> None:
    from transformers import TopPLogitsWarper

    logits = random_logits(seed)
    np.testing.assert_array_equal(keep_top_p(logits, top_p), theirs([TopPLogitsWarper(top_p)], logits))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.3, 1.0])
def test_min_p_is_transformers(min_p: float, seed: int) -> None:
    from transformers import MinPLogitsWarper

    logits = random_logits(seed)
    np.testing.assert_array_equal(keep_min_p(logits, min_p), theirs([MinPLogitsWarper(min_p)], logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits()
    ids = np.random.default_rng(1).integers(0, VOCAB, (BATCH, 9))
    seen = np.zeros((BATCH, VOCAB), bool)
    np.put_along_axis(seen, ids, values=True, axis=1)
    expected = theirs([RepetitionPenaltyLogitsProcessor(penalty)], logits, ids)
    np.testing.assert_allclose(penalise_seen(logits, seen, penalty), expected, rtol=1e-6)


def test_forbid_is_transformers_min_new_tokens() -> None:
    from transformers import MinNewTokensLengthLogitsProcessor

    logits = random_logits()
    expected = theirs([MinNewTokensLengthLogitsProcessor(0, 3, [1, 7])], logits)
    np.testing.assert_array_equal(forbid(logits, [1, 7]), expected)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_warpers_is_transformers(seed: int) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(seed)
    warpers = [TemperatureLogitsWarper(1.7), TopKLogitsWarper(40), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)]
    ours = warp(logits, options(do_sample=True, temperature=1.7, top_k=40, top_p=0.8, min_p=0.05))
    expected = theirs(warpers, logits)
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(expected))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("start", [0, None])
def test_greedy_with_every_processor_is_transformers_over_several_tokens(start: int | None) -> None:
    from transformers import (
        MinNewTokensLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
    )

    ids = np.zeros((BATCH, 0 if start is None else 1), np.int64)
    processors = [
        RepetitionPenaltyLogitsProcessor(1.8),
        MinNewTokensLengthLogitsProcessor(ids.shape[1], 3, [1, 7]),
        SuppressTokensLogitsProcessor(list(range(200, VOCAB))),
    ]
    ours = chooser(
        choices=200,
        special_ids=SPECIAL_IDS.model_copy(update={"decoder_start": start}),
        repetition_penalty=1.8,
        min_new_tokens=3,
    )
    for call in range(8):
        logits = random_logits(3) + random_logits(call) * 0.2
        logits[:, [0, 7, 205]] += 9  # the start token, an EOS and an id of no token are what would be chosen
        chosen = ours.choose(logits, np.ones(BATCH, bool))
        np.testing.assert_array_equal(chosen, theirs(processors, logits, ids).argmax(axis=1))
        ids = np.concatenate([ids, chosen[:, None]], axis=1)


def test_sampling_follows_the_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2, 1e-9]], np.float32)).repeat(BATCH, axis=0)
    ours = chooser(choices=4, do_sample=True, seed=0, top_k=3)
    draws = np.concatenate([ours.choose(logits, np.ones(BATCH, bool)) for _ in range(2000)])
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / len(draws), [0.5, 0.3, 0.2, 0], atol=0.02)


def test_a_seed_repeats_and_a_row_does_not_depend_on_its_batch_mates() -> None:
    logits, everyone = random_logits(), np.ones(BATCH, bool)
    first, again = chooser(do_sample=True, seed=4), chooser(do_sample=True, seed=4)
    alone = TokenChooser(
        options(do_sample=True, seed=4), special_ids=SPECIAL_IDS, choices=VOCAB, batch=1, first_row=BATCH - 1
    )
    for call in range(20):
        chosen = first.choose(logits, everyone)
        np.testing.assert_array_equal(chosen, again.choose(logits, everyone if call % 2 else ~everyone | True))
        assert alone.choose(logits[-1:], np.ones(1, bool))[0] == chosen[-1]


def test_without_a_seed_draws_differ() -> None:
    logits, everyone = np.zeros((BATCH, VOCAB), np.float32), np.ones(BATCH, bool)
    a, b = (chooser(do_sample=True, top_k=0) for _ in range(2))
    assert [a.choose(logits, everyone).tolist() for _ in range(5)] != [
        b.choose(logits, everyone).tolist() for _ in range(5)
    ]


def test_options_come_from_the_bundle_and_the_caller() -> None:
    resolved = options(top_p=0.5, max_new_tokens=None, stop="x")
    assert (resolved.max_new_tokens, resolved.top_p, resolved.top_k, resolved.stop) == (16, 0.5, 50, ("x",))
    assert options(stop=["a", "b"]).stop == ("a", "b")


def test_every_bad_option_is_named_at_once() -> None:
    bad = {
        "max_new_tokens": 0,
        "min_new_tokens": -1,
        "do_sample": 1,
        "temperature": float("nan"),
        "top_k": 1.5,
        "top_p": 1.1,
        "min_p": -0.1,
        "repetition_penalty": 0,
        "seed": -3,
        "stop": ("",),
    }
    with pytest.raises(UsageError) as error:
        options(**bad)
    for name, value in bad.items():
        assert any(line.startswith(name) and repr(value) in line for line in error.value.evidence), name


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"min_new_tokens": 17}, "above max_new_tokens, 16"),
        ({"do_sample": True, "temperature": 0}, "do_sample=False is greedy"),
        ({"max_new_token": 3, "nonsense": 1}, "max_new_token: did you mean max_new_tokens?"),
        ({"num_beams": 4}, "num_beams"),
    ],
)
def test_options_that_do_not_fit_together_or_are_unknown(overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match="option") as error:
        options(**overrides)
    assert says in str(error.value)


def byte_fallback() -> Tokenizer:
    """`▁a`, `b`, `▁`, a special token, and one token per byte."""
    vocab = {"</s>": 0, "▁a": 1, "b": 2, "▁": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, "▁a": 1, "b": 2, "▁": 3, "é": 4}, merges=[]))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def byte_level() -> Tokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {"</s>": 0} | {char: 1 + index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer


def pieces(tokenizer: Tokenizer, ids: Sequence[int], *stop: str) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer.decode, stop)
    out = []
    for token_id in ids:
        out.append(stream.push(token_id))
        if stream.stopped:
            return out, True
    out.append(stream.finish())
    return out, stream.stopped


@pytest.mark.parametrize("make", [metaspace, byte_level])
def test_any_ids_stream_to_what_decoding_them_at_once_gives(make: Callable[[], Tokenizer]) -> None:
    tokenizer, random = make(), np.random.default_rng(0)
    for _ in range(100):
        ids = random.integers(0, tokenizer.get_vocab_size(), 30).tolist()
        assert "".join(pieces(tokenizer, ids)[0]) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [byte_fallback, byte_level])
def test_text_streams_whole_characters(make: Callable[[], Tokenizer]) -> None:
    tokenizer, text = make(), "bé€🤗b"
    ids = tokenizer.encode(text).ids if make is byte_level else [2, *(4 + byte for byte in "é€🤗".encode()), 2]
    out, _ = pieces(tokenizer, ids)
    assert [piece for piece in out if piece] == ["b", "é", "€", "🤗", "b"]


def test_a_byte_that_spoils_a_character_already_out_does_not_stop_the_stream() -> None:
    out, _ = pieces(byte_fallback(), [1, 4 + 0xC3, 4 + 0xA9, 4 + 0xFF, 2, 1, 2])
    assert "".join(out) == "aé\N{REPLACEMENT CHARACTER}b ab"


@pytest.mark.parametrize(
    ("stop", "expected", "stopped"),
    [
        (["hello"], ["", "", "", "", ""], True),  # the whole text
        (["lo w"], ["h", "e", "", "l", "", "", ""], True),  # across tokens
        (["low"], ["h", "e", "", "l", "", "lo ", "w", "o", "r", "", "ld", ""], False),  # only begins
        (["ld!"], ["h", "e", "", "l", "lo", " ", "w", "o", "r", "", "", "ld"], False),  # cut off by the end
        (["rld", "o w", "zz"], ["h", "e", "l", "l", "", "", ""], True),  # the first of several
    ],
)
def test_stop_strings_are_held_back_and_cut(stop: list[str], expected: list[str], stopped: bool) -> None:
    tokenizer = byte_level()
    assert pieces(tokenizer, tokenizer.encode("hello world").ids, *stop) == (expected, stopped)
