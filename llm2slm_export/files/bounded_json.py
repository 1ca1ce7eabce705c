"""A parser for untrusted JSON, with bounds on size, depth and numbers."""

import json
import math
import re
from typing import Any, NoReturn

MOST_BYTES = 8_000_000
MOST_DEPTH = 32
# A 64-bit number's digits and sign.
_MOST_DIGITS = 20
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


class JsonError(ValueError):
    """The text is not JSON, or exceeds the bounds. The message is one line without a full stop."""


def parse_json(content: bytes, *, most_bytes: int = MOST_BYTES, most_depth: int = MOST_DEPTH) -> Any:
    """Parse UTF-8 JSON.

    Also refused: more bytes or levels than the bounds, duplicate names in an object, numbers beyond 64 bits or not
    finite, and strings with lone surrogates.

    Raises:
        JsonError: the text is refused, with the reason.
    """
    if len(content) > most_bytes:
        raise JsonError(f"it has {len(content)} bytes, at most {most_bytes} are read")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    # Checked before parsing, because the parser recurses.
    if _depth(text) > most_depth:
        raise JsonError(f"it nests deeper than {most_depth} levels")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
        )
    except json.JSONDecodeError as error:
        raise JsonError(str(error)) from error
    _require_text(value)
    return value


def _depth(text: str) -> int:
    depth = deepest = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        mark = found.group()
        if mark in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in "]}":
            depth -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise JsonError(f"an object has the name {twice!a} twice")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS or not -(2**63) <= (value := int(digits)) < 2**63:
        raise JsonError(f"the number {digits[:_MOST_DIGITS]}… is beyond 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"the number {digits[:_MOST_DIGITS]} is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not a number of JSON")


def _require_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise JsonError("a string holds a lone surrogate") from error
