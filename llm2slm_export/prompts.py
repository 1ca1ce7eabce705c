"""Prompts from arguments, standard input and files. All of them are usable, or none is run.

A prompt remembers where it came from, so that whatever is wrong with it later can be said with a line number.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llm2slm_export.errors import PromptError, UsageError, listed

STDIN = "-"


@dataclass(frozen=True)
class Prompt:
    """A prompt and its place: `prompt 2`, `line 7 of standard input`."""

    text: str
    place: str


def read_prompts(arguments: Sequence[str], file: Path | None, stdin: Callable[[], IO[bytes]]) -> list[Prompt]:
    """The prompts of one command, from exactly one place: arguments, `-` (standard input, one a line) or a file.

    Args:
        file: `.jsonl` (objects with a `prompt`; other keys are ignored) or `.txt` (one prompt a line).
        stdin: opens standard input; called only where `-` is given.

    Raises:
        UsageError: no place, two places, or a file that is neither kind.
        PromptError: the file cannot be found, or prompts that cannot be used: the first ones are named, all are counted.
    """
    if file is not None:
        if arguments:
            raise UsageError(
                f"Prompts are given twice: as arguments ({arguments[0]!r}) and with --file {file}.",
                remedy="give one of the two",
            )
        return read_file(file)
    if list(arguments) == [STDIN]:
        return from_lines(stdin().read(), "standard input")
    if STDIN in arguments:
        raise UsageError(
            "'-' stands beside other prompts.", remedy="give '-' alone to read prompts from standard input"
        )
    if not arguments:
        raise UsageError(
            "There is no prompt.", remedy="give PROMPT, '-' to read standard input, or --file X.jsonl|X.txt"
        )
    return from_arguments(arguments)


def placed(error: PromptError, prompts: Sequence[Prompt]) -> PromptError:
    """An error of the orchestrator, which counts prompts from 0, with the places the user knows them by."""
    reasons = []
    for line in error.evidence:
        match = re.match(r"prompt (\d+)(?=: )", line)
        reasons.append(prompts[int(match[1])].place + line[match.end() :] if match else line)
    return PromptError(error.fact, *reasons, remedy=error.remedy)


def read_file(path: Path, option: str = "--file") -> list[Prompt]:
    """The prompts of a `.jsonl` or `.txt` file, which was given with an option."""
    readers: dict[str, Callable[[bytes, str], list[Prompt]]] = {".jsonl": from_jsonl, ".txt": from_lines}
    if path.suffix not in readers:
        raise UsageError(f"{option} {path} is neither .jsonl nor .txt.", remedy="name it by what it holds")
    if not path.is_file():
        raise PromptError(
            f"There is no file {path}.", f"looked for {path.absolute()}", remedy=f"check the path given to {option}"
        )
    return readers[path.suffix](path.read_bytes(), str(path))


def from_arguments(texts: Sequence[str]) -> list[Prompt]:
    """Prompts given one by one on the command line."""
    numbered = [(f"prompt {number}", text) for number, text in enumerate(texts, start=1)]
    return _checked(numbered, [], len(texts), "arguments")


def from_lines(raw: bytes, name: str) -> list[Prompt]:
    """One prompt a line of UTF-8 text."""
    lines, problems = _decoded(raw)
    numbered = [(f"line {number}", text) for number, text in lines]
    return _checked(numbered, problems, len(lines) + len(problems), name)


def from_jsonl(raw: bytes, name: str) -> list[Prompt]:
    """The `prompt` of every line of a JSONL file."""
    lines, problems = _decoded(raw)
    total = len(lines) + len(problems)
    numbered = []
    for number, line in lines:
        try:
            numbered.append((f"line {number}", _prompt_of(line)))
        except ValueError as error:
            problems.append((number, str(error)))
    return _checked(numbered, problems, total, name)


def _prompt_of(line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}): {_shortened(line)}") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"nested too deep, or a number of too many digits: {_shortened(line)}") from error
    if not isinstance(row, dict):
        raise ValueError(f"not an object: {_shortened(line)}")
    if not isinstance(row.get("prompt"), str):
        raise ValueError(f"no text under 'prompt': {_shortened(line)}")
    return str(row["prompt"])


def _decoded(raw: bytes) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Numbered lines, and those that are not UTF-8. A final line end and a byte order mark are no content."""
    lines, problems = [], []
    raw = raw.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n")
    for number, line in enumerate(raw.split(b"\n") if raw else [], start=1):
        try:
            lines.append((number, line.removesuffix(b"\r").decode("utf-8")))
        except UnicodeDecodeError as error:
            problems.append((number, f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"))
    return lines, problems


def _checked(
    numbered: Iterable[tuple[str, str]], problems: list[tuple[int, str]], total: int, name: str
) -> list[Prompt]:
    """Prompts with their places, once nothing is wrong with any of them."""
    if total == 0:
        raise PromptError(f"There is no prompt in {name}: it is empty.", remedy="give at least one line of text")
    prompts, reasons = [], {number: f"line {number}: {reason}" for number, reason in problems}
    for place, text in numbered:
        if reason := _unusable(text):
            reasons[int(place.split()[1])] = f"{place}: {reason}"
        prompts.append(Prompt(text, place if name == "arguments" else f"{place} of {name}"))
    if reasons:
        _refuse([reasons[number] for number in sorted(reasons)], total, name)
    return prompts


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
        remedy="correct or remove what is named, then run again",
    )


def _shortened(line: str) -> str:
    return repr(line if len(line) <= 40 else line[:39] + "…")
