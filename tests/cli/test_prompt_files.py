"""Prompts from arguments, standard input and files: all usable, or none is run."""

import io
from pathlib import Path

import pytest

from llm2slm_export.cli.prompt_files import Prompt, from_lines, read_file, read_prompts, with_locations
from llm2slm_export.errors import DataError, PromptError, UsageError


def read(arguments: list[str], stdin: bytes = b"", file: Path | None = None) -> list[str]:
    return [prompt.text for prompt in read_prompts(arguments, file, lambda: io.BytesIO(stdin))]


def test_arguments_are_prompts_in_order() -> None:
    assert read_prompts(["one", "two"], None, io.BytesIO) == [Prompt("one", "prompt 1"), Prompt("two", "prompt 2")]


@pytest.mark.parametrize("raw", [b"a\nb", b"a\nb\n", b"a\r\nb\r\n", b"\xef\xbb\xbfa\nb\n"])
def test_lines_whatever_their_ends(raw: bytes) -> None:
    assert read(["-"], raw) == ["a", "b"]


def test_line_separators_of_unicode_are_text() -> None:
    assert read(["-"], "a\u2028b\n".encode()) == ["a\u2028b"]


def test_a_text_file_and_a_jsonl_file(tmp_path: Path) -> None:
    text, rows = tmp_path / "x.txt", tmp_path / "x.jsonl"
    text.write_text("where?\nwho?\n", encoding="utf-8")
    rows.write_text('{"prompt": "où ?", "id": 3}\n{"prompt": "two\\nlines"}\n', encoding="utf-8")
    assert read([], file=text) == ["where?", "who?"]
    assert read([], file=rows) == ["où ?", "two\nlines"]


def test_places_name_line_and_source() -> None:
    assert from_lines(b"a\nb\n", "standard input")[1] == Prompt("b", "line 2 of standard input")


def test_every_bad_line_is_reported_in_order_and_nothing_is_processed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "good"}\nnot json\n{"text": "x"}\n[1]\n{"prompt": 3}\n\xff\n{"prompt": ""}\n')
    with pytest.raises(PromptError) as caught:
        read_file(path)
    assert caught.value.fact == f"6 of 7 prompts from {path} cannot be used; nothing was run."
    assert caught.value.evidence == (
        "line 2: not JSON (Expecting value at column 1): 'not json'",
        "line 3: no 'prompt' (its keys: 'text')",
        "line 4: not an object: '[1]'",
        "line 5: 'prompt' is the number 3, not text",
        "line 6: not UTF-8 (byte 0xff at column 1)",
        "and 1 more",
    )


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"ok\n\nok\n", "line 2: an empty prompt"),
        (b"ok\n   \n", "line 2: an empty prompt"),
        (b"ok\ncaf\xe9\n", "line 2: not UTF-8 (byte 0xe9 at column 4)"),
        (b"", "standard input"),
        (b"\n", "standard input"),
    ],
)
def test_bad_standard_input_is_named_by_line(raw: bytes, reason: str) -> None:
    with pytest.raises(PromptError) as caught:
        read(["-"], raw)
    assert reason in str(caught.value)
    assert "→" in str(caught.value)


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\\ud800"}\n')
    with pytest.raises(PromptError, match=r"line 1: not valid Unicode \(code point U\+D800\)"):
        read_file(tmp_path / "x.jsonl")


@pytest.mark.parametrize("arguments", [[""], ["fine", " "]])
def test_an_empty_argument_is_refused(arguments: list[str]) -> None:
    with pytest.raises(PromptError, match=f"prompt {len(arguments)}: empty"):
        read(arguments)


@pytest.mark.parametrize(
    ("arguments", "file", "value"),
    [
        ([], None, "There is no prompt"),
        (["a", "-"], None, "'-' is given beside other prompts"),
        (["a"], Path("x.txt"), "given twice"),
        ([], Path("x.parquet"), "x.parquet is neither .jsonl, .tsv, .csv nor .txt"),
    ],
)
def test_wrong_usage(arguments: list[str], file: Path | None, value: str) -> None:
    with pytest.raises(UsageError, match=value):
        read(arguments, file=file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*x\.txt"):
        read([], file=tmp_path / "x.txt")


def test_the_orchestrators_errors_get_the_users_places() -> None:
    prompts = from_lines(b"a\nb\n", "standard input")
    error = with_locations(
        PromptError("1 of 2 prompts cannot be run.", remedy="cut", prompts={1: "99 tokens, at most 64"}), prompts
    )
    assert error.evidence == ("line 2 of standard input: 99 tokens, at most 64",)
    assert error.remedy == "cut"


def test_an_error_without_known_prompts_stays_as_it_is() -> None:
    error = PromptError("1 of 1 prompts cannot be run.", remedy="cut", prompts={0: "99 tokens, at most 64"})
    assert error.evidence == ("prompt 0: 99 tokens, at most 64",)
    assert str(with_locations(error, [])) == str(error)
    other = PromptError("There is no prompt.", "a reason", remedy="give one")
    assert str(with_locations(other, from_lines(b"a\n", "standard input"))) == str(other)


def test_many_prompts_are_counted_by_the_users_places() -> None:
    prompts = from_lines(b"a\n" * 9, "x.txt")
    error = with_locations(PromptError("9 of 9.", remedy="cut", prompts=dict.fromkeys(range(9), "too long")), prompts)
    assert error.evidence[0] == "line 1 of x.txt: too long"
    assert error.evidence[-1] == "and 4 more"
