"""The input of a job: parts hold the rows that `read_rows` finds, wherever they are cut, and memory does not grow with the file."""

import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llm2slm_export.batch_jobs import input_file
from llm2slm_export.batch_jobs.input_file import InputRow, scan
from llm2slm_export.errors import DataError, UsageError
from llm2slm_export.files.data_files import Field, read_rows
from tests.support.hostile import CASES, DATA_FILES, PUT_INTO_DATA, mutated_bytes


def rows_of(
    path: Path, field: Field | None = "prompt", id_field: Field | None = None, part_rows: int = 2
) -> list[InputRow]:
    found = scan(path, field, id_field, part_rows=part_rows)
    rows = [found.read(part) for part in found.parts]
    assert [len(part) for part in rows] == [part.rows for part in found.parts]
    assert [part.rows for part in found.parts[:-1]] == [part_rows] * (len(found.parts) - 1)
    flat = [row for part in rows for row in part]
    assert [row.index for row in flat] == list(range(found.rows))
    assert found.bytes == path.stat().st_size
    return flat


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_whole(path: Path) -> tuple[list[tuple[int, str | None, str | None]], bool]:
    """The rows as `read_rows` finds them, and whether it read the file to its end."""
    rows = read_rows(path, {"prompt": "prompt"})
    found = [(line, text, None) for line, (text,) in rows.texts]
    found += [(line, None, reason) for line, reason in rows.problems.items()]
    return sorted(found), not any("the rest of the file was not read" in reason for reason in rows.reasons)


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\n\n"])
def test_parts_hold_the_rows_of_the_file(tmp_path: Path, name: str, end: bytes, mark: bytes, last: bytes) -> None:
    content = mark + DATA_FILES[name].rstrip(b"\n").replace(b"\n", end) + last
    path = written(tmp_path, name, content)
    expected, _ = read_whole(path)
    for part_rows in (1, 3, 1000):
        assert [(row.line, row.prompt, row.problem) for row in rows_of(path, part_rows=part_rows)] == expected


@pytest.mark.parametrize("name", DATA_FILES)
def test_any_file_is_read_as_other_commands_read_it_or_refused(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    for case in range(CASES):
        content = mutated_bytes(DATA_FILES[name], rng)
        if case % 2:
            at = rng.randrange(len(content) + 1)
            content = content[:at] + rng.choice(PUT_INTO_DATA) + content[at:]
        path = written(tmp_path, name, content)
        try:
            expected, whole = read_whole(path)
        except DataError:
            expected, whole = None, False
        try:
            found = rows_of(path, part_rows=rng.randrange(1, 6))
        except DataError:
            assert not whole
        else:
            assert [(row.line, row.prompt, row.problem) for row in found] == expected


@pytest.mark.parametrize(
    ("name", "content", "id_field", "ids"),
    [
        ("x.jsonl", '{"prompt": "a", "id": 7}\n{"prompt": "b"}\n{"prompt": "c", "id": {"x": [null]}}\n', None, [7, ..., {"x": [None]}]),
        ("x.jsonl", '{"prompt": "a", "k": "é"}\n{"prompt": "", "k": 2}\n', "k", ["é", 2]),
        ("x.jsonl", '"a"\n{"id": "x"}\nnull\n', None, [..., "x", ...]),
        ("x.tsv", "id\tprompt\n1\ta\n2\tb\n", None, ["1", "2"]),
        ("x.tsv", "name\tprompt\n1\ta\n2\tb\n", None, [..., ...]),
        ("x.tsv", "name\tprompt\n1\ta\n\tb\n", "name", ["1", ""]),
        ("x.csv", "id,id,prompt\n1,2,a\n", None, [...]),
        ("x.txt", "a\nb\n", None, [..., ...]),
    ],
)  # fmt: skip
def test_identifiers_are_carried_along(tmp_path: Path, name: str, content: str, id_field: Any, ids: list[Any]) -> None:
    found = rows_of(written(tmp_path, name, content), id_field=id_field)
    assert [row.identifier.get("id", ...) for row in found] == ids


def test_columns_by_number_have_no_header(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", "1,a\n2,b\n3\n4,d\n")
    found = rows_of(path, 1, 0, part_rows=1)
    assert [(row.prompt, row.identifier) for row in found if row.prompt] == [
        ("a", {"id": "1"}),
        ("b", {"id": "2"}),
        ("d", {"id": "4"}),
    ]
    assert found[2].problem == "1 cell, and the first row has 2"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": 5}', "'prompt' is the number 5, not text"),
        ('{"prompt": null, "id": 1}', "'prompt' is null, not text"),
        ('{"text": "a"}', "no 'prompt' (its keys: 'text')"),
        ('{"prompt": "  "}', "an empty prompt"),
        ('{"prompt": "\\ud800"}', "not valid Unicode (code point U+D800)"),
        ('{"prompt": "a"', "not JSON"),
        ("", "not JSON"),
        ('{"prompt": "a", "id": NaN}', "an id that is not JSON"),
    ],
)
def test_a_bad_row_has_its_reason_and_the_others_are_read(tmp_path: Path, line: str, reason: str) -> None:
    found = rows_of(written(tmp_path, "x.jsonl", f'{{"prompt": "a"}}\n{line}\n{{"prompt": "c"}}\n'))
    assert [row.prompt for row in found] == ["a", None, "c"]
    assert (found[1].problem or "").startswith(reason)


def test_an_id_that_was_asked_for_and_is_missing_is_a_bad_row(tmp_path: Path) -> None:
    path = written(tmp_path, "x.jsonl", '{"prompt": "a", "k": 1}\n{"prompt": "b"}\n')
    assert [row.problem for row in rows_of(path, id_field="k")] == [None, "no 'k'"]
    with pytest.raises(DataError, match="id: no column 'k'"):
        scan(written(tmp_path, "x.tsv", "id\tprompt\n1\ta\n"), "prompt", "k", part_rows=5)
    with pytest.raises(DataError, match="has no id"):
        scan(written(tmp_path, "x.txt", "a\n"), None, "k", part_rows=5)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.jsonl", "", ["x.jsonl is empty"]),
        ("x.tsv", "\n\n", ["x.tsv is empty"]),
        ("x.txt", "\ufeff", ["x.txt is empty"]),
        ("x.csv", "prompt\n", ["has a header and no rows"]),
        ("x.jsonl", '{\n"prompt": "a"\n}\n', ["no line of it is a JSON value", "jq -c"]),
        ("x.jsonl", "a\tb\nc\td\n", ["no line of it is JSON", "looks like TSV"]),
        ("x.csv", 'prompt\na\nb\n"c\nd\n', ["cannot be read to its end", "line 4: an unclosed quote"]),
        ("x.csv", "text\na\n", ["no column 'prompt'"]),
        ("x.txt", "a\nb\n" + "c" * 101, ["Line 3 of ", "more than 100 bytes"]),
        ("x.txt", b"\x1f\x8b\x08", ["begins as a gzip file does"]),
        ("x.jsonl", '{"prompt": "a"}'.encode("utf-16"), ["is not UTF-8"]),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_at_once(
    tmp_path: Path, name: str, content: str | bytes, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_file, "MOST_LINE", 100)
    with pytest.raises(DataError) as caught:
        rows_of(written(tmp_path, name, content))
    for part in parts:
        assert part in str(caught.value)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        scan(tmp_path / "x.jsonl", "prompt", None, part_rows=2)
    with pytest.raises(DataError, match="not a regular file"):
        scan(tmp_path, "prompt", None, part_rows=2)
    with pytest.raises(UsageError, match=r"neither \.jsonl"):
        scan(written(tmp_path, "x.parquet", "a"), "prompt", None, part_rows=2)


@pytest.mark.parametrize("change", [b"other", b""])
def test_a_file_that_changes_during_the_job_is_refused(tmp_path: Path, change: bytes) -> None:
    path = written(tmp_path, "x.txt", "abcde\nb\nc\n")
    found = scan(path, None, None, part_rows=2)
    path.write_bytes(change + path.read_bytes()[5:])
    with pytest.raises(DataError, match="rows 0 to 1 have changed"):
        found.read(found.parts[0])
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        found.read(found.parts[1])


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    start, row = {"x.jsonl": (b"", b'{"prompt": "%s"}\n'), "x.csv": (b"prompt\n", b"%s\n"), "x.txt": (b"", b"%s\n")}[
        name
    ]
    path = written(tmp_path, name, start + (row % (b"a" * 1000)) * 8000)
    tracemalloc.start()
    try:
        found = scan(path, "prompt", None, part_rows=100)
        for part in found.parts:
            found.read(part)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 8_000_000
    assert peak < 2_000_000
