"""The C++ test programs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cpp_library import Program


@pytest.fixture(scope="module")
def program(cpp_build: Path) -> Path:
    return next(cpp_build.glob("**/llm2slm_tokenize"))


@pytest.fixture(scope="module")
def driver(cpp_build: Path) -> Iterator[Program]:
    with Program(cpp_build / "tests" / "llm2slm_driver") as program:
        yield program


@pytest.fixture(scope="module")
def inside(cpp_build: Path) -> Iterator[Program]:
    with Program(cpp_build / "tests" / "llm2slm_inside") as program:
        yield program
