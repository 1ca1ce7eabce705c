"""Data files: the rows of JSONL, TSV, CSV and text files, read alike by every command. Needs neither torch nor transformers.

A field is the name of a key or column, or the number of a column from 0. In TSV and CSV a name says that the first row is a header;
with numbers alone there is none, and every row is data. A cell of TSV is what stands between two tabs: quotes are text there.
"""

import csv
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm2slm_export.errors import DataError, listed

Field = str | int
Kind = Literal["JSONL", "TSV", "CSV", "text"]
KINDS: dict[str, Kind] = {".jsonl": "JSONL", ".json": "JSONL", ".tsv": "TSV", ".csv": "CSV", ".txt": "text"}
TABLES: tuple[Kind, ...] = ("TSV", "CSV")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UNDECODED = re.compile("[\udc80-\udcff]")  # as surrogateescape leaves a byte that is not UTF-8
_BINARY = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "a Parquet file",
    b"SQLite format 3": "a database",
}
_UTF_16_OR_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_NAMES = "name it by what it holds: .jsonl, .tsv, .csv, or .txt for one prompt a line"


@dataclass
class Rows:
    """The rows of a file, and what is wrong with the others.

    Args:
        texts: the line and, in the fields' order, the texts of every row that can be used.
        problems: the reason by the line of every row that cannot.
    """

    texts: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many rows there are."""
        return len(self.texts) + len(self.problems)

    @property
    def reasons(self) -> list[str]:
        """Every problem with its line, in the file's order."""
        return [f"line {line}: {self.problems[line]}" for line in sorted(self.problems)]


def kind_of(path: Path) -> Kind | None:
    """What a file holds, by its name; None where the name does not say."""
    return KINDS.get(path.suffix.lower())


def require_file(path: Path, option: str) -> None:
    """Refuse what is not a file: nothing is looked for on a hub here.

    Raises:
        DataError: it is none.
    """
    try:
        if path.is_file():
            return
        there = path.exists()
    except OSError:  # a name that is too long, or in a directory that may not be read
        there = False
    if there:
        raise DataError(f"{path} is not a regular file.", remedy=f"give a file with {option}")
    raise DataError(
        f"There is no file {path}.", f"looked for {path.absolute()}", remedy=f"check the path given with {option}"
    )


def spelled_field(given: str, path: Path) -> Field:
    """A field as it was typed: digits are the number of a column where the file has columns."""
    return int(given) if given.isdecimal() and len(given) < 10 and kind_of(path) in TABLES else given


def default_fields(path: Path, names: Sequence[str]) -> dict[str, Field]:
    """The fields where nothing was said: columns of these names where the first row of a TSV file has them, else the first columns.

    Of any other file the keys or columns of these names.
    """
    if kind_of(path) != "TSV" or set(names) <= set(_first_cells(path)):
        return {name: name for name in names}
    return {name: number for number, name in enumerate(names)}


def _first_cells(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            line = file.readline(1_000_000).removeprefix(_BYTE_ORDER_MARK)
    except OSError:  # said when it is read
        return []
    return line.rstrip(b"\r\n").decode("utf-8", "replace").split("\t")


def read_rows(path: Path, fields: Mapping[str, Field], *, origin: str = "") -> Rows:
    """The rows of a file.

    Args:
        fields: by what they are to the caller (`prompt`, `response`, `task`), the keys or columns.
        origin: where the fields come from, for messages; empty where the user gave them.

    Raises:
        DataError: it cannot be read as what its name says, is empty, or lacks a column.
    """
    kind = kind_of(path)
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
    """The rows of a file's content; `name` stands for it in messages. The rest as `read_rows`.

    A byte order mark, the end of the last line, and `\\r` at the end of a line are no content.

    Raises:
        DataError: as `read_rows`.
    """
    if negative := [number for number in fields.values() if isinstance(number, int) and number < 0]:
        raise DataError(f"There is no column {negative[0]}.", remedy="give its number, from 0")
    _refuse_other_encodings(content, name)
    if not content.removeprefix(_BYTE_ORDER_MARK).strip():
        raise DataError(f"{name} is empty: it holds no rows.", remedy="give a file with a row a line")
    lines, undecoded = _decoded(content)
    if kind == "text":
        if len(fields) > 1:
            raise DataError(f"{name} is text: a line of it is a prompt, and has no {list(fields)[1]}.", remedy=_NAMES)
        return _checked(((number, line, None) for number, line in enumerate(lines, start=1)), fields, undecoded)
    if kind == "JSONL":
        found = _checked(_json_rows(lines, fields, undecoded), fields, undecoded)
        _refuse_what_is_not_jsonl(found, lines, name)
        return found
    return _table(lines, kind, name, fields, undecoded, origin)


def _refuse_other_encodings(content: bytes, name: str) -> None:
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
    """The lines, and what is wrong with those that are not UTF-8."""
    content = content.removeprefix(_BYTE_ORDER_MARK).removesuffix(b"\n")
    try:
        text, undecoded = content.decode("utf-8"), False
    except UnicodeDecodeError:
        text, undecoded = content.decode("utf-8", "surrogateescape"), True
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    problems = {}
    for number, line in enumerate(lines if undecoded else (), start=1):
        if found := _UNDECODED.search(line):
            column = len(line[: found.start()].encode("utf-8", "surrogateescape")) + 1
            problems[number] = f"not UTF-8 (byte 0x{ord(found[0]) - 0xDC00:02x} at column {column})"
    return lines, problems


_Row = tuple[int, Any, str | None]  # line, texts (or one text), and why there are none


def _checked(rows: Iterator[_Row], fields: Mapping[str, Field], undecoded: Mapping[int, str]) -> Rows:
    """The rows whose texts are texts, and are not empty."""
    found = Rows()
    for line, given, problem in rows:
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
            return f"{fields[key]!r} is {_shown(value)}, and not text"
        if not value or value.isspace():
            return f"an empty {key}"
        if not value.isascii() and (odd := next((c for c in value if "\ud800" <= c <= "\udfff"), None)):
            return f"not valid Unicode (code point U+{ord(odd):04X})"
    return None


# --- JSON Lines --------------------------------------------------------------------------------------------------


def _json_rows(lines: Sequence[str], fields: Mapping[str, Field], undecoded: Mapping[int, str]) -> Iterator[_Row]:
    wanted = tuple(fields.values())
    for number, line in enumerate(lines, start=1):
        if number in undecoded:
            yield number, (), None
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, (), f"not JSON ({error.msg} at column {error.colno}): {_shortened(line)}"
        except (RecursionError, ValueError):
            yield number, (), f"nested too deep, or a number of too many digits: {_shortened(line)}"
        else:
            try:
                if isinstance(row, str):  # which has characters by number
                    raise TypeError
                yield number, tuple(row[field] for field in wanted), None
            except (LookupError, TypeError):
                yield number, (), _lacking(row, wanted, line)


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
    """One message in place of one for every line, where no line is JSON."""
    if found.texts or not all(reason.startswith("not JSON") for reason in found.problems.values()):
        return
    first = next(line for line in lines if line.strip()).strip()
    if first.startswith(("[", "{")):
        what = "a JSON value over several lines" if len(lines) > 1 else "JSON that breaks off"
        raise DataError(
            f"{name} is not JSON Lines: no line of it is a JSON value.",
            f"{found.reasons[0]}",
            f"it looks like {what}",
            remedy="write one object a line, for example with jq -c '.[]'",
        )
    separator = next((kind for kind, mark in (("TSV", "\t"), ("CSV", ",")) if mark in first), "text")
    raise DataError(
        f"{name} is not JSON Lines: no line of it is JSON.",
        f"its first line: {_shortened(first)}",
        f"it looks like {separator}",
        remedy=_NAMES,
    )


# --- TSV and CSV -------------------------------------------------------------------------------------------------

_Record = tuple[int, int, list[str] | str]  # first line, last line, and the cells or why they cannot be told


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
    found = _checked(_table_rows(records, kind, numbers, width, undecoded), fields, {})
    if not found.total:
        raise DataError(
            f"{name} has a header and no rows.",
            f"its header: {_shortened(lines[0])}",
            remedy="add rows below it; where it has no header, number its columns from 0",
        )
    if not header and not found.texts and lines[0].lstrip().startswith("{"):
        raise DataError(
            f"{name} is not {kind}: it looks like JSON Lines.",
            f"its first line: {_shortened(lines[0])}",
            remedy=_NAMES,
        )
    return found


def _table_rows(
    records: Iterator[_Record], kind: Kind, numbers: Sequence[int], width: int | None, undecoded: Mapping[int, str]
) -> Iterator[_Row]:
    """Every row, its texts by the columns' numbers. All rows of CSV, and all below a header, are of one width."""
    beside = "its header" if width is not None else "the first row"
    for first, last, cells in records:
        bad = (
            next((undecoded[line] for line in range(first, last + 1) if line in undecoded), None) if undecoded else None
        )
        if bad or isinstance(cells, str):
            yield first, (), bad or str(cells)
            continue
        if width is None and kind == "CSV":
            width = len(cells)
        if cells in ([], [""]):
            yield first, (), "an empty line"
        elif width is not None and len(cells) != width:
            quoting = ": a cell that holds commas stands in quotes" if kind == "CSV" and len(cells) > width else ""
            yield first, (), f"{_count(cells)}, and {beside} has {width}{quoting}"
        elif max(numbers) >= len(cells):
            yield first, (), f"{_count(cells)}, and so no column {max(numbers)}"
        else:
            yield first, tuple(cells[number] for number in numbers), None


def _tsv_records(lines: Sequence[str]) -> Iterator[_Record]:
    for number, line in enumerate(lines, start=1):
        yield number, number, line.split("\t")


def _csv_records(lines: Sequence[str]) -> Iterator[_Record]:
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, first, f"{_csv_problem(str(error))}; what comes after was not read"
            return
        yield first, reader.line_num, cells


def _csv_problem(said: str) -> str:
    if "limit" in said:
        return f"a cell of more than {csv.field_size_limit():,} characters, or a quote that is never closed"
    if "end of data" in said:
        return "a quote that is never closed"
    if "expected after" in said:
        return "text behind a closing quote (a quote inside a cell is written twice)"
    return "a line break in a cell that does not stand in quotes" if "new-line" in said else said


def _header(record: _Record, name: str, undecoded: Mapping[int, str]) -> list[str]:
    first, last, cells = record
    bad = next((undecoded[line] for line in range(first, last + 1) if line in undecoded), None)
    if bad or isinstance(cells, str):
        raise DataError(
            f"The header of {name} cannot be read.",
            f"line {first}: {bad or cells}",
            remedy="fix it; where the file has no header, number its columns from 0",
        )
    return cells


def _columns(cells: Sequence[str], kind: Kind, name: str, fields: Mapping[str, Field], origin: str) -> tuple[int, ...]:
    """The columns' numbers, by the header.

    Raises:
        DataError: it lacks one that is named, or has it twice, or has fewer than are numbered.
    """
    problems = [reason for key, wanted in fields.items() for reason in _not_one(cells, key, wanted)]
    if problems:
        shown = ", ".join(_shortened(cell) for cell in cells[:20])
        other = next((mark for mark in (";", "\t", ",", "|") if len(cells) == 1 and mark in cells[0]), None)
        raise DataError(
            f"{name} does not have the columns that are asked for.",
            *problems,
            *([f"the fields are those of {origin}"] if origin else []),
            f"its first row, the header, has {_count(cells)}: {shown}",
            *([f"its cells seem to be separated by {other!r}, and {kind}'s are not"] if other else []),
            remedy=f"name them with {' and '.join(f'--{key}-field' for key in fields)} (training.data in a recipe), or number "
            "them from 0 where there is no header",
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
        # Of long ones the comparison would take minutes.
        names = {cell.lower(): cell for cell in cells[:1000] if len(cell) <= 100}
        close = difflib.get_close_matches(wanted[:100].lower(), names, n=1)
        near = names[close[0]] if close else None
        yield f"{key}: no column {wanted!r}" + (f"; did you mean {_shortened(near)}?" if near is not None else "")


def _count(cells: Sequence[str]) -> str:
    return f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"


# --- messages ----------------------------------------------------------------------------------------------------


def refuse_problems(found: Rows, name: str) -> None:
    """Refuse a file with rows that cannot be used.

    Raises:
        DataError: there are some: how many, and the first ones.
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
