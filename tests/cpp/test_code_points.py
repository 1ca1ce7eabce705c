"""The C++ tokenizers on Unicode's code points: a part of them in CI, all of them nightly."""

from pathlib import Path

import pytest

from tests.support.compared_tokenizers import compare, written
from tests.support.tokenizer_cases import GPT4O, LLAMA, cases, code_points

CASES = cases()
# One of each component that looks at a code point's properties.
BY_PROPERTY = (
    *(
        f"normalizer {name}"
        for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled")
    ),
    "normalizer Strip True True",
    "normalizer Bert True True None True",
    "normalizer Bert False True True False",
    "pre-tokenizer Whitespace",
    "pre-tokenizer WhitespaceSplit",
    "pre-tokenizer BertPreTokenizer",
    "pre-tokenizer Digits True",
    "pre-tokenizer ByteLevel False True",
    f"pre-tokenizer Split {GPT4O} Isolated False",
    f"pre-tokenizer Split {LLAMA} Isolated False",
    "added True True True",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_PROPERTY)
def test_code_points(program: Path, tmp_path: Path, name: str) -> None:
    compare(program, written(tmp_path, CASES[name]), code_points(every=False))


@pytest.mark.nightly
@pytest.mark.parametrize("name", BY_PROPERTY)
def test_every_code_point(program: Path, tmp_path: Path, name: str) -> None:
    compare(program, written(tmp_path, CASES[name]), code_points(every=True))
