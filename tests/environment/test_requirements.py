"""The requirements that `doctor` checks are those of the installed package."""

import re
import tomllib
from importlib import metadata

import pytest

from llm2slm_export.doctor import EXTRAS
from llm2slm_export.environment.requirements import requirements
from tests.support.paths import REPOSITORY


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """pyproject.toml's extras, as the metadata of an installed package holds them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    lines = [*project["dependencies"], *(f'{line}; extra == "{name}"' for name, own in extras.items() for line in own)]
    monkeypatch.setattr(metadata, "requires", lambda _: lines)
    return extras | {"base": project["dependencies"]}


def test_every_line_of_pyproject_is_there(project: dict[str, list[str]]) -> None:
    found = requirements(*EXTRAS)
    assert list(found) == ["base", *EXTRAS]
    for name, packages in found.items():
        # Extras of other packages are not shown.
        own = [re.sub(r"\[.*]", "", line) for line in project[name] if not line.startswith("llm2slm-export[")]
        assert {f"{package}{specifier}" for package, specifier in packages.items()} >= set(own)


def test_extras_have_what_they_include(project: dict[str, list[str]]) -> None:
    del project
    found = requirements("build", "train", "cpu")
    assert found["train"].items() > found["build"].items()
    assert found["build"]["torch"] == ">=2.13,<2.14"
    assert list(found["cpu"]) == ["onnxruntime"]


def test_a_tree_that_was_never_installed_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert requirements("cpu") == {}
