"""The base of every record that is read from a file: unknown fields are refused, values do not change."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool | float):
        raise PydanticCustomError("whole_number", "must be a whole number")
    return value


WHOLE_NUMBER = BeforeValidator(_whole_number)
"""Annotates a `Literal` of integers. Without it pydantic takes 1.0 and true for `Literal[1]`, since they are equal."""
