"""Commands on recipes, compositions and data files from a stranger: a result, or a message and an exit code, and nothing else."""

import contextlib
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import llm2slm_export
from llm2slm_export.cli.app import app
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.orchestrator import Orchestrator
from tests.support.hostile import CASES, DATA_FILES, PUT_INTO_DATA, PUT_INTO_YAML, VALUES, mutated_bytes, mutated_json
from tests.support.paths import RECIPES, REPOSITORY

DEMO, COMPOSITION = REPOSITORY / "engines" / "demo", REPOSITORY / "compositions" / "tatoeba-en-fr"


@pytest.fixture(scope="module")
def demo() -> Iterator[Orchestrator]:
    with llm2slm_export.load(DEMO, threads=1) as pair:
        yield pair


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ends(*arguments: str) -> bool:
    """Whether a command went well; a failure has a message of the program's own."""
    result = CliRunner().invoke(app, [*arguments])
    message = f"{arguments}: {result.output[-2000:]} {result.exception!r}"
    assert result.exit_code in (0, 1, 2), message
    assert result.exception is None or isinstance(result.exception, SystemExit), message
    assert "Traceback" not in result.output, message
    assert "unexpected" not in result.stderr, message
    assert "\x1b" not in result.output, message
    assert result.exit_code == 0 or "→" in result.stderr or "Usage:" in result.stderr, message
    return result.exit_code == 0


def data_file(rng: random.Random, directory: Path) -> Path:
    """A data file with something in it changed, by its own name or another one."""
    name = rng.choice(list(DATA_FILES))
    content = DATA_FILES[name]
    if rng.random() < 0.3:
        content = mutated_bytes(content, rng)
    elif rng.random() < 0.5:
        at = rng.randrange(len(content))
        content = content[:at] + rng.choice(PUT_INTO_DATA) + content[at:]
    path = directory / (name if rng.random() < 0.8 else rng.choice(list(DATA_FILES)))
    path.write_bytes(content)
    return path


def fields(rng: random.Random, *names: str) -> list[str]:
    """Options that name fields, or none."""
    values = ["prompt", "response", "0", "1", "7", "-1", "", "\x1b[0m", "é" * 300, "9" * 30]
    return [part for name in names if rng.random() < 0.5 for part in (f"--{name}-field", rng.choice(values))]


@pytest.mark.slow
def test_run_on_changed_data_files(demo: Orchestrator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2slm_export.inference.orchestrator.load", lambda *_, **__: contextlib.nullcontext(demo))
    rng, went_well = random.Random(11), 0
    for _ in range(CASES // 4):
        file = data_file(rng, tmp_path)
        went_well += ends("run", str(DEMO), "--file", str(file), *fields(rng, "prompt"), "--max-new-tokens", "1")
    assert 0 < went_well < CASES // 4


def changed_composition(rng: random.Random, directory: Path) -> Path:
    """A composition without weights whose files say something else."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name in ("composition.json", "training.json"):
        content = (COMPOSITION / name).read_bytes()
        match rng.randrange(3):
            case 0:
                content = json.dumps(mutated_json(json.loads(content), rng)[1]).encode()
            case 1:
                content = mutated_bytes(content, rng)
            case _:
                pass
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.slow
def test_eval_of_changed_data_and_compositions(tmp_path: Path) -> None:
    rng, went_well = random.Random(12), 0
    for _ in range(CASES // 8):
        file, composition = data_file(rng, tmp_path), changed_composition(rng, tmp_path / "composition")
        typed = fields(rng, "prompt", "response", "task")
        went_well += ends(
            "eval", str(DEMO), "--data", str(file), "--composition", str(composition), *typed, "--max-new-tokens", "1", "--rows", "2",
            "--speed-prompts", "0", "--metrics", "exact_match", "--work", str(tmp_path / "work"),
        )  # fmt: skip
    assert 0 < went_well < CASES // 8


def test_build_of_changed_compositions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_heads(heads: Any, *_: Any, **__: Any) -> None:
        del heads
        raise UsageError("The exporter is not run here.", remedy="nothing")

    monkeypatch.setitem(sys.modules, "llm2slm_export.authoring.build", SimpleNamespace(build_heads=build_heads))
    rng, reached = random.Random(13), 0
    for _ in range(CASES // 4):
        composition, gate = changed_composition(rng, tmp_path / "composition"), data_file(rng, tmp_path)
        gated = ["--gate", str(gate)] if rng.random() < 0.5 else []
        assert not ends("build", "--composition", str(composition), *gated, *fields(rng, "prompt"), "--out", "o")
        reached += not (tmp_path / "o").exists()
    assert reached


def test_train_of_changed_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(recipe: Any, out: Path, **_: Any) -> Any:
        del recipe
        return SimpleNamespace(directory=out, metrics={"eval_loss": 1.0}, seconds=1.0, is_main_process=True)

    monkeypatch.setitem(sys.modules, "llm2slm_export.authoring.training.train", SimpleNamespace(train=train))
    rng, went_well, path = random.Random(14), 0, tmp_path / "x.yaml"
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "data" / f"{name}.tsv").write_text("a\tb\n")
    for place in ("tokenizer", "llm"):
        (tmp_path / place).mkdir()
    original = (RECIPES / "tatoeba-en-fr.yaml").read_text(encoding="utf-8")
    for directory in ("runs/tatoeba-en-fr/", "runs/tatoeba-en-es/"):
        original = original.replace(directory, "")
    for _ in range(CASES // 4):
        raw = bytearray(original.encode())
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.choice((0, 1, 5))] = rng.choice(
                (*(p for p in PUT_INTO_YAML if len(p) < 100), rng.randbytes(2))
            )
        path.write_bytes(raw)
        key = rng.choice(
            ["training.data.train", "llm.model", "slm.config", "training.data.prompt_field", "name", "llm.tokenizer"]
        )
        value = rng.choice(VALUES)
        override = [] if rng.random() < 0.5 else [f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
        only = rng.choice([[], ["--only", "llm"], ["--only", "slm-alone"]])
        went_well += ends("train", str(path), *only, *fields(rng, "prompt", "response"), *override)
    assert 0 < went_well < CASES // 4
