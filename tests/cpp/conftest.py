"""The C++ test programs."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def program(cpp_build: Path) -> Path:
    return next(cpp_build.glob("**/llm2slm_tokenize"))
