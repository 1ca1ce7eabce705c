"""Heavy packages are guests: importing the package and asking for help load none of them."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "tokenizers", "rich", "yaml", "llm2slm_export.recipe")


def loaded_by(code: str, *names: str) -> list[str]:
    listing = f"{code}\nimport sys\nprint('loaded:', *[name for name in {names!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, timeout=60)
    return result.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize(
    "code", ["import llm2slm_export", "from llm2slm_export import cli; cli.app(['--help'], standalone_mode=False)"]
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_by(code, "pydantic", *HEAVY) == []


@pytest.mark.parametrize("command", ["train", "build", "run", "plan", "eval", "bench"])
def test_help_on_a_command_loads_little(command: str) -> None:
    # typer itself asks pydantic about the types of a command's parameters.
    assert (
        loaded_by(f"from llm2slm_export import cli; cli.app([{command!r}, '--help'], standalone_mode=False)", *HEAVY)
        == []
    )


def test_the_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "llm2slm_export", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    for command in ("train", "build", "run", "verify", "eval", "bench", "inspect", "plan", "doctor", "recipes"):
        assert f"\n  {command} " in result.stdout


def test_serving_modules_need_no_torch() -> None:
    code = "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n" + "\n".join(
        f"import llm2slm_export.{name}"
        for name in ("bench", "bundle", "doctor", "prompts", "recipe", "render", "sources", "orchestrator")
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
