"""Prompt and response pairs as text, from files or datasets. Needs neither torch nor transformers."""

from collections.abc import Iterable
from pathlib import Path

from llm2slm_export.authoring.recipe import DataSettings
from llm2slm_export.errors import DataError, require_extra
from llm2slm_export.files.data_files import Field, kind_of, read_rows, refuse_problems, require_file

Row = tuple[str, str]


def read_pairs(source: str, settings: DataSettings) -> list[Row]:
    """Read prompt and response of every row of a JSONL, TSV or CSV file, or of a `datasets` dataset (`name:split`).

    Raises:
        DataError: the file is missing or empty, or has malformed rows; the message counts them and shows the first.
    """
    fields = {"prompt": settings.prompt_field, "response": settings.response_field}
    return [(prompt, response) for prompt, response in _read(source, fields)]


def read_further_prompts(source: str, settings: DataSettings) -> list[str]:
    """Read the prompts of rows that need no response.

    Raises:
        DataError: as `read_pairs`.
    """
    return [prompt for (prompt,) in _read(source, {"prompt": settings.prompt_field})]


def is_file_name(source: str) -> bool:
    """Whether a data source is a file name (existing or not) rather than a hub dataset, `name` or `owner/name`."""
    return (
        kind_of(Path(source)) is not None
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or _exists(source)
    )


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # the name is too long
        return False


def _read(source: str, fields: dict[str, Field]) -> list[tuple[str, ...]]:
    """The fields' values in every row, in the order of `fields`."""
    if not is_file_name(source):
        return _data_set(source, fields)
    path = Path(source)
    if not _exists(source):
        raise DataError(
            f"There is no data file {source}.",
            f"looked for {path.absolute()}",
            remedy="check training.data in the recipe; the recipe's first lines have the commands that fetch its data",
        )
    require_file(path, "training.data in the recipe")
    rows = read_rows(path, fields)
    refuse_problems(rows, source)
    return [texts for _, texts in rows.texts]


def _data_set(source: str, fields: dict[str, Field]) -> list[tuple[str, ...]]:
    """The rows of a hub dataset."""
    require_extra("train", "datasets", purpose=f"The dataset {source}")
    from datasets import load_dataset  # imported here: it takes a second, and files do not need it

    name, _, split = source.partition(":")
    try:
        data = load_dataset(name, split=split or "train")
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"The dataset {name!r} cannot be loaded.",
            f"not a file: {Path(source).absolute()}",
            f"{type(error).__name__}: {first[:300]}",
            remedy="check the name and the network, or name a file: .jsonl, .tsv or .csv",
        ) from error
    lacking = [str(field) for field in fields.values() if field not in data.column_names]
    if lacking:
        raise DataError(
            f"The dataset {source} has no column {' and '.join(map(repr, lacking))}.",
            f"its columns: {', '.join(map(repr, data.column_names))}",
            remedy="set training.data.prompt_field and response_field to two of them",
        )
    rows = [tuple(str(row[field]) for field in fields.values()) for row in data]
    if not rows:
        raise DataError(f"{source} has no rows.", remedy="check training.data in the recipe")
    return rows


def overlap(train: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """Held-out prompts that are also training prompts, without duplicates, in held-out order.

    The comparison ignores case and white space; the first spelling of a prompt is returned.
    """
    known = {_folded(prompt) for prompt in train}
    found: dict[str, str] = {}
    for prompt in held_out:
        if (folded := _folded(prompt)) in known:
            found.setdefault(folded, prompt)
    return list(found.values())


def refuse_overlap(train: Iterable[str], held_out: Iterable[str], *, what: str) -> None:
    """Refuse held-out prompts that are training prompts: scores on them do not measure generalization.

    Args:
        train: training prompts.
        held_out: held-out prompts.
        what: names the held-out prompts in the message.

    Raises:
        DataError: the message counts them and shows the first.
    """
    prompts = list(held_out)
    shared = overlap(train, prompts)
    if shared:
        distinct = len({_folded(prompt) for prompt in prompts})
        more = [f"and {len(shared) - 5} more"] if len(shared) > 5 else []
        raise DataError(
            f"{len(shared)} of {distinct} {what} prompts are also training prompts.",
            *(repr(prompt) for prompt in shared[:5]),
            *more,
            remedy="remove them from one of the two files (prompts that differ in case or white space only are equal)",
        )


def _folded(prompt: str) -> str:
    return " ".join(prompt.casefold().split())
