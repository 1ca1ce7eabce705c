"""Text streaming: whole characters, and stop strings held back and cut."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from llm2slm_export.inference.generation.detokenizer import Detokenizer


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
    stream = Detokenizer(tokenizer.decode, stop)
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
