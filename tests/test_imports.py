"""Heavy packages are guests: importing the package and asking for help load none of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "onnx",
    "onnxruntime",
    "tokenizers",
    "rich",
    "yaml",
    "llm2slm_export.authoring.recipe",
)


def loaded_by(code: str, *names: str) -> list[str]:
    listing = f"{code}\nimport sys\nprint('loaded:', *[name for name in {names!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, timeout=60)
    return result.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize(
    "code", ["import llm2slm_export", "from llm2slm_export.cli import app; app.app(['--help'], standalone_mode=False)"]
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_by(code, "pydantic", *HEAVY) == []


@pytest.mark.parametrize(
    "command", ["train", "build", "run", "batch", "verify", "eval", "bench", "inspect", "plan", "doctor", "recipes"]
)
def test_help_on_a_command_loads_little(command: str) -> None:
    # typer itself asks pydantic about the types of a command's parameters.
    assert (
        loaded_by(
            f"from llm2slm_export.cli import app; app.app([{command!r}, '--help'], standalone_mode=False)", *HEAVY
        )
        == []
    )


def test_the_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "llm2slm_export", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    for command in (
        "train",
        "build",
        "run",
        "batch",
        "verify",
        "eval",
        "bench",
        "inspect",
        "plan",
        "doctor",
        "recipes",
    ):
        assert f"\n  {command} " in result.stdout


def test_serving_modules_need_no_torch() -> None:
    code = "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n" + "\n".join(
        f"import llm2slm_export.{name}"
        for name in (
            "evaluation.latency",
            "bundle.bundle",
            "doctor",
            "cli.prompt_files",
            "authoring.recipe",
            "cli.console",
            "authoring.pair_sources",
            "inference.orchestrator",
        )
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("wanted", [False, True])
def test_onnx_runtime_sends_no_telemetry_unless_that_is_wanted(tmp_path: Path, wanted: bool) -> None:
    # What it will send, and the name it has given this machine, lie in the home directory from its import on. It keeps still
    # in tests of its own and on CI, so that little of this environment goes along.
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH") if name in os.environ}
    environment |= {"HOME": str(tmp_path)} | ({"ORT_DISABLE_TELEMETRY": "0"} if wanted else {})
    model = Path(__file__).parents[1] / "engines" / "demo" / "projector.onnx"
    code = f"import llm2slm_export, onnxruntime\nprint(onnxruntime.__version__)\nonnxruntime.InferenceSession({str(model)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    if not wanted:
        assert left == []
    elif not left:
        pytest.skip(f"onnxruntime {done.stdout.strip()} has no telemetry here")
