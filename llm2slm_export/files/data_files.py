"""The rows of JSONL, TSV, CSV and text files, for every command.

A field is the name of a key or column, or the index of a column from 0. If any field of a TSV or CSV file is a name, the
first row is a header; with indices only, every row is data. TSV has no quoting: a quote is part of the cell.
"""

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm2slm_export.errors import DataError, listed

Field = str | int
Kind = Literal["JSONL", "TSV", "CSV", "text"]
KINDS: dict[str, Kind] = {".jsonl": "JSONL", ".json": "JSONL", ".tsv": "TSV", ".csv": "CSV", ".txt": "text"}
TABLES: tuple[Kind, ...] = ("TSV", "CSV")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UNDECODED = re.compile("[\udc80-\udcff]")  # surrogateescape's characters for bytes that are not UTF-8
_BINARY = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "a Parquet file",
    b"SQLite format 3": "a database",
}
_UTF_16_OR_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
NOT_JSON = "not JSON"  # how the problem of such a line begins
_NOT_READ = "; the rest of the file was not read"
_NAMES = "give it the extension of its format: .jsonl, .tsv, .csv, or .txt for one prompt per line"


@dataclass
class Rows:
    """The usable and unusable rows of a file.

    Args:
        texts: of each usable row, its line number and its texts in the order of the fields.
        problems: of each unusable row, the reason by its line number.
    """

    texts: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of rows, usable or not."""
        return len(self.texts) + len(self.problems)

    @property
    def reasons(self) -> list[str]:
        """Every problem with its line number, in the order of the file."""
        return [f"line {line}: {self.problems[line]}" for line in sorted(self.problems)]


@dataclass(frozen=True)
class Row:
    """A row of a file that is read row by row.

    Args:
        line: its line number, or that of its first line.
        texts: its texts in the order of the fields; None: it is unusable.
        problem: the reason why it is unusable; None: it is usable.
        value: the JSON value, or the cells; None: it has none.
    """

    line: int
    texts: tuple[str, ...] | None
    problem: str | None
    value: Any

    @property
    def is_last_readable(self) -> bool:
        """Whether the rows behind this one cannot be read."""
        return self.problem is not None and self.problem.endswith(_NOT_READ)


@dataclass(frozen=True)
class Columns:
    """The columns of a TSV or CSV file.

    Args:
        numbers: the index of each field's column.
        width: number of cells of every row; None: rows may differ.
        names: the header's cells; empty if there is no header.
    """

    numbers: tuple[int, ...]
    width: int | None
    names: tuple[str, ...] = ()


def kind_of(path: Path) -> Kind | None:
    """The format of a file by its extension; None if the extension is unknown."""
    return KINDS.get(path.suffix.lower())


def require_file(path: Path, option: str) -> None:
    """Check that a path is a local file. Hub data sets are not accepted here.

    Raises:
        DataError: there is no such file, or it is not a regular file.
    """
    try:
        if path.is_file():
            return
        there = path.exists()
    except OSError:  # the name is too long, or its directory is not readable
        there = False
    if there:
        raise DataError(f"{path} is not a regular file.", remedy=f"give a file with {option}")
    raise DataError(
        f"There is no file {path}.", f"looked for {path.absolute()}", remedy=f"check the path given with {option}"
    )


def spelled_field(given: str, path: Path) -> Field:
    """Parse a field given on the command line. In TSV and CSV, digits are the index of a column."""
    return int(given) if given.isdecimal() and len(given) < 10 and kind_of(path) in TABLES else given


def default_fields(path: Path, names: Sequence[str]) -> dict[str, Field]:
    """The default fields: the keys or columns with these names.

    For a TSV file whose first row lacks any of the names they are the first columns, and every row is data.
    """
    if kind_of(path) != "TSV" or set(names) <= set(_first_cells(path)):
        return {name: name for name in names}
    return {name: number for number, name in enumerate(names)}


def _first_cells(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            line = file.readline(1_000_000).removeprefix(BYTE_ORDER_MARK)
    except OSError:  # reported by `read_rows`
        return []
    return line.rstrip(b"\r\n").decode("utf-8", "replace").split("\t")


def read_rows(path: Path, fields: Mapping[str, Field], *, origin: str = "", kind: Kind | None = None) -> Rows:
    """Read the rows of a file.

    Args:
        fields: the key or column of each role (`prompt`, `response`, `task`).
        origin: the source of the fields, for messages; empty if the user gave them.
        kind: the format; None: that of the file's extension.

    Raises:
        DataError: the file is not of the format of its extension, is empty, or lacks a column.
    """
    kind = kind or kind_of(path)
    if kind is None:
        raise DataError(f"{path} is neither .jsonl, .tsv, .csv nor .txt.", remedy=_NAMES)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}.", remedy="check the path and its permissions"
        ) from error
    return parse_rows(content, kind, str(path), fields, origin=origin)


def parse_rows(content: bytes, kind: Kind, name: str, fields: Mapping[str, Field], *, origin: str = "") -> Rows:
    """Parse the rows of a file's content. Arguments and errors are those of `read_rows`; `name` is for messages.

    A byte order mark, `\\r` at the end of a line and the last line break are ignored.

    Raises:
        DataError: as `read_rows`.
    """
    check_fields(fields, kind, name)
    refuse_other_encodings(content, name)
    if not content.removeprefix(BYTE_ORDER_MARK).strip():
        raise empty_file(name)
    lines, undecoded = _decoded(content)
    if kind == "text":
        return _checked(_text_rows(lines), fields, undecoded)
    if kind == "JSONL":
        found = _checked(_json_rows(lines, fields, undecoded), fields, undecoded)
        _refuse_what_is_not_jsonl(found, lines, name)
        return found
    return _table(lines, kind, name, fields, undecoded, origin)


def check_fields(fields: Mapping[str, Field], kind: Kind, name: str) -> None:
    """Refuse fields that a file of this kind cannot have.

    Raises:
        DataError: a negative column, or several fields of a text file.
    """
    if negative := [number for number in fields.values() if isinstance(number, int) and number < 0]:
        raise DataError(f"There is no column {negative[0]}.", remedy="give the column's number, from 0")
    if kind == "text" and len(fields) > 1:
        raise DataError(f"{name} is text: a line of it is a prompt, and has no {list(fields)[1]}.", remedy=_NAMES)


def empty_file(name: str) -> DataError:
    """The error of a file without rows."""
    return DataError(f"{name} is empty: it holds no rows.", remedy="give a file with one row per line")


def refuse_other_encodings(content: bytes, name: str) -> None:
    """Refuse a file that is no UTF-8 text by the first bytes of its content.

    Raises:
        DataError: with what it seems to be.
    """
    what = next((what for mark, what in _BINARY.items() if content.startswith(mark)), None)
    if what is not None:
        raise DataError(f"{name} is not text: it begins as {what} does.", remedy="unpack or export it as JSONL or CSV")
    start = content[:1000]
    if start.startswith(_UTF_16_OR_32) or start.count(0) * 4 > len(start):
        raise DataError(
            f"{name} is not UTF-8: it begins as UTF-16 or UTF-32 does.",
            f"first bytes: {start[:8].hex(' ')}",
            remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {name} > utf-8{Path(name).suffix}",
        )


def _decoded(content: bytes) -> tuple[list[str], dict[int, str]]:
    """The lines of a file's content, and the problem of each line that is not UTF-8."""
    content = content.removeprefix(BYTE_ORDER_MARK).removesuffix(b"\n")
    try:
        text, undecoded = content.decode("utf-8"), False
    except UnicodeDecodeError:
        text, undecoded = content.decode("utf-8", "surrogateescape"), True
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    problems = {}
    for number, line in enumerate(lines if undecoded else (), start=1):
        if problem := _not_utf8(line):
            problems[number] = problem
    return lines, problems


def _not_utf8(line: str) -> str | None:
    """The problem of a line that was decoded with surrogateescape; None: it is UTF-8."""
    found = _UNDECODED.search(line)
    if found is None:
        return None
    column = len(line[: found.start()].encode("utf-8", "surrogateescape")) + 1
    return f"not UTF-8 (byte 0x{ord(found[0]) - 0xDC00:02x} at column {column})"


def stream_rows(
    lines: Iterable[bytes], kind: Kind, fields: Mapping[str, Field], columns: Columns | None = None
) -> Iterator[Row]:
    """Parse lines as they come. No line behind a row's last one has been taken when the row is yielded.

    Line numbers count from the first of the lines. A byte order mark is not expected.

    Args:
        lines: each with its line break.
        columns: of a TSV or CSV file; its header is not among the lines.
    """
    undecoded: dict[int, str] = {}
    texts = _decoded_lines(lines, undecoded)
    if kind == "text":
        rows = _text_rows(texts)
    elif kind == "JSONL":
        rows = _json_rows(texts, fields, undecoded)
    else:
        assert columns is not None, "a table has columns"
        records = _csv_records(texts) if kind == "CSV" else _tsv_records(texts)
        rows = _table_rows(records, kind, columns.numbers, columns.width, undecoded, header=bool(columns.names))
    for line, given, problem, value in rows:
        row = (given,) if isinstance(given, str) else tuple(given)
        reason = problem or undecoded.get(line) or _unusable(row, fields)
        yield Row(line, None if reason else row, reason, value)
        undecoded.clear()


def stream_columns(
    lines: Iterable[bytes], kind: Kind, name: str, fields: Mapping[str, Field], *, origin: str = ""
) -> Columns:
    """The columns of a TSV or CSV file. Of its lines the header's are taken, or the first row's if there is no header.

    Raises:
        DataError: as `read_rows`.
    """
    undecoded: dict[int, str] = {}
    texts = _decoded_lines(lines, undecoded)
    record = next(_csv_records(texts) if kind == "CSV" else _tsv_records(texts))
    if any(isinstance(field, str) for field in fields.values()):
        cells = _header(record, name, undecoded)
        return Columns(_columns(cells, kind, name, fields, origin), len(cells), tuple(cells))
    first = record[2]
    width = len(first) if kind == "CSV" and not isinstance(first, str) else None
    return Columns(tuple(int(number) for number in fields.values()), width)


def _decoded_lines(lines: Iterable[bytes], undecoded: dict[int, str]) -> Iterator[str]:
    """Lines as text, without their line breaks. The problem of a line that is not UTF-8 is in `undecoded` before it is yielded."""
    for number, raw in enumerate(lines, start=1):
        content = raw.removesuffix(b"\n").removesuffix(b"\r")
        try:
            line = content.decode("utf-8")
        except UnicodeDecodeError:
            line = content.decode("utf-8", "surrogateescape")
            undecoded[number] = _not_utf8(line) or "not UTF-8"
        yield line


# Line number, texts (or one text), the reason why it has none, and the JSON value or the cells.
_Row = tuple[int, Any, str | None, Any]


def _text_rows(lines: Iterable[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        yield number, line, None, None


def _checked(rows: Iterator[_Row], fields: Mapping[str, Field], undecoded: Mapping[int, str]) -> Rows:
    """Rows whose texts are non-empty strings, and the problems of the others."""
    found = Rows()
    for line, given, problem, _ in rows:
        texts = (given,) if isinstance(given, str) else given
        reason = undecoded.get(line) or problem or _unusable(texts, fields)
        if reason is None:
            found.texts.append((line, tuple(texts)))
        else:
            found.problems[line] = reason
    return found


def _unusable(texts: Sequence[Any], fields: Mapping[str, Field]) -> str | None:
    for key, value in zip(fields, texts, strict=True):
        if not isinstance(value, str):
            return f"{fields[key]!r} is {_shown(value)}, not text"
        if not value or value.isspace():
            return f"an empty {key}"
        if not value.isascii() and (odd := next((c for c in value if "\ud800" <= c <= "\udfff"), None)):
            return f"not valid Unicode (code point U+{ord(odd):04X})"
    return None


# --- JSON Lines --------------------------------------------------------------------------------------------------


def _json_rows(lines: Iterable[str], fields: Mapping[str, Field], undecoded: Mapping[int, str]) -> Iterator[_Row]:
    wanted = tuple(fields.values())
    for number, line in enumerate(lines, start=1):
        if number in undecoded:
            yield number, (), None, None
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, (), f"{NOT_JSON} ({error.msg} at column {error.colno}): {_shortened(line)}", None
        except (RecursionError, ValueError):
            yield number, (), f"nested too deep, or a number of too many digits: {_shortened(line)}", None
        else:
            try:
                if isinstance(row, str):  # a number would index its characters
                    raise TypeError
                texts = tuple(row[field] for field in wanted)
            except (LookupError, TypeError):
                yield number, (), _lacking(row, wanted, line), row
            else:
                yield number, texts, None, row


def _lacking(row: Any, wanted: Sequence[Field], line: str) -> str:
    if isinstance(row, dict):
        lacking = next(field for field in wanted if field not in row)
        keys = ", ".join(_shortened(key) for key in list(row)[:8]) or "none"
        what = f"no {lacking!r}" if isinstance(lacking, str) else f"an object, which has no column {lacking}"
        return f"{what} (its keys: {keys})"
    if isinstance(row, list) and all(isinstance(field, int) for field in wanted):
        return f"a list of {len(row)}, without number {max(wanted)}"
    return f"not an object: {_shortened(line)}"


def _refuse_what_is_not_jsonl(found: Rows, lines: Sequence[str], name: str) -> None:
    """Raise one error for the file, instead of a problem per line, if no line is JSON."""
    if found.texts or not all(reason.startswith(NOT_JSON) for reason in found.problems.values()):
        return
    first = next(line for line in lines if line.strip()).strip()
    raise not_jsonl(name, found.reasons[0], first, several=len(lines) > 1)


def not_jsonl(name: str, reason: str, first: str, *, several: bool) -> DataError:
    """The error of a file of which no line is JSON.

    Args:
        reason: the first line's problem, with its number.
        first: the first line that is not blank.
        several: whether it has several lines.
    """
    if first.startswith(("[", "{")):
        what = "a JSON value over several lines" if several else "JSON that breaks off"
        return DataError(
            f"{name} is not JSON Lines: no line of it is a JSON value.",
            reason,
            f"it looks like {what}",
            remedy="write one object per line, for example with jq -c '.[]'",
        )
    separator = next((kind for kind, mark in (("TSV", "\t"), ("CSV", ",")) if mark in first), "text")
    return DataError(
        f"{name} is not JSON Lines: no line of it is JSON.",
        f"its first line: {_shortened(first)}",
        f"it looks like {separator}",
        remedy=_NAMES,
    )


# --- TSV and CSV -------------------------------------------------------------------------------------------------

_Record = tuple[int, int, list[str] | str]  # first line, last line, and the cells or the reason why there are none


def _table(
    lines: Sequence[str],
    kind: Kind,
    name: str,
    fields: Mapping[str, Field],
    undecoded: Mapping[int, str],
    origin: str,
) -> Rows:
    records = _csv_records(lines) if kind == "CSV" else _tsv_records(lines)
    width, header = None, any(isinstance(field, str) for field in fields.values())
    if header:
        cells = _header(next(records), name, undecoded)
        numbers = _columns(cells, kind, name, fields, origin)
        width = len(cells)
    else:
        numbers = tuple(int(number) for number in fields.values())
    found = _checked(_table_rows(records, kind, numbers, width, undecoded, header=header), fields, {})
    if not found.total:
        raise DataError(
            f"{name} has a header and no rows.",
            f"its header: {_shortened(lines[0])}",
            remedy="add rows below it; if the file has no header, number its columns from 0",
        )
    if not header and not found.texts and lines[0].lstrip().startswith("{"):
        raise DataError(
            f"{name} is not {kind}: it looks like JSON Lines.",
            f"its first line: {_shortened(lines[0])}",
            remedy=_NAMES,
        )
    return found


def _table_rows(
    records: Iterator[_Record],
    kind: Kind,
    numbers: Sequence[int],
    width: int | None,
    undecoded: Mapping[int, str],
    *,
    header: bool,
) -> Iterator[_Row]:
    """The texts of every row at the columns' indices. All rows of a CSV file, or below a header, have the same width."""
    beside = "its header" if header else "the first row"
    for first, last, cells in records:
        bad = (
            next((undecoded[line] for line in range(first, last + 1) if line in undecoded), None) if undecoded else None
        )
        if bad or isinstance(cells, str):
            # What ends the file is the reason to give, whatever else the line holds.
            yield first, (), cells if isinstance(cells, str) else bad, None
            continue
        if width is None and kind == "CSV":
            width = len(cells)
        if cells in ([], [""]):
            yield first, (), "an empty line", None
        elif width is not None and len(cells) != width:
            quoting = ": a cell with commas must be quoted" if kind == "CSV" and len(cells) > width else ""
            yield first, (), f"{_count(cells)}, and {beside} has {width}{quoting}", cells
        elif max(numbers) >= len(cells):
            yield first, (), f"{_count(cells)}, and so no column {max(numbers)}", cells
        else:
            yield first, tuple(cells[number] for number in numbers), None, cells


def _tsv_records(lines: Iterable[str]) -> Iterator[_Record]:
    for number, line in enumerate(lines, start=1):
        yield number, number, line.split("\t")


def _csv_records(lines: Iterable[str]) -> Iterator[_Record]:
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, first, f"{_csv_problem(str(error))}{_NOT_READ}"
            return
        yield first, reader.line_num, cells


def _csv_problem(message: str) -> str:
    if "limit" in message:
        return f"a cell of more than {csv.field_size_limit():,} characters, or an unclosed quote"
    if "end of data" in message:
        return "an unclosed quote"
    if "expected after" in message:
        return "text after a closing quote (a quote inside a cell is written twice)"
    return "an unquoted line break in a cell" if "new-line" in message else message


def _header(record: _Record, name: str, undecoded: Mapping[int, str]) -> list[str]:
    first, last, cells = record
    bad = next((undecoded[line] for line in range(first, last + 1) if line in undecoded), None)
    if bad or isinstance(cells, str):
        raise DataError(
            f"The header of {name} cannot be read.",
            f"line {first}: {bad or cells}",
            remedy="fix it; if the file has no header, number its columns from 0",
        )
    return cells


def _columns(cells: Sequence[str], kind: Kind, name: str, fields: Mapping[str, Field], origin: str) -> tuple[int, ...]:
    """The indices of the fields' columns, from the header's cells.

    Raises:
        DataError: a column is missing, or several have its name.
    """
    problems = [reason for key, wanted in fields.items() for reason in _not_one(cells, key, wanted)]
    if problems:
        shown = ", ".join(_shortened(cell) for cell in cells[:20])
        other = next((mark for mark in (";", "\t", ",", "|") if len(cells) == 1 and mark in cells[0]), None)
        raise DataError(
            f"{name} does not have the requested columns.",
            *problems,
            *([f"the fields are those of {origin}"] if origin else []),
            f"its first row, the header, has {_count(cells)}: {shown}",
            *([f"its cells seem to be separated by {other!r}, which is not {kind}'s separator"] if other else []),
            remedy=f"name them with {' and '.join(f'--{key}-field' for key in fields)} (training.data in a recipe), or number "
            "them from 0 if there is no header",
        )
    return tuple(cells.index(wanted) if isinstance(wanted, str) else wanted for wanted in fields.values())


def _not_one(cells: Sequence[str], key: str, wanted: Field) -> Iterator[str]:
    if isinstance(wanted, int):
        if wanted >= len(cells):
            yield f"{key}: no column {wanted}"
        return
    count = cells.count(wanted)
    if count > 1:
        yield f"{key}: {count} columns are named {wanted!r}"
    elif count == 0:
        # Comparing long names would take minutes.
        names = {cell.lower(): cell for cell in cells[:1000] if len(cell) <= 100}
        close = difflib.get_close_matches(wanted[:100].lower(), names, n=1)
        near = names[close[0]] if close else None
        yield f"{key}: no column {wanted!r}" + (f"; did you mean {_shortened(near)}?" if near is not None else "")


def _count(cells: Sequence[str]) -> str:
    return f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"


# --- messages ----------------------------------------------------------------------------------------------------


def refuse_problems(found: Rows, name: str) -> None:
    """Refuse a file with unusable rows.

    Raises:
        DataError: some rows are unusable, with their number and the first reasons.
    """
    if found.problems:
        raise DataError(
            f"{name} has {len(found.problems)} unusable row{'s' if len(found.problems) > 1 else ''} of {found.total}.",
            *listed(found.reasons),
            remedy="correct or remove them",
        )


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _shown(value: Any) -> str:
    names = {type(None): "null", bool: "a truth value", dict: "an object", list: "a list"}
    return names.get(type(value)) or f"the number {_shortened(str(value))[1:-1]}"
