"""Data files: every kind is read alike, and what cannot be read is output with its line, what was found and what to type."""

import random
from pathlib import Path

import pytest

from llm2slm_export.authoring.recipe import DataSettings
from llm2slm_export.authoring.training_record import TrainingRecord, fields_of
from llm2slm_export.errors import DataError
from llm2slm_export.files.data_files import (
    Field,
    default_fields,
    read_rows,
    refuse_problems,
    require_file,
    spelled_field,
)
from tests.support.hostile import CASES, DATA_FILES, PUT_INTO_DATA, mutated_bytes

NAMES: dict[str, Field] = {"prompt": "prompt", "response": "response"}
NUMBERS: dict[str, Field] = {"prompt": 0, "response": 1}


def rows(tmp_path: Path, name: str, content: str | bytes, fields: dict[str, Field] = NAMES) -> list[tuple[str, ...]]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    read = read_rows(path, fields)
    refuse_problems(read, path.name)
    return [texts for _, texts in read.texts]


def refused(tmp_path: Path, name: str, content: str | bytes, fields: dict[str, Field] = NAMES) -> str:
    with pytest.raises(DataError) as caught:
        rows(tmp_path, name, content, fields)
    assert caught.value.remedy
    return str(caught.value)


EXPECTED = [("a, b", 'He output "c".'), ("é", "f")]


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [
        ("x.jsonl", '{"prompt": "a, b", "response": "He output \\"c\\"."}\n{"response": "f", "prompt": "é"}\n', NAMES),
        ("x.jsonl", '["a, b", "He output \\"c\\"."]\n["é", "f"]\n', NUMBERS),
        ("x.tsv", 'a, b\tHe output "c".\né\tf\n', NUMBERS),
        ("x.tsv", 'id\tprompt\tresponse\n1\ta, b\tHe output "c".\n2\té\tf\n', NAMES),
        ("x.tsv", 'A\tB\na, b\tHe output "c".\né\tf\n', {"prompt": "A", "response": 1}),
        ("x.csv", 'response,"prompt"\n"He output ""c"".","a, b"\nf,é\n', NAMES),
        ("x.csv", '"a, b","He output ""c""."\né,f\n', NUMBERS),
        ("x.CSV", '0,"a, b","He output ""c""."\n1,é,f', {"prompt": 1, "response": 2}),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_kind_is_read_alike(
    tmp_path: Path, name: str, content: str, fields: dict[str, Field], mark: bytes, end: str
) -> None:
    assert rows(tmp_path, name, mark + content.replace("\n", end).encode(), fields) == EXPECTED


def test_a_cell_of_csv_can_hold_lines_and_rows_keep_their_line(tmp_path: Path) -> None:
    content = 'prompt,response\n"a\nb",c\nd,\ne,f\n'
    assert refused(tmp_path, "x.csv", content) == (
        "x.csv has 1 unusable row of 3.\n  - line 4: an empty response\n  → correct or remove them"
    )
    assert rows(tmp_path, "x.csv", content.replace("d,\n", ""))[0] == ("a\nb", "c")


def test_quotes_of_tsv_are_text(tmp_path: Path) -> None:
    assert rows(tmp_path, "x.tsv", '"Hi." "Ho."\t"\n', NUMBERS) == [('"Hi." "Ho."', '"')]


@pytest.mark.parametrize(
    ("name", "content", "fields", "output"),
    [
        ("x.jsonl", "", NAMES, ["x.jsonl is empty"]),
        ("x.csv", b"\xef\xbb\xbf\r\n \n", NAMES, ["x.csv is empty"]),
        ("x.csv", "prompt,response\n", NAMES, ["a header and no rows", "'prompt,response'"]),
        ("x.csv", "Prompt,answer\na,b\n", NAMES, [
            "does not have the requested columns", "prompt: no column 'prompt'; did you mean 'Prompt'?",
            "response: no column 'response'", "the header, has 2 cells: 'Prompt', 'answer'",
            "--prompt-field and --response-field", "number them from 0",
        ]),
        ("x.tsv", "a\tb\nc\td\n", NAMES, ["prompt: no column 'prompt'", "the header, has 2 cells: 'a', 'b'"]),
        ("x.csv", "prompt;response\na;b\n", NAMES, ["separated by ';', which is not CSV's separator"]),
        ("x.csv", "prompt,prompt,response\na,b,c\n", NAMES, ["prompt: 2 columns are named 'prompt'"]),
        ("x.csv", "A,B\na,b\n", {"prompt": "A", "response": 2}, ["response: no column 2"]),
        ("x.csv", "prompt,response\na,b\nc\nd,e,f\n\ng,h\n", NAMES, [
            "3 unusable rows of 5", "line 3: 1 cell, and its header has 2",
            "line 4: 3 cells, and its header has 2: a cell with commas must be quoted", "line 5: an empty line",
        ]),
        ("x.csv", "a,b\nHello, you,d\n", NUMBERS, ["line 2: 3 cells, and the first row has 2"]),
        ("x.csv", 'prompt,response\na,"b\nc,d\n', NAMES, ["line 2: an unclosed quote", "not read"]),
        ("x.csv", 'prompt,response\n"a"b,c\nd,e\n', NAMES, ["line 2: text after a closing quote", "not read"]),
        ("x.csv", "prompt,response\n" + "a" * 200_000 + ",b\n", NAMES, ["line 2: a cell of more than 131,072 characters"]),
        ("x.csv", '{"prompt": "a"}\n{"prompt": "b"}\n', NUMBERS, ["x.csv is not CSV: it looks like JSON Lines"]),
        ("x.tsv", "a\tb\nc\n", NUMBERS, ["line 2: 1 cell, and so no column 1"]),
        ("x.tsv", b"prompt\tresponse\na\tb\nc\t\xe9\n", NAMES, ["line 3: not UTF-8 (byte 0xe9 at column 3)"]),
        ("x.csv", b"prompt,r\xe9sponse\na,b\n", NAMES, ["header", "line 1: not UTF-8 (byte 0xe9 at column 9)"]),
        ("x.jsonl", "prompt,response\na,b\n", NAMES, ["not JSON Lines", "'prompt,response'", "looks like CSV", ".csv"]),
        ("x.jsonl", "prompt\tresponse\na\tb\n", NAMES, ["not JSON Lines", "looks like TSV"]),
        ("x.jsonl", '[\n{"prompt": "a"},\n', NAMES, ["not JSON Lines", "a JSON value over several lines", "jq -c"]),
        ("x.jsonl", '{"prompt": "a"}\n[]\n7\n"a"\n{"prompt"', NAMES, [
            "5 unusable rows of 5", "line 1: no 'response' (its keys: 'prompt')", "line 2: not an object: '[]'",
            "line 3: not an object: '7'", "line 4: not an object: '\"a\"'", "line 5: not JSON",
        ]),
        ("x.jsonl", '{"prompt": "a", "response": null}\n{"prompt": ["a"], "response": "b"}\n', NAMES, [
            "line 1: 'response' is null, not text", "line 2: 'prompt' is a list, not text",
        ]),
        ("x.jsonl", '"ab"\n["a"]\n{"0": "a"}\n', NUMBERS, [
            "line 1: not an object", "line 2: a list of 1, without number 1", "line 3: an object, which has no column 0 (its keys: '0')",
        ]),
        ("x.jsonl", "[" * 100_000, NAMES, ["nested too deep"]),
        ("x.jsonl", '{"prompt": "a", "response": ' + "1" * 5000 + "}", NAMES, ["a number of too many digits"]),
        ("x.jsonl", '{"prompt": "a", "response": "b"}\n'.encode("utf-16"), NAMES, ["not UTF-8", "UTF-16", "iconv"]),
        ("x.tsv", "a\tb\n".encode("utf-16-le"), NUMBERS, ["not UTF-8", "UTF-16"]),
        ("x.csv", b"PK\x03\x04rest", NAMES, ["not text", "a zip archive or a spreadsheet"]),
        ("x.txt", "a\nb\n", NAMES, ["a line of it is a prompt, and has no response", ".csv"]),
        ("x.parquet", "PAR1", NAMES, ["x.parquet is neither .jsonl, .tsv, .csv nor .txt"]),
        ("x.tsv", "a\tb\n", {"prompt": -1, "response": 0}, ["There is no column -1"]),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | bytes, fields: dict[str, Field], output: list[str]
) -> None:
    message = refused(tmp_path, name, content, fields)
    for part in output:
        assert part in message
    assert len(message) < 900


def test_what_is_no_file_is_told_from_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*nothing\.csv.\n.*looked for /.*\n.*--data"):
        require_file(tmp_path / "nothing.csv", "--data")
    with pytest.raises(DataError, match="is not a regular file"):
        require_file(tmp_path, "--data")
    with pytest.raises(DataError, match="There is no file"):
        require_file(Path("x" * 5000 + ".csv"), "--data")


def test_fields_are_what_was_typed_else_those_of_the_training_else_the_usual_ones(tmp_path: Path) -> None:
    def record(train: str, prompt: Field, response: Field) -> TrainingRecord:
        data = DataSettings(train=train, validation="", prompt_field=prompt, response_field=response)
        return TrainingRecord(Path("runs/x/training.json"), data, None, ())

    output, nothing = {"prompt": "en", "response": "fr"}, {"prompt": None, "response": None}
    english = {"prompt": "en", "response": "fr"}
    csv, tsv, jsonl = (tmp_path / f"x.{kind}" for kind in ("csv", "tsv", "jsonl"))
    tsv.write_text("a\tb\n")
    assert fields_of(csv, output, record("t.csv", "a", "b")) == (english, "")
    assert fields_of(csv, nothing, record("t.jsonl", "en", "fr")) == (english, "runs/x/training.json")
    assert fields_of(csv, {"prompt": "en", "response": None}, record("t.csv", "a", "fr"))[0] == english
    assert fields_of(tsv, nothing, record("t.tsv", 1, 0)) == ({"prompt": 1, "response": 0}, "runs/x/training.json")
    assert fields_of(jsonl, nothing, record("t.tsv", 1, 0)) == (NAMES, ""), "columns of another kind of file"
    assert fields_of(tsv, nothing, record("t.jsonl", "prompt", "response")) == (NUMBERS, "")
    assert fields_of(tsv, nothing, None) == (NUMBERS, "")
    tsv.write_text("response\tprompt\na\tb\n")
    assert fields_of(tsv, nothing, None) == (NAMES, ""), "a header is no row"
    assert default_fields(csv, ["prompt"]) == {"prompt": "prompt"}
    assert (spelled_field("3", tsv), spelled_field("3", jsonl), spelled_field("en", csv)) == (3, "3", "en")


def test_a_changed_data_file_is_read_or_refused(tmp_path: Path) -> None:
    rng, read, found, messages = random.Random(9), 0, 0, list[str]()
    for _ in range(CASES):
        name = rng.choice(list(DATA_FILES))
        content = DATA_FILES[name]
        match rng.randrange(4):
            case 0:
                content = mutated_bytes(content, rng)
            case 1:
                content = content.decode().encode(rng.choice(["utf-16", "utf-16-be", "utf-32", "latin-1", "utf-8-sig"]))
            case _:
                for _ in range(rng.randrange(1, 4)):
                    at = rng.randrange(len(content))
                    content = content[:at] + rng.choice(PUT_INTO_DATA) + content[at + rng.choice((0, 0, 1, 9)) :]
        path = tmp_path / rng.choice([name, name, name, rng.choice(list(DATA_FILES))])
        path.write_bytes(content)
        fields = {"prompt": rng.choice([0, 1, 7, "prompt", "response", "", "\x1b"])}
        if path.suffix != ".txt":
            fields["response"] = rng.choice([0, 1, "response"])
        try:
            rows = read_rows(path, fields)
            found += 1
            refuse_problems(rows, str(path))
            assert all(text.encode().strip() for _, texts in rows.texts for text in texts)
            read += 1
        except DataError as error:
            messages.append(str(error))
    assert 0 < read < found < CASES
    assert not any("\x1b" in message or len(message) > 5000 for message in messages)
