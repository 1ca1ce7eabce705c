"""The pydantic base of all records read from files: frozen, unknown fields refused."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool | float):
        raise PydanticCustomError("whole_number", "must be a whole number")
    return value


WHOLE_NUMBER = BeforeValidator(_whole_number)
"""Annotates a `Literal` of integers. Without it pydantic accepts 1.0 and true for `Literal[1]`, because they are equal."""
