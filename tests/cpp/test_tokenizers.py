"""The C++ tokenizers give the ids and the text that Python's `tokenizers` gives.

    pytest -m slow tests/cpp/test_tokenizers.py

LLM2SLM_TOKENIZERS names more tokenizer.json files, LLM2SLM_CORPORA files of texts, one a line, with a colon between; with both,
every line goes through every tokenizer.
"""

import base64
import functools
import json
import os
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support import tokenizer_cases
from tests.support.compared_tokenizers import compare, written
from tests.support.paths import DEMO, REPOSITORY
from tests.support.tokenizer_cases import (
    HOSTILE,
    Json,
    added,
    cases,
    decoding_texts,
    random_texts,
    tokenizer,
)

pytestmark = pytest.mark.slow

DEMO_TOKENIZERS = sorted((DEMO / "tokenizer").glob("*/tokenizer.json"))
CASES = cases()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [
        *HOSTILE,
        *random_texts(1000, 1),
        *random_texts(300, 2, "abcd é日x"),
        *random_texts(300, 3, "a b.\u0301\u00e9 <s>fi"),
    ]


@pytest.mark.parametrize("name", list(CASES))
def test_component(program: Path, tmp_path: Path, texts: list[str], name: str) -> None:
    texts = [*texts, *decoding_texts()] if name.startswith("decoder") else texts
    compare(program, written(tmp_path, CASES[name]), texts)


def spelling(description: Json, texts: list[str]) -> list[str]:
    """Texts with added tokens of a tokenizer among them."""
    draw = random.Random(5)
    tokens = [token["content"] for token in description.get("added_tokens") or ()] or ["<s>"]
    return ["".join((text[:20], draw.choice(tokens), draw.choice(["", " ", "x"]), text[20:40])) for text in texts]


# Templates with no text in them, or with two of it: without special tokens Python still repeats the text, or drops it.
SEVERAL_TEXTS = {"template of nothing", "template twice", "Sequence and Roberta"}
SPECIAL = [n for n in CASES if n.startswith(("added", "post-processor")) and n.partition(" ")[2] not in SEVERAL_TEXTS]


@pytest.mark.parametrize("flags", [{"split": True}, {"plain": True}, {"split": True, "plain": True}], ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_are_split_and_left_out_as_in_python(
    program: Path, tmp_path: Path, texts: list[str], name: str, flags: dict[str, bool]
) -> None:
    compare(program, written(tmp_path, CASES[name]), spelling(CASES[name], texts[:600]), **flags)


@pytest.mark.parametrize("path", DEMO_TOKENIZERS, ids=lambda path: path.parent.name)
def test_demo(program: Path, texts: list[str], path: Path) -> None:
    compare(program, path, texts)


def trained(kind: str) -> Tokenizer:
    """A tokenizer like those of a family of models, trained on what is at hand."""
    pages = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
    documents = [path.read_text(encoding="utf-8") for path in pages] + list(HOSTILE)
    result: Any
    if kind == "byte-level BPE":
        result = Tokenizer(models.BPE())
        result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        result.decoder, result.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    elif kind == "byte-fallback BPE":
        result = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        result.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        result.decoder = decoders.Sequence(parts)
        result.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
        specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=specials, limit_alphabet=120)
    elif kind == "WordPiece":
        result = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        result.normalizer, result.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        result.decoder = decoders.WordPiece()
        result.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
        trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    else:
        result = Tokenizer(models.Unigram())
        result.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
        result.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        result.decoder = decoders.Metaspace(prepend_scheme="first")
        result.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
        trainer = trainers.UnigramTrainer(vocab_size=1500, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    result.train_from_iterator(documents, trainer)
    return result


@pytest.mark.parametrize("kind", ["byte-level BPE", "byte-fallback BPE", "WordPiece", "Unigram"])
def test_trained(program: Path, tmp_path: Path, texts: list[str], kind: str) -> None:
    trained(kind).save(str(tmp_path / "tokenizer.json"))
    lines = [
        line
        for path in sorted(REPOSITORY.glob("docs/**/*.md"))
        for line in path.read_text(encoding="utf-8").split("\n")
    ]
    compare(program, tmp_path / "tokenizer.json", [*texts, *lines, *random_texts(5000, 4)])


@pytest.mark.parametrize("kind", ["byte-level BPE", "byte-fallback BPE", "WordPiece", "Unigram"])
def test_long_lines(program: Path, tmp_path: Path, kind: str) -> None:
    """100 kB in one line; nothing here takes a time that grows with the square of it."""
    trained(kind).save(str(tmp_path / "tokenizer.json"))
    words = " ".join(["the quick brown fox", "déjà vu", "日本語", "🏳\ufe0f\u200d🌈"] * 2500)
    long = [
        words,
        "a" * 100_000,
        " " * 100_000,
        "\n" * 100_000,
        "\u0301" * 50_000,
        "日" * 30_000,
        "'" * 100_000,
        "ab" * 50_000,
    ]
    compare(program, tmp_path / "tokenizer.json", long)


def test_numbers_are_read_as_the_library_reads_them(program: Path, tmp_path: Path) -> None:
    """Scores whose nearest value decides one way, and serde_json's, one unit off, the other way."""
    draw = random_scores()
    pieces = "".join(f',["{a}",{x}],["{b}",{y}],["{a}{b}",{z}]' for a, b, x, y, z in draw)
    model = '{"version":"1.0","model":{"type":"Unigram","unk_id":0,"vocab":[["<unk>",0.0]' + pieces + "]}}"
    (tmp_path / "tokenizer.json").write_text(model, encoding="utf-8")
    compare(program, tmp_path / "tokenizer.json", [a + b for a, b, *_ in draw])


def random_scores() -> list[tuple[str, str, str, str, str]]:
    draw = random.Random(0)
    found = []
    for index in range(5000):
        a, b = chr(0x4E00 + 2 * index), chr(0x4E01 + 2 * index)
        x, y = -draw.uniform(0, 20), -draw.uniform(0, 20)
        # With digits enough that the sum may be met exactly, or nearly.
        found.append(
            (
                a,
                b,
                f"{x:.{draw.randrange(15, 25)}f}",
                f"{y:.{draw.randrange(15, 25)}f}",
                f"{x + y:.{draw.randrange(15, 25)}f}",
            )
        )
    return found


REFUSED: dict[str, tuple[Json | str, str]] = {
    "no JSON": ("{", "cannot be read as JSON"),
    "no object": ("[]", "it is not an object"),
    "deep": ('{"model":' + "[" * 5000 + "]" * 5000 + "}", "nested more than 100 levels deep"),
    "deep components": (
        tokenizer(normalizer=functools.reduce(lambda inner, _: {"type": "Sequence", "normalizers": [inner]}, range(200), {"type": "NFC"})),
        "nested more than 100 levels deep",
    ),
    "another version": (tokenizer(version="2.0"), "it is not 1.0"),
    "no model": ({"version": "1.0"}, "the field model is missing"),
    "normalizer": (tokenizer(normalizer={"type": "Nuclear"}), "The normalizer Nuclear is not supported"),
    "pre-tokenizer": (tokenizer(pre_tokenizer={"type": "UnicodeScripts"}), "The pre-tokenizer UnicodeScripts is not supported"),
    "post-processor": (tokenizer(post_processor={"type": "X"}), "The post-processor X is not supported"),
    "decoder": (tokenizer(decoder={"type": "CTC"}), "The decoder CTC is not supported"),
    "model": (tokenizer(model={"type": "X"}), "The model X is not supported"),
    "nested": (tokenizer(decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "CTC"}]}), "decoder.decoders[1]"),
    "dropout": (tokenizer(model=tokenizer_cases.REVEALING | {"dropout": 0.1}), "dropout"),
    "huge id": (tokenizer(model={"type": "WordLevel", "unk_token": "a", "vocab": {"a": 2**40}}), "not a 32-bit unsigned integer"),
    "negative id": (tokenizer(model={"type": "WordLevel", "unk_token": "a", "vocab": {"a": -1}}), "not a 32-bit unsigned integer"),
    "the same id": (tokenizer(model={"type": "WordLevel", "unk_token": "a", "vocab": {"a": 1, "b": 1}}), "two tokens have the id 1"),
    "merge": (tokenizer(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}), "it joins strings that are not tokens"),
    "unk_id": (tokenizer(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 1}), "no token has this id"),
    "out of range": ('{"model":{"type":"Unigram","vocab":[["a",1e999]]}}', "number overflow"),
    "base64": (tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "!"}), "is not base64"),
    "short charsmap": (tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}), "is not in it"),
    "empty match": (tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": "a*"}, "content": ""}), "may match where there is no text"),
    "back reference": (tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": r"(a)\1"}, "content": ""}), "this escape"),
    "two become one": (
        tokenizer(normalizer={"type": "Lowercase"}, added_tokens=[added("A", normalized=True), added("a", normalized=True)]),
        "makes two tokens the same",
    ),
    "template": (
        tokenizer(post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [], "special_tokens": {}}),
        "the field x is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(program: Path, tmp_path: Path, name: str) -> None:
    """What is not known is refused by its name, and what is damaged does no harm."""
    description, message = REFUSED[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(description if isinstance(description, str) else json.dumps(description), encoding="utf-8")
    done = subprocess.run([program, path], input=b"a\0", capture_output=True, check=False)
    assert done.returncode == 1, done
    assert message in done.stderr.decode()
    assert str(path) in done.stderr.decode()


def test_a_charsmap_that_points_outside_itself_is_an_error(program: Path, tmp_path: Path) -> None:
    for words in ([2**31 - 1 << 10 & 0xFFFFFFFF], [1 << 10, 0x161 | 5 << 10, *[0] * 200]):
        data = struct.pack(f"<I{len(words)}I", 4 * len(words), *words) + b"X\0"
        charsmap = base64.b64encode(data).decode()
        path = written(tmp_path, tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap}))
        compare(program, path, ["a", "b", "", "\u0301"])


def test_bytes_that_are_no_utf8_are_an_error(program: Path, tmp_path: Path) -> None:
    path = written(tmp_path, tokenizer())
    done = subprocess.run([program, path], input=b"ab\xffc\0", capture_output=True, check=True)
    assert "at byte 2" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize("path", [Path(p) for p in os.environ.get("LLM2SLM_TOKENIZERS", "").split(":") if p], ids=str)
def test_corpora(program: Path, path: Path) -> None:
    files = [Path(p) for p in os.environ.get("LLM2SLM_CORPORA", "").split(":") if p]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n")]
    compare(program, path, [*lines, *HOSTILE, *random_texts(100_000, 6)])
