"""Prompts into ids: what is too long, what has no row, and text that spells special tokens."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import Manifest, TokenizerEntry
from llm2slm_export.errors import PromptError, UnknownTokenError, UsageError
from llm2slm_export.inference import tokenization
from llm2slm_export.inference.tokenization import PromptTokenizer, tokens_without_rows

MOST = 12
WORDS = [
    "a",
    "bb",
    "hello",
    "world",
    " ",
    "  ",
    "\n",
    "é",
    "e\u0301",
    "日本",
    "</s>",
    "<x>",
    "zz",
    "q" * 30,
    "\u00a0",
    ".",
]


def byte_level() -> Tokenizer:
    vocab = {"<pad>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"he": 258, "ll": 259, "hell": 260, "hello": 261}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def word_piece() -> Tokenizer:
    vocab = {"[UNK]": 0, "</s>": 1} | {
        p: i + 2 for i, p in enumerate(["hello", "wor", "##ld", "a", "b", "##b", ".", "q"])
    }
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=20))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁hello", -3.0), ("a", -4.0), ("b", -4.0), ("world", -5.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


KINDS = {"byte_level": byte_level, "word_piece": word_piece, "unigram": unigram}


def prompt_tokenizer(directory: Path, tokenizer: Tokenizer, **changes: Any) -> PromptTokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["<x>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    entry = TokenizerEntry(strategy="shared", llm="tokenizer.json", slm="tokenizer.json", slm_size=400)
    fields = {"name": "toy", "tokenizer": entry, "max_prompt_tokens": MOST, "prompt_template": "{prompt}", **changes}
    return PromptTokenizer(Bundle(directory, Manifest.model_construct(**fields)))


def texts(kind: str, count: int) -> list[str]:
    draw = random.Random(kind)
    made = ["".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(count)]
    return [text for text in made if text.strip()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_judged_by_its_beginning_as_by_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole = prompt_tokenizer(tmp_path, KINDS[kind]())
    cases = [text * times for text in texts(kind, 120) for times in (1, 3, 40)]
    expected = [(whole.read([text], truncate=True)[0].ids, _fits(whole, text)) for text in cases]
    monkeypatch.setattr(tokenization, "FIRST_CHARACTERS", 200)
    monkeypatch.setattr(tokenization, "MOST_PARTS", 1_000_000)
    judged = 0
    for text, (ids, fits) in zip(cases, expected, strict=True):
        assert whole.read([text], truncate=True)[0].ids == ids
        assert _fits(whole, text) is fits
        judged += len(text) > 200
    assert judged > 50


def _fits(prompt_tokenizer: PromptTokenizer, text: str) -> bool:
    try:
        prompt_tokenizer.read([text], truncate=False)
    except PromptError:
        return False
    return True


def test_ten_megabytes_are_not_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, read = prompt_tokenizer(tmp_path, byte_level()), []
    original = tokenization._encode

    def counted(tokenizer: Tokenizer, text: str, *, special_tokens: bool) -> Any:
        read.append(len(text))
        return original(tokenizer, text, special_tokens=special_tokens)

    monkeypatch.setattr(tokenization, "_encode", counted)
    with pytest.raises(PromptError, match="in the first 65536 of 10000000 characters, at most 12"):
        pair.read(["hello wo" * 1_250_000], truncate=False)
    (cut,) = pair.read(["hello wo" * 1_250_000], truncate=True)
    assert (len(cut.ids), cut.ids[-1]) == (MOST, 1)
    assert cut.dropped > 20_000
    assert read == [65_536, 65_536]
    # What a normalizer takes away is read once more, up to a bound.
    spaced = prompt_tokenizer(tmp_path, unigram())
    assert (
        spaced.read(["hello" + " " * 200_000 + "hello"], truncate=False)[0].ids
        == spaced.read(["hello hello"], truncate=False)[0].ids
    )
    with pytest.raises(PromptError, match="prompt 0: 2000005 characters, at most 1048576"):
        spaced.read(["hello" + " " * 2_000_000], truncate=False)


@pytest.mark.slow
def test_a_hundred_thousand_prompts_that_are_too_long_are_a_short_message(tmp_path: Path) -> None:
    pair = prompt_tokenizer(tmp_path, byte_level())
    with pytest.raises(PromptError) as caught:
        pair.read(["hello w" * 9] * 100_000, truncate=False)
    assert caught.value.fact == "100000 of 100000 prompts cannot be run by 'toy'."
    assert caught.value.evidence[-1] == "and 99995 more"
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", ["a" * 10_000_000, ["a", 3] * 100_000, [""] * 100_000, ["\ud800"] * 100_000])
def test_messages_about_other_prompts_are_short(tmp_path: Path, value: Any) -> None:
    with pytest.raises((UsageError, PromptError)) as caught:
        prompt_tokenizer(tmp_path, byte_level()).read(value, truncate=False)
    assert len(str(caught.value)) < 1000


def test_prompts_with_tokens_beyond_the_table_are_named_and_no_others(tmp_path: Path) -> None:
    tokenizer = byte_level()
    prompt_tokenizer(tmp_path, tokenizer)  # which adds <x>
    rows = tokenizer.token_to_id("<x>")
    pair = prompt_tokenizer(tmp_path, byte_level(), prompt_vocab=rows)
    assert tokens_without_rows(tokenizer, rows) == ["<x>"]
    with pytest.raises(UnknownTokenError) as caught:
        pair.read(["a", "b <x> c", "d", "<x>"], truncate=False)
    assert sorted(caught.value.prompts) == [1, 3]
    assert "prompt 1: '<x>' (id " in caught.value.evidence[0]
    assert [len(row.ids) for row in pair.read(["a", "d"], truncate=False)] == [2, 2]
    # What is cut off is not looked up.
    assert len(pair.read(["a" * 40 + "<x>"], truncate=True)[0].ids) == MOST
    with pytest.raises(PromptError) as both:
        pair.read(["<x>", "a" * 40], truncate=False)
    assert not isinstance(both.value, UnknownTokenError)
    assert len(both.value.evidence) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_split_special_tokens_is_what_transformers_makes_of_it(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    pair = prompt_tokenizer(tmp_path, KINDS[kind](), max_prompt_tokens=100_000)
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="</s>", clean_up_tokenization_spaces=False
    )
    differing = 0
    for text in texts(kind, 200):
        split = pair.read([text], truncate=False, split_special_tokens=True)[0].ids
        plain = pair.read([text], truncate=False)[0].ids
        assert list(split) == oracle(text, split_special_tokens=True).input_ids
        assert list(plain) == oracle(text, split_special_tokens=False).input_ids
        differing += split != plain
    assert differing > 20


def test_a_template_of_special_tokens_is_not_taken_apart(tmp_path: Path) -> None:
    pair = prompt_tokenizer(tmp_path, byte_level(), prompt_template="</s>{prompt}")
    assert pair.read(["a"], truncate=False)[0].ids[0] == 1
    with pytest.raises(UsageError, match="The prompt template of 'toy' has special tokens"):
        pair.read(["a"], truncate=False, split_special_tokens=True)


def test_a_template_may_strip_and_hold_all_special_tokens(tmp_path: Path) -> None:
    pair = prompt_tokenizer(tmp_path, byte_level(), prompt_strip=True, prompt_special_tokens=False)
    assert pair.read([" hello\n"], truncate=False)[0].ids == (byte_level().token_to_id("hello"),)
