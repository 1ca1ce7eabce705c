"""Version numbers, compared as numbers."""

import re


def numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version, without pre-release or local parts: `1.24.1rc2` → (1, 24, 1)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def at_least(found: str, needed: str) -> bool:
    """Whether the release `found` is `needed` or newer. Missing numbers count as 0."""
    left, right = numbers(found), numbers(needed)
    width = max(len(left), len(right))
    return left + (0,) * (width - len(left)) >= right + (0,) * (width - len(right))
