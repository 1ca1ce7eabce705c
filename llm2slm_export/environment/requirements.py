"""The package's own requirements, by extra, as its installed metadata states them."""

from importlib import metadata

from packaging.requirements import Requirement

PACKAGE = "llm2slm-export"
BASE = "base"


def requirements(*extras: str) -> dict[str, dict[str, str]]:
    """Specifiers by package: of the package itself (`base`), then of each extra, with those that it includes.

    Empty in a source tree that was never installed, which has no metadata.
    """
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {BASE: _of(parsed, "")} | {extra: _of(parsed, extra) for extra in extras}


def _of(parsed: list[Requirement], extra: str) -> dict[str, str]:
    """An extra's specifiers by package; those of the package itself for no extra."""
    found: dict[str, str] = {}
    for requirement in parsed:
        if (requirement.marker is None) != (not extra):
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == PACKAGE:
            for included in sorted(requirement.extras):
                found |= _of(parsed, included)
        else:
            found[requirement.name] = _shown(requirement)
    return dict(sorted(found.items()))


def _shown(requirement: Requirement) -> str:
    """The specifier with its lower bound first."""
    return ",".join(sorted(map(str, requirement.specifier), key=lambda part: (part.startswith("<"), part)))
