"""One line per problem of a pydantic `ValidationError`."""

import difflib
import reprlib
from typing import Any

from pydantic import BaseModel, ValidationError

from llm2slm_export.errors import printable

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3
_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n"})  # a key of the file stays on one line


def shortened(value: Any) -> str:
    """The `repr` of a value from a file, shortened."""
    return _SHORT.repr(value)


def validation_problems(error: ValidationError, model: type[BaseModel], *, whole: str = "the file") -> list[str]:
    """One line for each problem: the field, what is wrong, and what was given.

    Args:
        error: raised by `model`.
        model: its fields are suggested for unknown keys.
        whole: stands for the field in problems of no single field.
    """
    return [_line(item, model, whole) for item in error.errors(include_url=False)]


def _line(item: Any, model: type[BaseModel], whole: str) -> str:
    location, value = item["loc"], item["input"]
    where = printable(".".join(map(str, location)) or whole).translate(_ESCAPES)
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), _fields_at(model, location[:-1]), n=1)
        return f"{where}: unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
    if item["type"] == "missing":
        return f"{where}: required, not given"
    message = item["msg"].removeprefix("Value error, ")
    # A rule on several fields names them itself.
    several = item["type"] == "value_error" and bool(_fields_at(model, location))
    return f"{where}: {message}" if several else f"{where}: {message} (got {shortened(value)})"


def _fields_at(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """The names of a model's fields at a location."""
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = None if field is None else field.annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
