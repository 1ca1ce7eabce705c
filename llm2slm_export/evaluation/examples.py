"""Held-out prompts and references, the data of an evaluation."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm2slm_export.errors import DataError, listed
from llm2slm_export.files.data_files import Field, read_rows, refuse_problems, require_file


@dataclass(frozen=True)
class Example:
    """A prompt with its references; `task`: its task's name, if the data has tasks."""

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
    """Read the examples of a JSONL, TSV or CSV file.

    Rows with the same prompt become one example with several references.

    Args:
        path: the file.
        prompt_field, response_field: keys or columns.
        task_field: key or column of the task's name; None: no tasks.
        rows: maximum number of examples, selected by a hash of the prompt, independent of the file's order; None: all.
        origin: origin of the fields, for messages; empty if the user gave them.

    Raises:
        DataError: the file is missing or empty, has unusable rows (the message counts them), or a prompt has two tasks.
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
    # By hash, because the file may be sorted: its first prompts would all begin alike.
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
            remedy="fix these rows: a prompt must have one task",
        )
