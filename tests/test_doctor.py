"""What doctor finds, and that nothing missing makes it fail."""

import importlib
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_bundle import write_small_bundle

from llm2slm_export import doctor
from llm2slm_export.doctor import REQUIREMENTS, diagnose, satisfies

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def declared(extra: str) -> dict[str, str]:
    """Name → specifier of an extra in pyproject.toml, with the extras it includes."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] if extra == "base" else project["optional-dependencies"][extra]
    return dict(pair for line in lines for pair in expanded(line))


def expanded(line: str) -> Iterator[tuple[str, str]]:
    if line.startswith("llm2slm-export["):
        for extra in line.partition("[")[2].rstrip("]").split(","):
            yield from declared(extra).items()
    else:
        name = line.split(">")[0].split("<")[0]
        yield name, line[len(name) :]


@pytest.mark.parametrize("extra", REQUIREMENTS)
def test_the_table_is_pyprojects(extra: str) -> None:
    assert REQUIREMENTS[extra] == declared(extra)


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
def test_versions_are_compared_as_numbers(found: str, needed: str, ok: bool) -> None:
    assert satisfies(found, needed) is ok


def test_this_machine_is_described() -> None:
    found = diagnose()
    assert found.machine.cores >= 1
    assert found.machine.python.startswith("3.")
    assert {extra.name for extra in found.extras} == set(REQUIREMENTS)
    assert found.bundle is None


def test_a_bare_environment_names_the_pip_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_found", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    real = importlib.import_module

    def without_runtime(name: str, package: str | None = None) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without_runtime)
    found = diagnose()
    assert found.machine.gpus == ()
    assert (found.onnxruntime_providers, found.onnxruntime_problem) == ((), "not installed")
    pips = {extra.name: extra.pip for extra in found.extras if not extra.complete}
    assert pips["build"] == "pip install 'llm2slm-export[build]'"


def test_a_system_without_proc_is_still_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: Any) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert diagnose().machine.cpu
    assert diagnose().machine.flags == ()


def test_a_sound_bundle_opens(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "small")
    check = diagnose(tmp_path / "small").bundle
    assert check is not None
    assert check.ok
    assert check.runtimes[0].needed == ">=1.20"


def test_a_damaged_bundle_is_a_finding(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "small")
    (tmp_path / "small" / "encoder.onnx").unlink()
    check = diagnose(tmp_path / "small").bundle
    assert check is not None
    assert not check.ok
    assert "encoder.onnx: missing" in check.problems


def test_a_bundle_for_a_newer_runtime_is_a_finding(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "small", runtime="99.0")
    check = diagnose(tmp_path / "small").bundle
    assert check is not None
    assert not check.problems
    assert not check.ok
