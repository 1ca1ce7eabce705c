"""The package's requirements by extra, from its installed metadata."""

from importlib import metadata

from packaging.requirements import Requirement

PACKAGE = "llm2slm-export"
BASE = "base"


def requirements(*extras: str) -> dict[str, dict[str, str]]:
    """The specifier of each required package, for the package itself (`base`) and for extras, including nested extras.

    Empty in a source tree that was never installed, because it has no metadata.
    """
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {BASE: _of(parsed, "")} | {extra: _of(parsed, extra) for extra in extras}


def _of(parsed: list[Requirement], extra: str) -> dict[str, str]:
    """The specifier of each package that an extra requires; with an empty extra, that the package itself requires."""
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
    """The specifier as text, with its lower bound first."""
    return ",".join(sorted(map(str, requirement.specifier), key=lambda part: (part.startswith("<"), part)))
