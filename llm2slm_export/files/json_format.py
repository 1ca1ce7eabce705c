"""JSON files with a schema: read within bounds, refused if a newer release wrote them, and validated."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from llm2slm_export.errors import Llm2SlmError
from llm2slm_export.files.bounded_json import MOST_BYTES, JsonError, parse_json
from llm2slm_export.files.validation_problems import validation_problems

_Model = TypeVar("_Model", bound=BaseModel)
_SHOWN = 10  # problems in a message; the rest are counted


@dataclass(frozen=True)
class JsonFormat(Generic[_Model]):
    """A kind of JSON file.

    Args:
        what: the content, with its article: "a manifest".
        model: the content's fields.
        error: raised for a file that cannot be used.
        if_damaged: remedy for a file that is not JSON.
        if_invalid: remedy for a file with missing, unknown or invalid fields.
        version_field: the field of the format's version; None: it has none.
        newest: the newest version that this release reads.
        strict: refuse values that pydantic would convert: a quoted number, true for 1.
    """

    what: str
    model: type[_Model]
    error: type[Llm2SlmError]
    if_damaged: str
    if_invalid: str
    version_field: str | None = None
    newest: int = 0
    strict: bool = False

    def read(self, path: Path) -> _Model:
        """Read a file.

        Raises:
            Llm2SlmError: the format's own; see `parse` and `validate`.
            OSError: the file cannot be read.
        """
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        self.parse(path, content)
        return self.validate(path, content)

    def parse(self, path: Path, content: bytes) -> Any:
        """Parse a file's content without validating it.

        Raises:
            Llm2SlmError: the format's own: the content is not JSON, or of a newer version.
        """
        try:
            raw = parse_json(content)
        except JsonError as error:
            raise self.error(f"{path} cannot be read as JSON.", str(error), remedy=self.if_damaged) from error
        found = self.version(raw)
        if found is not None and found > self.newest:
            raise self.error(
                f"{path} has {_spelled(self.version_field)} {found}; this release reads up to {self.newest}.",
                *_writer(raw),
                remedy="pip install --upgrade llm2slm-export",
            )
        return raw

    def version(self, raw: Any) -> int | None:
        """The version of parsed content; None if the field is missing or not an integer."""
        found = raw.get(self.version_field) if self.version_field and isinstance(raw, dict) else None
        return found if type(found) is int else None

    def validate(self, path: Path, content: bytes) -> _Model:
        """Validate parsed content.

        Raises:
            Llm2SlmError: the format's own: fields are missing, unknown or invalid; the first ten are named, the rest are counted.
        """
        try:
            return self.model.model_validate_json(content, strict=self.strict)
        except ValidationError as error:
            raise self.invalid(path, validation_problems(error, self.model)) from error

    def invalid(self, path: Path, problems: Sequence[str]) -> Llm2SlmError:
        """The error of a file with problems in its fields."""
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        return self.error(
            f"{path} is not {self.what} this release can read.", *problems[:_SHOWN], *more, remedy=self.if_invalid
        )


def _spelled(field: str | None) -> str:
    return str(field).replace("_", " ")


def _writer(raw: dict[str, Any]) -> list[str]:
    """The release that wrote the content, as evidence; nothing if the content has no tool versions."""
    if "tool_versions" not in raw:
        return []
    versions = raw["tool_versions"]
    version = versions.get("llm2slm-export") if isinstance(versions, dict) else None
    return [f"it was written by {f'llm2slm-export {version}' if isinstance(version, str) else 'a newer release'}"]
