"""Held-out prompts with their references: what every system is asked, and what it is scored against."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from llm2slm_export.errors import DataError
from llm2slm_export.recipe import DataSettings
from llm2slm_export.training.pairs import read_pairs


@dataclass(frozen=True)
class Example:
    """A prompt and every response that counts as right; `task` where the data names one."""

    prompt: str
    references: tuple[str, ...]
    task: str | None = None


def read_examples(
    path: Path, prompt_field: str | int, response_field: str | int, task_field: str | int | None, rows: int | None
) -> list[Example]:
    """The examples of a JSONL or TSV file; rows with the same prompt are one example with several references.

    Args:
        task_field: key or column of the task's name; None: there are no tasks.
        rows: most examples; which ones depends on their prompts alone, not on the file's order. None: all.

    Raises:
        DataError: a missing or empty file, or unusable rows, all of them counted; a prompt with two tasks.
    """
    require_file(path, "--data")
    pairs = read_pairs(str(path), _fields(path, prompt_field, response_field))
    references: dict[str, list[str]] = {}
    for prompt, response in pairs:
        references.setdefault(prompt, []).append(response)
    tasks = _tasks(path, prompt_field, task_field) if task_field is not None else {}
    # Spread over the file, which may be sorted: the first ones would all begin alike.
    chosen = sorted(references, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[:rows]
    return [Example(prompt, tuple(dict.fromkeys(references[prompt])), tasks.get(prompt)) for prompt in chosen]


def require_file(path: Path, option: str) -> None:
    """Refuse what is not a file: nothing is looked for on a hub here.

    Raises:
        DataError: it is none.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.", remedy=f"check the path given with {option}")


def _fields(path: Path, prompt_field: str | int, response_field: str | int) -> DataSettings:
    return DataSettings(train=str(path), validation=str(path), prompt_field=prompt_field, response_field=response_field)


def _tasks(path: Path, prompt_field: str | int, task_field: str | int) -> dict[str, str]:
    tasks: dict[str, str] = {}
    problems = []
    for prompt, task in read_pairs(str(path), _fields(path, prompt_field, task_field)):
        if tasks.setdefault(prompt, task) != task:
            problems.append(f"{prompt!r}: {tasks[prompt]!r} and {task!r}")
    if problems:
        raise DataError(
            f"{len(problems)} prompts of {path} have two tasks.",
            *problems[:5],
            remedy="a prompt must tell its task: mend the rows named",
        )
    return tasks
