"""Versions, compared by their release numbers: a development build counts as its release."""

import re

from packaging.specifiers import SpecifierSet
from packaging.version import Version


def release(version: str) -> Version:
    """The release of a version, without pre-release and local parts: `1.24.1rc2` → 1.24.1. 0 for text without a number."""
    match = re.match(r"\d+(\.\d+)*", version)
    return Version(match[0] if match else "0")


def at_least(found: str, needed: str) -> bool:
    """Whether the release of `found` is `needed` or newer."""
    return release(found) >= release(needed)


def satisfies(found: str, specifier: str) -> bool:
    """Whether the release of `found` satisfies a specifier such as `>=2.12,<2.14`."""
    return SpecifierSet(specifier).contains(release(found))
