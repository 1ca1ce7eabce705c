"""JSON with a schema: what is refused, and how problems are named."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import field_validator, model_validator

from llm2slm_export.errors import DataError
from llm2slm_export.files.json_format import JsonFormat
from llm2slm_export.files.strict_model import StrictModel


class Part(StrictModel):
    width: int = 1


class Record(StrictModel):
    version: Literal[2] = 2
    name: str
    part: Part = Part()
    most: int = 9
    column: str | int = 0

    @field_validator("column", mode="before")
    @classmethod
    def _is_a_column(cls, value: Any) -> Any:
        if not isinstance(value, str | int):
            raise ValueError("must be a name or a number")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "Record":
        if self.part.width > self.most:
            raise ValueError("part.width is above most")
        return self


FORMAT = JsonFormat(
    "a record", Record, DataError, if_damaged="copy it", if_invalid="write it again", version_field="version", newest=2
)


def refusal(path: Path, text: str, kind: JsonFormat[Any] = FORMAT) -> DataError:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        kind.read(path)
    return caught.value


def test_a_record_is_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"name": "a", "part": {"width": 3}}', encoding="utf-8")
    assert FORMAT.read(path) == Record(name="a", part=Part(width=3))


@pytest.mark.parametrize("text", ["{", '{"name": "a", "name": "b"}', "[" * 40 + "]" * 40])
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    error = refusal(tmp_path / "record.json", text)
    assert str(tmp_path / "record.json") in str(error)
    assert "cannot be read as JSON." in str(error)
    assert error.remedy == "copy it"


@pytest.mark.parametrize(
    ("tools", "evidence"),
    [
        ("", ()),
        (', "tool_versions": {}', ("it was written by a newer release",)),
        (', "tool_versions": {"llm2slm-export": "9.1"}', ("it was written by llm2slm-export 9.1",)),
    ],
)
def test_a_newer_version_says_who_wrote_it(tmp_path: Path, tools: str, evidence: tuple[str, ...]) -> None:
    error = refusal(tmp_path / "record.json", f'{{"version": 3, "unknown": 1{tools}}}')
    assert "has version 3; this release reads up to 2." in str(error)
    assert error.evidence == evidence


def test_every_problem_has_a_line_with_its_field(tmp_path: Path) -> None:
    error = refusal(tmp_path / "record.json", '{"part": {"widht": 1, "width": "x"}, "no\\ntes": 1}')
    assert "is not a record this release can read." in str(error)
    assert sorted(error.evidence) == [
        "name: required, not given",
        "no\\ntes: unknown key",
        "part.widht: unknown key; did you mean 'width'?",
        "part.width: Input should be a valid integer, unable to parse string as an integer (got 'x')",
    ]
    assert error.remedy == "write it again"


def test_a_rule_on_several_fields_belongs_to_the_file(tmp_path: Path) -> None:
    error = refusal(tmp_path / "record.json", '{"name": "a", "part": {"width": 10}}')
    assert error.evidence == ("the file: part.width is above most",)


def test_a_rule_on_one_field_names_the_value_even_if_it_is_a_mapping(tmp_path: Path) -> None:
    error = refusal(tmp_path / "record.json", '{"name": "a", "column": {"a": "b"}}')
    assert error.evidence == ("column: must be a name or a number (got {'a': 'b'})",)


def test_problems_beyond_ten_are_counted(tmp_path: Path) -> None:
    keys = ", ".join(f'"key {number}": 0' for number in range(13))
    error = refusal(tmp_path / "record.json", f'{{"name": "a", {keys}}}')
    assert len(error.evidence) == 11
    assert error.evidence[-1] == "and 3 more"


def test_a_strict_format_converts_nothing(tmp_path: Path) -> None:
    path, strict = tmp_path / "record.json", JsonFormat("a record", Record, DataError, "", "", strict=True)
    path.write_text('{"name": "a", "most": "7"}', encoding="utf-8")
    assert FORMAT.read(path).most == 7
    assert refusal(path, path.read_text(encoding="utf-8"), strict).evidence == (
        "most: Input should be a valid integer (got '7')",
    )
