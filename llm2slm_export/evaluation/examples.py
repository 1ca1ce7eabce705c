"""Held-out prompts with their references: what every system is asked, and what it is scored against."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm2slm_export.errors import DataError, listed
from llm2slm_export.files.data_files import Field, read_rows, refuse_problems, require_file


@dataclass(frozen=True)
class Example:
    """A prompt and every response that counts as right; `task` where the data names one."""

    prompt: str
    references: tuple[str, ...]
    task: str | None = None


def read_examples(
    path: Path,
    prompt_field: Field,
    response_field: Field,
    task_field: Field | None,
    rows: int | None,
    *,
    origin: str = "",
) -> list[Example]:
    """The examples of a JSONL, TSV or CSV file; rows with the same prompt are one example with several references.

    Args:
        task_field: key or column of the task's name; None: there are no tasks.
        rows: most examples; which ones depends on their prompts alone, not on the file's order. None: all.
        origin: where the fields come from, for messages; empty where the user gave them.

    Raises:
        DataError: a missing or empty file, or unusable rows, all of them counted; a prompt with two tasks.
    """
    require_file(path, "--data")
    fields = {"prompt": prompt_field, "response": response_field}
    if task_field is not None:
        fields["task"] = task_field
    read = read_rows(path, fields, origin=origin)
    refuse_problems(read, str(path))
    references: dict[str, list[str]] = {}
    tasks: dict[str, set[str]] = {}
    for _, (prompt, response, *task) in read.texts:
        references.setdefault(prompt, []).append(response)
        tasks.setdefault(prompt, set()).update(task)
    _refuse_two_tasks(path, tasks)
    # Spread over the file, which may be sorted: the first ones would all begin alike.
    chosen = sorted(references, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[:rows]
    return [
        Example(prompt, tuple(dict.fromkeys(references[prompt])), next(iter(tasks[prompt]), None)) for prompt in chosen
    ]


def _refuse_two_tasks(path: Path, tasks: Mapping[str, set[str]]) -> None:
    problems = [
        f"{prompt!r}: {' and '.join(map(repr, sorted(named)))}" for prompt, named in tasks.items() if len(named) > 1
    ]
    if problems:
        raise DataError(
            f"{len(problems)} prompts of {path} have two tasks.",
            *listed(problems),
            remedy="a prompt must tell its task: fix the rows named",
        )
