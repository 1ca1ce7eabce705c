"""Prompt and response pairs as texts: read from files or data sets. Needs neither torch nor transformers."""

from collections.abc import Iterable
from pathlib import Path

from llm2slm_export.authoring.recipe import DataSettings
from llm2slm_export.errors import DataError, require_extra
from llm2slm_export.files.data_files import Field, kind_of, read_rows, refuse_problems, require_file

Row = tuple[str, str]


def read_pairs(source: str, settings: DataSettings) -> list[Row]:
    """Prompt and response of every row of a JSONL, TSV or CSV file, or a `datasets` data set (`name:split`).

    Raises:
        DataError: the file is missing or empty, or rows are malformed: every one is counted, the first ones are named.
    """
    fields = {"prompt": settings.prompt_field, "response": settings.response_field}
    return [(prompt, response) for prompt, response in _read(source, fields)]


def read_further_prompts(source: str, settings: DataSettings) -> list[str]:
    """The prompts alone, of rows that need no response.

    Raises:
        DataError: as `read_pairs`.
    """
    return [prompt for (prompt,) in _read(source, {"prompt": settings.prompt_field})]


def is_file_name(source: str) -> bool:
    """Whether a source of data is a file, there or not, and no data set of a hub, which is `name` or `owner/name`."""
    return (
        kind_of(Path(source)) is not None
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or _exists(source)
    )


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # a name that is too long
        return False


def _read(source: str, fields: dict[str, Field]) -> list[tuple[str, ...]]:
    """Of every row the values of the fields, by what they are to us."""
    if not is_file_name(source):
        return _data_set(source, fields)
    path = Path(source)
    if not _exists(source):
        raise DataError(
            f"There is no data file {source}.",
            f"looked for {path.absolute()}",
            remedy="check training.data in the recipe; the first lines of a recipe say how its data is fetched",
        )
    require_file(path, "training.data in the recipe")
    rows = read_rows(path, fields)
    refuse_problems(rows, source)
    return [texts for _, texts in rows.texts]


def _data_set(source: str, fields: dict[str, Field]) -> list[tuple[str, ...]]:
    """The rows of a data set of a hub."""
    require_extra("train", "datasets", purpose=f"The data set {source}")
    from datasets import load_dataset  # it takes a second to import, and files do without

    name, _, split = source.partition(":")
    try:
        data = load_dataset(name, split=split or "train")
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"The data set {name!r} cannot be loaded.",
            f"no file: {Path(source).absolute()}",
            f"{type(error).__name__}: {first[:300]}",
            remedy="check the name and the network, or name a file: .jsonl, .tsv or .csv",
        ) from error
    lacking = [str(field) for field in fields.values() if field not in data.column_names]
    if lacking:
        raise DataError(
            f"The data set {source} has no column {' and '.join(map(repr, lacking))}.",
            f"its columns: {', '.join(map(repr, data.column_names))}",
            remedy="set training.data.prompt_field and response_field to two of them",
        )
    rows = [tuple(str(row[field]) for field in fields.values()) for row in data]
    if not rows:
        raise DataError(f"{source} holds no rows.", remedy="check training.data in the recipe")
    return rows


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
