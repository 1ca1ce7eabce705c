"""Tokenizers that transformers has in Python only, in the form a bundle carries."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import ByT5Tokenizer

from llm2slm_export.authoring.models.compatibility import PROBES
from llm2slm_export.authoring.models.loading import load_tokenizer
from llm2slm_export.errors import CompositionError

HOSTILE = (
    "",
    " ",
    "\x00\x7f",
    "e\u0301 \u200d\u202e",
    "👩\u200d👩\u200d👧",
    "a</s>b",
    "<extra_id_7> x",
    "\ufffd",
    "ﬁ Ａ",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("byt5")
    ByT5Tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "t5"}')
    return directory


@pytest.mark.parametrize("text", [*PROBES, *HOSTILE])
def test_byt5_has_transformers_ids(saved: Path, text: str) -> None:
    slow, fast = ByT5Tokenizer(), load_tokenizer(str(saved))
    expected = slow(text).input_ids
    assert fast(text).input_ids == expected
    assert fast.decode(expected, skip_special_tokens=True) == slow.decode(expected, skip_special_tokens=True)


def test_byt5_keeps_its_special_ids_in_its_file(saved: Path, tmp_path: Path) -> None:
    fast = load_tokenizer(str(saved))
    assert (fast.pad_token_id, fast.eos_token_id, len(fast)) == (0, 1, len(ByT5Tokenizer()))
    fast.save_pretrained(tmp_path)
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode("Où?").ids == ByT5Tokenizer()("Où?").input_ids


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(CompositionError, match="holds no tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in caught.value.evidence[0]
