"""JSON within bounds."""

import pytest

from llm2slm_export.files.bounded_json import JsonError, parse_json


def test_json_is_parsed() -> None:
    assert parse_json('{"a": [1, -2.5, "\\u00e9ü", "[{\\"", null, true]}'.encode()) == {
        "a": [1, -2.5, "éü", '[{"', None, True]
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{no JSON", "property name"),
        (b"[" * 100_000, "nests deeper than 32 levels"),
        (b'{"a":' * 100_000, "nests deeper than 32 levels"),
        (b"1" * 5000, "beyond 64 bits"),
        (b"-9223372036854775809", "beyond 64 bits"),
        (b"1e999", "too large"),
        (b"NaN", "NaN is not a number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the name 'c' twice"),
        (b'["\\ud800"]', "lone surrogate"),
        (b'{"\\udfff": 1}', "lone surrogate"),
        (b'"\xff"', "not UTF-8: invalid start byte at byte 1"),
        ("1".encode("utf-16"), "not UTF-8"),
        (b" " * 101, "101 bytes, at most 100 are read"),
    ],
)
def test_what_is_beyond_the_bounds_is_refused(content: bytes, reason: str) -> None:
    bound = 100 if content.isspace() else 1_000_000
    with pytest.raises(JsonError, match=reason):
        parse_json(content, most_bytes=bound)


def test_brackets_in_strings_are_no_levels() -> None:
    assert parse_json(b'["' + b"[" * 1000 + b'", "\\"[[", []]', most_depth=2)[0] == "[" * 1000
    with pytest.raises(JsonError, match="nests deeper than 1 levels"):
        parse_json(b'["\\"", []]', most_depth=1)


def test_unfinished_strings_take_no_quadratic_time() -> None:
    with pytest.raises(JsonError):
        parse_json(b'"' + b'\\"' * 1_000_000)
