"""The input of a job: a file whose rows are read part by part, so that memory does not grow with it."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from llm2slm_export.errors import DataError, UsageError
from llm2slm_export.files.data_files import (
    BYTE_ORDER_MARK,
    NOT_JSON,
    TABLES,
    Columns,
    Field,
    Kind,
    Row,
    check_fields,
    empty_file,
    kind_of,
    not_jsonl,
    refuse_other_encodings,
    require_file,
    stream_columns,
    stream_rows,
)

DEFAULT_ID = "id"
MOST_LINE = 16_000_000  # bytes of a line
_HEAD = 1_000  # bytes by which other encodings are recognized


@dataclass(frozen=True)
class Part:
    """Consecutive rows of the input.

    Args:
        number: its index among the parts.
        first: index of its first row.
        rows: number of its rows.
        lines: number of lines before it.
        offset, bytes, sha256: of its lines in the file.
    """

    number: int
    first: int
    rows: int
    lines: int
    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class InputRow:
    """A row of the input.

    Args:
        index: its index among all rows.
        line: its line number.
        prompt: None: it is unusable.
        problem: the reason why; None: it is usable.
        identifier: `{"id": value}`, or empty if it has none.
    """

    index: int
    line: int
    prompt: str | None
    problem: str | None
    identifier: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputFile:
    """A scanned file.

    Args:
        path: its absolute path.
        prompt_field: key or column of the prompt.
        id_field: key or column of the rows' identifiers; None: that named `id`, if there is one.
        columns: of a TSV or CSV file.
        bytes, sha256, rows: of the whole file.
        parts: its rows in parts.
    """

    path: Path
    prompt_field: Field
    id_field: Field | None
    columns: Columns | None
    bytes: int
    sha256: str
    rows: int
    parts: tuple[Part, ...]

    def read(self, part: Part) -> list[InputRow]:
        """The rows of a part.

        Raises:
            DataError: the file cannot be read, or is not the one that was scanned.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(part.offset)
                content = file.read(part.bytes)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if hashlib.sha256(content).hexdigest() != part.sha256:
            raise DataError(
                f"{self.path} is not the file that this run began with.",
                f"rows {part.first} to {part.first + part.rows - 1} have changed",
                remedy="restore it, or start another job in another output directory",
            )
        fields = {"prompt": self.prompt_field}
        rows = stream_rows(io.BytesIO(content), _kind(self.path), fields, self.columns)
        return [self._input_row(row, part.first + index, part.lines) for index, row in enumerate(rows)]

    def _input_row(self, row: Row, index: int, lines_before: int) -> InputRow:
        prompt, problem = None if row.texts is None else row.texts[0], row.problem
        identifier = _identifier(row.value, DEFAULT_ID if self.id_field is None else self.id_field, self.columns)
        if not _is_json(identifier):
            prompt, problem, identifier = None, problem or "an id that is not JSON: NaN, or nested too deep", {}
        elif problem is None and self.id_field is not None and not identifier:
            prompt, problem = None, f"no {self.id_field!r}"
        return InputRow(index, lines_before + row.line, prompt, problem, identifier)


def scan(
    path: Path, prompt_field: Field | None, id_field: Field | None, *, part_rows: int, origin: str = ""
) -> InputFile:
    """Read a file once: check that it can be read to its end, and find its parts.

    Args:
        prompt_field: key or column of the prompt; None: each line is a prompt.
        id_field: key or column of the rows' identifiers; None: that named `id`, if there is one.
        part_rows: number of rows of a part.
        origin: source of the prompt's field, for messages; empty if the user gave it.

    Raises:
        UsageError: the file's extension is unknown.
        DataError: it cannot be read, is empty, or is not of the format of its extension.
    """
    require_file(path, "IN")
    kind, prompt = _kind(path), {"prompt": "prompt" if prompt_field is None else prompt_field}
    fields = prompt if id_field is None else prompt | {"id": id_field}
    check_fields(fields, kind, str(path))
    try:
        with path.open("rb") as file:
            scanner = _Scanner(file, path)
            columns = None
            if kind in TABLES:
                columns = _scanned_columns(scanner, path, fields, origin)
            scanner.begin()
            parts = tuple(_scanned_parts(scanner, kind, prompt, columns, part_rows))
    except OSError as error:
        raise _unreadable(path, error) from error
    if not parts:
        raise DataError(
            f"{path} has a header and no rows.",
            remedy="add rows below it; if the file has no header, number its columns from 0",
        )
    rows = parts[-1].first + parts[-1].rows
    return InputFile(
        path.absolute(), prompt["prompt"], id_field, columns, scanner.offset, scanner.whole.hexdigest(), rows, parts
    )


class _Scanner:
    """The lines of a file, with what has been read so far: the offset, the lines and the hashes."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self.name = file, str(path)
        head = file.read(_HEAD)
        refuse_other_encodings(head, self.name)
        self.offset = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
        file.seek(self.offset)
        self.whole = hashlib.sha256(head[: self.offset])
        self.part, self.lines, self.is_blank = hashlib.sha256(), 0, True
        self.first = b""  # the first line that is not blank

    def __iter__(self) -> Iterator[bytes]:
        while line := self._file.readline(MOST_LINE + 1):
            if len(line) > MOST_LINE:
                raise DataError(
                    f"Line {self.lines + 1} of {self.name} has more than {MOST_LINE:,} bytes.",
                    remedy="write one row per line",
                )
            self.lines, self.offset = self.lines + 1, self.offset + len(line)
            self.whole.update(line)
            self.part.update(line)
            if self.is_blank and line.strip():
                self.is_blank, self.first = False, line
            yield line

    def begin(self) -> None:
        """Begin a part."""
        self.part = hashlib.sha256()

    def rewind(self, offset: int) -> None:
        """Return to the first row, before which only a byte order mark was read."""
        self._file.seek(offset)
        self.whole = hashlib.sha256(BYTE_ORDER_MARK[:offset])
        self.offset, self.lines = offset, 0


def _scanned_columns(scanner: _Scanner, path: Path, fields: Mapping[str, Field], origin: str) -> Columns:
    """The columns of a TSV or CSV file. The scanner is behind the header, if there is one."""
    start = scanner.offset
    for _ in scanner:
        if not scanner.is_blank:
            break
    else:
        raise empty_file(str(path))
    scanner.rewind(start)
    columns = stream_columns(scanner, _kind(path), str(path), fields, origin=origin)
    if not columns.names:
        scanner.rewind(start)
    return replace(columns, numbers=columns.numbers[:1])  # an identifier may be anything


def _scanned_parts(
    scanner: _Scanner, kind: Kind, fields: Mapping[str, Field], columns: Columns | None, part_rows: int
) -> Iterator[Part]:
    name, before = scanner.name, scanner.lines
    offset, lines, first, count, reason = scanner.offset, before, 0, 0, ""
    number, no_json = 0, kind == "JSONL"
    for row in stream_rows(scanner, kind, fields, columns):
        if row.is_last_readable:
            raise DataError(
                f"{name} cannot be read to its end.", f"line {before + row.line}: {row.problem}",
                remedy="correct the line named",
            )  # fmt: skip
        if no_json:
            no_json = row.problem is not None and row.problem.startswith(NOT_JSON)
            reason = reason or f"line {row.line}: {row.problem}"
        count += 1
        if count == part_rows:
            yield Part(number, first, count, lines, offset, scanner.offset - offset, scanner.part.hexdigest())
            number, first, count, lines, offset = number + 1, first + count, 0, scanner.lines, scanner.offset
            scanner.begin()
    if scanner.is_blank:
        raise empty_file(name)
    if no_json:
        several = scanner.lines > 1
        raise not_jsonl(name, reason, scanner.first.decode("utf-8", "replace").strip(), several=several)
    if count:
        yield Part(number, first, count, lines, offset, scanner.offset - offset, scanner.part.hexdigest())


def _identifier(value: Any, wanted: Any, columns: Columns | None) -> dict[str, Any]:
    """The identifier of a JSON value or of cells; empty if it has none."""
    if columns is not None and isinstance(wanted, str):
        if columns.names.count(wanted) != 1:
            return {}
        wanted = columns.names.index(wanted)
    try:
        return {} if isinstance(value, str) else {"id": value[wanted]}
    except (LookupError, TypeError):
        return {}


def _is_json(identifier: Mapping[str, Any]) -> bool:
    try:
        json.dumps(identifier, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def _kind(path: Path) -> Kind:
    kind = kind_of(path)
    if kind is None:
        raise UsageError(
            f"{path} is neither .jsonl, .tsv, .csv nor .txt.", remedy="give the file the extension of its format"
        )
    return kind


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}.", remedy="check the path and its permissions")
