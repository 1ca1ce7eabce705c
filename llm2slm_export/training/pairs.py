"""Prompt and response pairs as texts: read from files or data sets. Needs neither torch nor transformers."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from llm2slm_export.errors import DataError
from llm2slm_export.recipe import DataSettings

Row = tuple[str, str]


def read_pairs(source: str, settings: DataSettings) -> list[Row]:
    """Prompt and response of every row of a JSONL file, a TSV file, or a `datasets` data set (`name:split`).

    Raises:
        DataError: the file is missing or empty, or rows are malformed: every one is counted, the first ones are named.
    """
    path = Path(source)
    if path.suffix in {".jsonl", ".json", ".tsv"} or path.exists():
        if not path.is_file():
            raise DataError(
                f"There is no data file {source}.",
                remedy="check training.data in the recipe; README.md says how the data is fetched",
            )
        rows = list(_read_tsv(path, settings) if path.suffix == ".tsv" else _read_jsonl(path, settings))
    else:
        from datasets import load_dataset  # it takes a second to import, and files do without

        name, _, split = source.partition(":")
        rows = [
            (str(row[settings.prompt_field]), str(row[settings.response_field]))
            for row in load_dataset(name, split=split or "train")
        ]
    if not rows:
        raise DataError(f"{source} holds no rows.", remedy="check training.data in the recipe")
    return rows


def _read_jsonl(path: Path, settings: DataSettings) -> Iterator[Row]:
    problems: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
            prompt, response = row[settings.prompt_field], row[settings.response_field]
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg})")
            continue
        except (KeyError, TypeError):
            problems.append(f"line {number}: no {settings.prompt_field!r} and {settings.response_field!r}")
            continue
        if not (isinstance(prompt, str) and prompt and isinstance(response, str) and response):
            problems.append(f"line {number}: an empty prompt or response")
            continue
        yield prompt, response
    _refuse(path, problems)


def _read_tsv(path: Path, settings: DataSettings) -> Iterator[Row]:
    columns = settings.prompt_field, settings.response_field
    if not all(isinstance(c, int) for c in columns):
        raise DataError(
            f"{path} is TSV: its columns are numbered, not named.",
            f"prompt_field {columns[0]!r}, response_field {columns[1]!r}",
            remedy="set training.data.prompt_field and response_field to column numbers from 0",
        )
    first, second = int(columns[0]), int(columns[1])
    problems: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        cells = line.split("\t")
        if len(cells) <= max(first, second) or not cells[first] or not cells[second]:
            problems.append(f"line {number}: no text in column {first} or {second}")
            continue
        yield cells[first], cells[second]
    _refuse(path, problems)


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8.", str(error), remedy="convert it, for example with iconv -t utf-8"
        ) from error


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise DataError(
            f"{path} has {len(problems)} unusable rows.", *problems[:5], *more, remedy="mend or remove them"
        )


def overlap(train: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """The held-out prompts that are training prompts too, distinct, in held-out order.

    Prompts are the same where they differ only in case and white space. Of several spellings the first is returned.
    """
    known = {_folded(prompt) for prompt in train}
    found: dict[str, str] = {}
    for prompt in held_out:
        if (folded := _folded(prompt)) in known:
            found.setdefault(folded, prompt)
    return list(found.values())


def refuse_overlap(train: Iterable[str], held_out: Iterable[str], *, what: str) -> None:
    """Refuse held-out prompts that are training prompts: a loss or a score on them says nothing of new prompts.

    Args:
        what: the held-out prompts, for the message.

    Raises:
        DataError: with how many there are, of how many, and the first ones.
    """
    prompts = list(held_out)
    shared = overlap(train, prompts)
    if shared:
        distinct = len({_folded(prompt) for prompt in prompts})
        more = [f"and {len(shared) - 5} more"] if len(shared) > 5 else []
        raise DataError(
            f"{len(shared)} of {distinct} {what} prompts are training prompts too.",
            *(repr(prompt) for prompt in shared[:5]),
            *more,
            remedy="take them out of one of the two files (case and white space do not make a prompt another one)",
        )


def _folded(prompt: str) -> str:
    return " ".join(prompt.casefold().split())
