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
    fields = {"prompt": settings.prompt_field, "response": settings.response_field}
    return [(prompt, response) for prompt, response in _read(source, fields)]


def read_prompts(source: str, settings: DataSettings) -> list[str]:
    """The prompts alone, of rows that need no response.

    Raises:
        DataError: as `read_pairs`.
    """
    return [prompt for (prompt,) in _read(source, {"prompt": settings.prompt_field})]


def _read(source: str, fields: dict[str, str | int]) -> list[tuple[str, ...]]:
    """Of every row the values of the fields, by what they are to us."""
    path = Path(source)
    if path.suffix in {".jsonl", ".json", ".tsv"} or path.exists():
        if not path.is_file():
            raise DataError(
                f"There is no data file {source}.",
                remedy="check training.data in the recipe; README.md says how the data is fetched",
            )
        rows = list(_read_tsv(path, fields) if path.suffix == ".tsv" else _read_jsonl(path, fields))
    else:
        from datasets import load_dataset  # it takes a second to import, and files do without

        name, _, split = source.partition(":")
        rows = [
            tuple(str(row[field]) for field in fields.values()) for row in load_dataset(name, split=split or "train")
        ]
    if not rows:
        raise DataError(f"{source} holds no rows.", remedy="check training.data in the recipe")
    return rows


def _read_jsonl(path: Path, fields: dict[str, str | int]) -> Iterator[tuple[str, ...]]:
    problems: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
            values = tuple(row[field] for field in fields.values())
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg})")
            continue
        except (RecursionError, ValueError):
            problems.append(f"line {number}: nested too deep, or a number of too many digits")
            continue
        except (LookupError, TypeError):
            problems.append(f"line {number}: no {' and '.join(map(repr, fields.values()))}")
            continue
        if not all(isinstance(value, str) and value for value in values):
            problems.append(f"line {number}: an empty {' or '.join(fields)}")
            continue
        if any("\ud800" <= character <= "\udfff" for value in values for character in value):
            problems.append(f"line {number}: a lone surrogate, which is no text")
            continue
        yield values
    _refuse(path, problems)


def _read_tsv(path: Path, fields: dict[str, str | int]) -> Iterator[tuple[str, ...]]:
    columns = [field for field in fields.values() if isinstance(field, int)]
    if len(columns) < len(fields):
        raise DataError(
            f"{path} is TSV: its columns are numbered, not named.",
            ", ".join(f"{name}_field {field!r}" for name, field in fields.items()),
            remedy="set training.data.prompt_field and response_field to column numbers from 0",
        )
    problems: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        cells = line.split("\t")
        values = tuple(cells[column] for column in columns if column < len(cells))
        if len(values) < len(columns) or not all(values):
            problems.append(f"line {number}: no text in column {' or '.join(map(str, columns))}")
            continue
        yield values
    _refuse(path, problems)


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8.", str(error), remedy="convert it, for example with iconv -t utf-8"
        ) from error


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise DataError(
            f"{path} has {len(problems)} unusable rows.", *problems[:5], *more, remedy="correct or remove them"
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
