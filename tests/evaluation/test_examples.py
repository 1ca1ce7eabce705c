"""What is scored: rows of one prompt together, tasks, a choice that does not depend on the file's order."""

import json
from pathlib import Path

import pytest

from llm2slm_export.errors import DataError
from llm2slm_export.evaluation.examples import Example, read_examples

ROWS = [
    {"prompt": "a b", "response": "x", "task": "one"}, {"prompt": "c", "response": "y", "task": "two"},
    {"prompt": "a b", "response": "z", "task": "one"}, {"prompt": "a b", "response": "x", "task": "one"},
]  # fmt: skip


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_one_prompt_are_one_example(tmp_path: Path) -> None:
    found = read_examples(write(tmp_path / "data.jsonl", ROWS), "prompt", "response", "task", None)
    assert sorted(found, key=lambda e: e.prompt) == [Example("a b", ("x", "z"), "one"), Example("c", ("y",), "two")]


def test_which_examples_are_chosen_does_not_depend_on_their_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i}", "response": "r"} for i in range(50)]
    forwards = read_examples(write(tmp_path / "a.jsonl", rows), "prompt", "response", None, 7)
    backwards = read_examples(write(tmp_path / "b.jsonl", rows[::-1]), "prompt", "response", None, 7)
    assert forwards == backwards
    assert len(forwards) == 7
    assert [e.prompt for e in forwards] != [f"prompt {i}" for i in range(7)]


def test_tsv_columns(tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_text("y\tprompt\nz\tprompt\n")
    assert read_examples(path, 1, 0, None, None) == [Example("prompt", ("y", "z"))]


def test_a_prompt_of_two_tasks_is_refused(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "c", "response": "y", "task": "one"}]
    with pytest.raises(DataError, match="two tasks"):
        read_examples(write(tmp_path / "data.jsonl", rows), "prompt", "response", "task", None)


def test_empty_data_and_rows_without_a_response_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        read_examples(tmp_path / "empty.jsonl", "prompt", "response", None, None)
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": ""}]
    with pytest.raises(DataError, match="line 2"):
        read_examples(write(tmp_path / "data.jsonl", rows), "prompt", "response", None, None)
