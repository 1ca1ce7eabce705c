"""Prompts from arguments, standard input and files, and responses to be scored. If one of them is unusable, none is run.

A prompt and a response keep their place, so that a later error can name its line.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llm2slm_export.errors import PromptError, ResponseError, UsageError, listed
from llm2slm_export.files.data_files import Field, Rows, default_fields, kind_of, parse_rows, read_rows, require_file

STDIN = "-"


@dataclass(frozen=True)
class Prompt:
    """A prompt and its place, such as `prompt 2` or `line 7 of standard input`."""

    text: str
    place: str


def read_prompts(
    arguments: Sequence[str],
    file: Path | None,
    stdin: Callable[[], IO[bytes]],
    *,
    prompt_field: Field | None = None,
    origin: str = "",
) -> list[Prompt]:
    """The prompts of a command, from exactly one source: arguments, `-` (standard input, one per line) or a file.

    Args:
        file: as `read_file`.
        stdin: opens standard input; called only for `-`.
        prompt_field, origin: as `read_file`.

    Raises:
        UsageError: no source, two sources, or a file of an unknown kind.
        DataError: the file does not exist, or its content does not match its name.
        PromptError: unusable prompts; the first ones are named, all are counted.
    """
    if file is not None:
        if arguments:
            raise UsageError(
                f"Prompts are given twice: as arguments ({arguments[0]!r}) and with --file {file}.",
                remedy="give one of the two",
            )
        return read_file(file, "--file", prompt_field, origin)
    if list(arguments) == [STDIN]:
        return from_lines(stdin().read(), "standard input")
    if STDIN in arguments:
        raise UsageError(
            "'-' is given beside other prompts.", remedy="give '-' alone to read prompts from standard input"
        )
    if not arguments:
        raise UsageError(
            "There is no prompt.",
            remedy="give PROMPT, '-' to read standard input, or --file FILE (.jsonl, .tsv, .csv or .txt)",
        )
    return from_arguments(arguments)


def with_locations(error: PromptError, prompts: Sequence[Prompt]) -> PromptError:
    """The same error, with the prompts' places instead of their indices.

    Args:
        prompts: those of the call that failed; empty where they are not known (an encoding's).
    """
    if not error.prompts or not prompts:
        return PromptError(error.fact, *error.evidence, remedy=error.remedy)
    reasons = (f"{prompts[index].place}: {reason}" for index, reason in error.prompts.items())
    return PromptError(error.fact, *listed(reasons), remedy=error.remedy)


@contextmanager
def located(prompts: Sequence[Prompt]) -> Iterator[None]:
    """Name the places of these prompts in the errors of a call on them.

    Raises:
        PromptError: as `with_locations` makes it.
    """
    try:
        yield
    except PromptError as error:
        raise with_locations(error, prompts) from error


def read_file(path: Path, option: str = "--file", prompt_field: Field | None = None, origin: str = "") -> list[Prompt]:
    """The prompts of a `.jsonl`, `.tsv`, `.csv` or `.txt` file that an option names.

    Args:
        prompt_field: key or column of the prompt; None: as `data_files.default_fields`.
        origin: where the field comes from, for messages; empty if the user gave it.
    """
    if kind_of(path) is None:
        raise UsageError(
            f"{option} {path} is neither .jsonl, .tsv, .csv nor .txt.",
            remedy="give the file the extension of its format",
        )
    require_file(path, option)
    fields = default_fields(path, ["prompt"]) if prompt_field is None else {"prompt": prompt_field}
    return _usable(read_rows(path, fields, origin=origin), str(path))


@dataclass(frozen=True)
class GivenResponse:
    """A response to be scored and its place, such as `line 7 of labels.txt`."""

    text: str
    place: str


def read_responses(path: Path, option: str = "--score") -> list[GivenResponse]:
    """The responses of a text file that an option names, one per line.

    Raises:
        UsageError: the file's extension is that of another format.
        DataError: the file does not exist, is empty, or is not UTF-8 text.
        ResponseError: empty lines; the first ones are named, all are counted.
    """
    kind = kind_of(path)
    if kind not in (None, "text"):
        raise UsageError(f"{option} {path} is {kind}.", remedy="give a text file with one response per line")
    require_file(path, option)
    rows = read_rows(path, {"response": "response"}, kind="text")
    if rows.problems:
        raise ResponseError(
            f"{len(rows.problems)} of {rows.total} responses from {path} cannot be used; nothing was run.",
            *listed(rows.reasons),
            remedy="correct or remove the lines named, then run again",
        )
    return [GivenResponse(text, f"line {line} of {path}") for line, (text,) in rows.texts]


@contextmanager
def located_responses(responses: Sequence[GivenResponse]) -> Iterator[None]:
    """Name the places of these responses, the same ones for every prompt, in the errors of a call on them.

    Raises:
        ResponseError: with each refused response once.
    """
    try:
        yield
    except ResponseError as error:
        if not error.responses:
            raise
        reasons: dict[int, str] = {}
        for (_, index), reason in error.responses.items():
            reasons.setdefault(index, f"{responses[index].place}: {reason}")
        raise ResponseError(
            error.fact, *listed(reasons[index] for index in sorted(reasons)), remedy=error.remedy
        ) from error


def from_arguments(texts: Sequence[str]) -> list[Prompt]:
    """Prompts that are arguments of the command."""
    reasons = [
        f"prompt {number}: {reason}" for number, text in enumerate(texts, start=1) if (reason := _unusable(text))
    ]
    if reasons:
        _refuse(reasons, len(texts), "arguments")
    return [Prompt(text, f"prompt {number}") for number, text in enumerate(texts, start=1)]


def from_lines(raw: bytes, name: str) -> list[Prompt]:
    """Prompts of UTF-8 text, one per line."""
    if not raw.strip():
        raise PromptError(f"There is no prompt in {name}: it is empty.", remedy="give at least one line of text")
    return _usable(parse_rows(raw, "text", name, {"prompt": "prompt"}), name)


def _usable(rows: Rows, name: str) -> list[Prompt]:
    """The prompts with their places, if all of them are usable."""
    if rows.problems:
        _refuse(rows.reasons, rows.total, name)
    return [Prompt(text, f"line {line} of {name}") for line, (text,) in rows.texts]


def _unusable(text: str) -> str | None:
    if not text.strip():
        return "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not valid Unicode (code point U+{ord(text[error.start]):04X})"
    return None


def _refuse(reasons: list[str], total: int, name: str) -> None:
    raise PromptError(
        f"{len(reasons)} of {total} prompts from {name} cannot be used; nothing was run.",
        *listed(reasons),
        remedy="correct or remove the prompts named, then run again",
    )
