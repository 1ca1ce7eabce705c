"""Versions are compared by their release numbers."""

import pytest

from llm2slm_export.environment.versions import at_least, release, satisfies


def test_releases_are_compared_as_numbers() -> None:
    assert release("1.9.0") < release("1.24") < release("1.24.1rc2") < release("1.32.0")
    assert release("2.13.0+cpu") == release("2.13")
    assert release("525.60.13") < release("580.126.09")
    assert release("none") == release("0")


@pytest.mark.parametrize(
    ("found", "needed", "enough"), [("11", "11.0", True), ("10.15", "11", False), ("1.7.1.116", "1.7", True)]
)
def test_missing_numbers_count_as_0(found: str, needed: str, enough: bool) -> None:
    assert at_least(found, needed) is enough


@pytest.mark.parametrize(
    ("found", "needed", "ok"),
    [
        ("2.13.0+cpu", ">=2.12,<2.14", True),
        ("2.14.0", ">=2.12,<2.14", False),
        ("2.9", ">=2.12", False),
        ("6", ">=6.0", True),
        ("5.20.0.dev0", ">=5.20,<6", True),
        ("6.0.1", "<6", False),
    ],
)
def test_specifiers_are_of_releases(found: str, needed: str, ok: bool) -> None:
    assert satisfies(found, needed) is ok
