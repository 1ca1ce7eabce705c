"""What is published: the licence, the marker of typed packages, and the check that CI makes of wheel and sdist."""

import importlib.util
import io
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import REPOSITORY

# Of the text that apache.org publishes as LICENSE-2.0.txt.
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
RECIPES = {"README.md", "one.yaml"}


def checker() -> Any:
    """The module `.ci/check_package.py`."""
    spec = importlib.util.spec_from_file_location("check_package", REPOSITORY / ".ci" / "check_package.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archives(directory: Path, *, without: str = "", licence: str | None = None) -> None:
    """A wheel and an sdist that hold what they must, but for the names that contain `without`."""
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8") if licence is None else licence
    wheel = ["llm2slm_export/py.typed", *(f"llm2slm_export/recipes/{name}" for name in RECIPES)]
    wheel += ["llm2slm_export-0.dist-info/licenses/LICENSE"]
    sdist = [
        *(name + "file" if name.endswith("/") else name for name in checker().SDIST),
        *(f"recipes/{name}" for name in RECIPES),
    ]
    with zipfile.ZipFile(directory / "llm2slm_export-0-py3-none-any.whl", "w") as archive:
        for name in wheel:
            if not without or without not in name:
                archive.writestr(name, text)
    with tarfile.open(directory / "llm2slm_export-0.tar.gz", "w:gz") as archive:
        for name in sdist:
            if not without or without not in name:
                entry = tarfile.TarInfo(f"llm2slm_export-0/{name}")
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))


def test_the_licence_is_the_whole_text() -> None:
    assert sha256((REPOSITORY / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_the_package_says_that_it_is_typed() -> None:
    assert (REPOSITORY / "llm2slm_export" / "py.typed").is_file()


def test_a_complete_package_has_no_faults(tmp_path: Path) -> None:
    archives(tmp_path)
    assert checker().faults(tmp_path, RECIPES) == []


@pytest.mark.parametrize("without", ["py.typed", "recipes/one.yaml", "LICENSE"])
def test_what_is_missing_is_named_for_wheel_and_sdist(tmp_path: Path, without: str) -> None:
    archives(tmp_path, without=without)
    found = checker().faults(tmp_path, RECIPES)
    named = {fault.partition(":")[0].rpartition(".")[2] for fault in found if without in fault}
    assert named == {"whl", "gz"}


@pytest.mark.parametrize("without", ["docs/", "engines/demo/", "tests/", "cpp/"])
def test_a_directory_missing_in_the_sdist_is_named(tmp_path: Path, without: str) -> None:
    archives(tmp_path, without=without)
    assert [fault for fault in checker().faults(tmp_path, RECIPES) if f"{without} is missing" in fault]


@pytest.mark.parametrize("licence", ["", "Apache License, Version 2.0\n"])
def test_an_empty_or_abridged_licence_is_a_fault_of_both(tmp_path: Path, licence: str) -> None:
    archives(tmp_path, licence=licence)
    assert len([fault for fault in checker().faults(tmp_path, RECIPES) if "full Apache-2.0 text" in fault]) == 2


def test_a_missing_archive_is_a_fault(tmp_path: Path) -> None:
    assert checker().faults(tmp_path, RECIPES) == [f"{tmp_path} holds 0 wheels and 0 sdists; expected one of each"]
