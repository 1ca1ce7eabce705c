"""Rows of texts: malformed ones are named, held-out prompts are held out, and reading them needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from llm2slm_export.authoring.recipe import DataSettings
from llm2slm_export.authoring.training.pairs import overlap, read_further_prompts, read_pairs, refuse_overlap
from llm2slm_export.errors import DataError


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.jsonl", "", "no"),
        ("bad.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt"\n{"prompt": "c"}\n', "line 2"),
        ("bad.jsonl", '{"prompt": "a", "response": ""}\n', "line 1"),
        ("bad.tsv", "a\tb\nc\n", "line 2"),
    ],
)
def test_bad_data_is_refused_with_line_numbers(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    fields: tuple[str | int, str | int] = (0, 1) if name.endswith("tsv") else ("prompt", "response")
    settings = DataSettings(train="", validation="", prompt_field=fields[0], response_field=fields[1])
    with pytest.raises(DataError, match=message):
        read_pairs(str(path), settings)


def test_prompts_need_no_response(tmp_path: Path) -> None:
    columns = DataSettings(train="", validation="", prompt_field=0, response_field=1)
    (tmp_path / "prompts.tsv").write_text("a\nb\tB\n")
    assert read_further_prompts(str(tmp_path / "prompts.tsv"), columns) == ["a", "b"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"response": "B"}\n{"prompt": ""}\n')
    with pytest.raises(DataError, match="2 unusable rows of 3") as caught:
        read_further_prompts(str(tmp_path / "prompts.jsonl"), DataSettings(train="", validation=""))
    assert caught.value.evidence == ("line 2: no 'prompt' (its keys: 'response')", "line 3: an empty prompt")


def test_missing_data_is_refused(tmp_path: Path) -> None:
    settings = DataSettings(train="", validation="")
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        read_pairs(str(tmp_path / "nowhere.jsonl"), settings)


def test_reading_rows_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("a\tb\n")
    code = (
        "import sys\n"
        "from llm2slm_export.authoring.recipe import DataSettings\n"
        "from llm2slm_export.authoring.training.pairs import overlap, read_pairs\n"
        "settings = DataSettings(train='', validation='', prompt_field=0, response_field=1)\n"
        f"assert read_pairs({str(tmp_path / 'rows.tsv')!r}, settings) == [('a', 'b')]\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_prompt_is_the_same_in_another_case_and_spacing() -> None:
    train = ["How are you?", "STRASSE", "x"]
    held_out = ["Who?", "how  ARE\tyou? ", "Straße", "HOW are you?", "how  ARE\tyou? ", "xx"]
    assert overlap(train, held_out) == ["how  ARE\tyou? ", "Straße"]
    assert overlap([], held_out) == []


def test_shared_prompts_are_counted_and_the_first_ones_shown() -> None:
    prompts = [f"prompt {i}" for i in range(9)]
    with pytest.raises(DataError) as caught:
        refuse_overlap(iter(prompts[:7]), iter([*prompts, "PROMPT 0"]), what="validation")
    assert "7 of 9 validation prompts" in caught.value.fact
    assert caught.value.evidence == (*(repr(prompt) for prompt in prompts[:5]), "and 2 more")
    refuse_overlap(prompts[:3], prompts[3:], what="validation")
