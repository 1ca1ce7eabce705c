"""Checkpoints that are damaged: the run goes on from the one before and says so, or refuses; what is shipped names no place."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2slm_export.authoring.recipe import Recipe, without_absolute_paths
from llm2slm_export.authoring.training.checkpoints import (
    COMPLETE_FILE,
    WEIGHTS_FILE,
    last_checkpoint,
    prune,
    resumption,
    set_aside,
)
from llm2slm_export.authoring.training.train import train
from llm2slm_export.errors import TrainingError, UsageError
from llm2slm_export.files.workplace import occupied
from tests.support.tiers import tiered
from tests.support.tiny_recipe import changed, tiny_recipe

FILES = ("trainer_state.json", WEIGHTS_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth")


class _Code:
    """What runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._mark}",)


@pytest.fixture(scope="module")
def trained(
    save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:  # fmt: skip
    """A recipe, and the directory in which it was trained: `out`, and `out.work` with two checkpoints."""
    directory = tmp_path_factory.mktemp("trained")
    recipe = tiny_recipe(directory, save_model, epochs=2)
    train(recipe, directory / "out")
    assert len(list((directory / "out.work").glob("checkpoint-*"))) == 2
    return recipe, directory


@pytest.fixture
def work(trained: tuple[Recipe, Path], tmp_path: Path) -> Path:
    """The checkpoints, to be damaged."""
    return Path(shutil.copytree(trained[1] / "out.work", tmp_path / "work"))


def newest(work: Path) -> tuple[Path, Path]:
    """The last checkpoint and the one before it."""
    last = last_checkpoint(work)
    assert last is not None
    (before,) = (path for path in work.glob("checkpoint-*") if path != last)
    return last, before


def restamp(checkpoint: Path, name: str) -> None:
    """Give the marker the hash that a file has now, as whoever changed it on purpose could."""
    marker = json.loads((checkpoint / COMPLETE_FILE).read_text())
    marker["files"][name] = sha256((checkpoint / name).read_bytes()).hexdigest()
    (checkpoint / COMPLETE_FILE).write_text(json.dumps(marker))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped", "missing"])
def test_a_damaged_file_costs_the_checkpoint_and_is_named(work: Path, file: str, how: str) -> None:
    last, before = newest(work)
    content = (last / file).read_bytes()
    middle = len(content) // 2
    if how == "missing":
        (last / file).unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (last / file).write_bytes({"truncated": content[:middle], "emptied": b"", "flipped": flipped}[how])
    found = resumption(work)
    assert found is not None
    assert found.checkpoint == before
    assert list(found.damaged) == [last]
    assert file in found.damaged[last]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"5", b"null", b'{"files": 1}', b'{"files": {}}', b"\xff", b"[" * 100_000]
)
def test_a_marker_that_cannot_be_read_is_damage_too(work: Path, content: bytes) -> None:
    last, before = newest(work)
    (last / COMPLETE_FILE).write_bytes(content)
    found = resumption(work)
    assert found is not None
    assert (found.checkpoint, list(found.damaged)) == (before, [last])


@pytest.mark.parametrize("threads", [float("inf"), float("nan"), -2, 0, 1.5, True, "2", None, [2]])
def test_a_marker_whose_number_of_threads_is_none_is_damage_too(work: Path, threads: object) -> None:
    last, before = newest(work)
    marker = json.loads((last / COMPLETE_FILE).read_text())
    (last / COMPLETE_FILE).write_text(json.dumps(marker | {"torch_threads": threads}))
    found = resumption(work)
    assert found is not None
    assert (found.checkpoint, list(found.damaged)) == (before, [last])
    assert "torch_threads: invalid value" in found.damaged[last]


def test_a_terminals_control_sequences_in_a_marker_are_escaped(work: Path) -> None:
    last, _ = newest(work)
    marker = json.loads((last / COMPLETE_FILE).read_text())
    marker["files"]["\x1b[2J"] = ""
    (last / COMPLETE_FILE).write_text(json.dumps(marker))
    found = resumption(work)
    assert found is not None
    assert found.damaged[last] == "\\x1b[2J is missing"


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickled_code_is_not_run_though_the_hash_is_right(work: Path, tmp_path: Path, file: str) -> None:
    last, before = newest(work)
    (last / file).write_bytes(pickle.dumps(_Code(tmp_path / "ran")))
    restamp(last, file)
    found = resumption(work)
    assert found is not None
    assert found.checkpoint == before
    assert f"{file} cannot be read (it holds other objects than" in found.damaged[last]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("global_step", "x"),
        ("global_step", -5),
        ("best_model_checkpoint", 7),
        ("best_model_checkpoint", ""),
        ("best_model_checkpoint", ".."),
        ("best_model_checkpoint", "elsewhere/other"),
        ("log_history", [1]),
        ("log_history", [{"learning_rate": "high"}]),
        ("log_history", 3),
        ("epoch", []),
        ("epoch", float("inf")),
        ("epoch", float("nan")),
        ("epoch", -1.0),
        ("logging_steps", "ten"),
        ("eval_steps", None),
        ("save_steps", {}),
    ],
)
def test_a_state_that_no_run_has_is_damage_though_the_hash_is_right(work: Path, field: str, value: object) -> None:
    last, before = newest(work)
    path = last / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    restamp(last, path.name)
    found = resumption(work)
    assert found is not None
    assert found.checkpoint == before
    assert f"trainer_state.json cannot be read ({field}: invalid value" in found.damaged[last]


@pytest.mark.parametrize("count", tiered([60, 400], slow=[60]))
def test_random_damage_is_always_found(work: Path, count: int) -> None:
    """Mutations of every file: never the damaged checkpoint, never another error."""
    last, before = newest(work)
    draw = random.Random(0)
    for _ in range(count):
        path = last / draw.choice((*FILES, COMPLETE_FILE))
        content = path.read_bytes()
        at = draw.randrange(len(content))
        mutated = draw.choice([
            content[:at],
            content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :],
            content[:at] + draw.randbytes(3) + content[at:],
        ])  # fmt: skip
        path.write_bytes(mutated)
        found = resumption(work)
        assert found is not None
        if path.name != COMPLETE_FILE:  # in that one a mutation may change a key that nobody reads
            assert (found.checkpoint, list(found.damaged)) == (before, [last]), path.name
        path.write_bytes(content)


def test_where_no_checkpoint_is_whole_all_reasons_are_given(work: Path) -> None:
    for checkpoint in newest(work):
        (checkpoint / "trainer_state.json").write_text("{")
    with pytest.raises(TrainingError, match=r"All checkpoints in .* are damaged") as caught:
        resumption(work)
    assert len(caught.value.evidence) == 2
    assert "--work" in caught.value.remedy


def test_a_checkpoint_whose_best_one_is_damaged_is_not_gone_on_from(work: Path) -> None:
    last, before = newest(work)
    state = json.loads((last / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = f"/elsewhere/{before.name}"
    (last / "trainer_state.json").write_text(json.dumps(state))
    restamp(last, "trainer_state.json")
    (before / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(TrainingError, match="are damaged") as caught:
        resumption(work)
    assert any(f"the best checkpoint so far, {before.name}, is damaged" in line for line in caught.value.evidence)


def test_the_best_of_the_one_before_is_kept_though_the_newest_has_another(work: Path) -> None:
    """Going on from the one before ends with its best, if none is better."""
    last, before = newest(work)
    for step, best in ((90, before), (91, before), (92, None)):
        path = Path(shutil.copytree(last, work / f"checkpoint-{step}"))
        state = json.loads((path / "trainer_state.json").read_text())
        state["best_model_checkpoint"] = str(best or path)
        (path / "trainer_state.json").write_text(json.dumps(state))
        restamp(path, "trainer_state.json")
    (work / "checkpoint-80").mkdir()  # not finished
    prune(work)
    assert {path.name for path in work.glob("checkpoint-*")} == {"checkpoint-92", "checkpoint-91", before.name}
    (work / "checkpoint-92" / "optimizer.pt").write_bytes(b"")
    found = resumption(work)
    assert found is not None
    assert found.checkpoint.name == "checkpoint-91"


def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_result(
    trained: tuple[Recipe, Path], work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, directory = trained
    last, before = newest(work)
    (last / "trainer_state.json").write_text("{")
    train(recipe, tmp_path / "out", work=work, resume=True)
    message = capsys.readouterr().out
    assert f"{last.name} is damaged: trainer_state.json has changed since it was written (1 bytes)" in message
    assert f"Training resumes from {before.name}" in message
    assert "as before" in message, "the threads of the run until then"
    assert (work / f"damaged-{last.name}").is_dir()
    for file in ("projector.safetensors", "slm/model.safetensors"):
        whole, resumed = load_file(directory / "out" / file), load_file(tmp_path / "out" / file)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_an_optimizer_of_other_settings_is_no_raw_error(
    trained: tuple[Recipe, Path], work: Path, tmp_path: Path
) -> None:
    last, _ = newest(work)
    torch.save({"state": {}, "param_groups": []}, last / "optimizer.pt")
    restamp(last, "optimizer.pt")
    recipe = changed(trained[0], training={"epochs": 3})
    with pytest.raises(TrainingError, match="the optimizer's state"):
        train(recipe, tmp_path / "out", work=work, resume=True)


def test_a_checkpoint_without_its_marker_was_not_finished(work: Path) -> None:
    last, before = newest(work)
    (last / COMPLETE_FILE).unlink()
    assert last_checkpoint(work) == before
    (before / COMPLETE_FILE).unlink()
    assert last_checkpoint(work) is resumption(work) is None


def test_what_a_killed_run_left_while_it_marked_a_checkpoint_is_no_obstacle(
    trained: tuple[Recipe, Path], work: Path, tmp_path: Path
) -> None:
    last, _ = newest(work)
    (last / COMPLETE_FILE).unlink()
    left = last / f".{COMPLETE_FILE}.partial-0123456789abcdef"
    left.mkdir()
    (left / "lock").touch()
    (left / "new").write_text("{")
    train(trained[0], tmp_path / "out", work=work, resume=True)
    assert (tmp_path / "out" / "training.json").is_file()
    assert not left.exists()


def test_what_came_into_a_checkpoint_is_kept_when_the_checkpoint_is_not(work: Path) -> None:
    last, before = newest(work)
    for step in (90, 91, 92):
        shutil.copytree(last, work / f"checkpoint-{step}")
    (before / "notes.txt").write_text("mine")
    (work / "checkpoint-80").symlink_to(tmp := work / "elsewhere")
    tmp.mkdir()
    for checkpoint in work.glob("checkpoint-9?"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        state["best_model_checkpoint"] = str(checkpoint)
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.warns(RuntimeWarning, match="is kept as kept-checkpoint-") as warned:
        prune(work)
    assert any("notes.txt is no part of it" in str(warning.message) for warning in warned)
    assert {path.name for path in work.glob("checkpoint-*")} == {"checkpoint-92", "checkpoint-91"}
    assert (work / f"kept-{before.name}" / "notes.txt").read_text() == "mine"
    assert (work / "kept-checkpoint-80").is_symlink()
    assert tmp.is_dir()


def test_damaged_checkpoints_do_not_take_each_others_place(work: Path) -> None:
    last, before = newest(work)
    (work / f"damaged-{last.name}").mkdir()
    (work / f"damaged-{last.name}" / "holiday.jpg").touch()
    assert set_aside(last).name == f"damaged-{last.name}-2"
    assert (work / f"damaged-{last.name}" / "holiday.jpg").exists()
    assert set_aside(before).name == f"damaged-{before.name}"


def test_a_second_run_in_one_directory_of_checkpoints_is_refused(
    trained: tuple[Recipe, Path], work: Path, tmp_path: Path
) -> None:
    with occupied(work), pytest.raises(UsageError, match="Another process trains in"):
        train(trained[0], tmp_path / "out", work=work, resume=True)
    assert not (tmp_path / "out").exists()


def test_nothing_to_resume_is_said(trained: tuple[Recipe, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no complete checkpoint"):
        train(trained[0], tmp_path / "out", resume=True)


def test_the_threads_are_recorded(trained: tuple[Recipe, Path]) -> None:
    record = json.loads((trained[1] / "out" / "training.json").read_text())
    found = resumption(trained[1] / "out.work")
    assert found is not None
    assert record["hardware"]["torch_threads"] == found.torch_threads >= 1  # as many as cores were free


def test_what_is_shipped_names_no_place_of_this_machine(trained: tuple[Recipe, Path]) -> None:
    texts = {
        path.name: path.read_text(encoding="utf-8", errors="replace")
        for path in (trained[1] / "out").rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    }
    assert {"training.json", "composition.json", "config.json"} <= texts.keys()
    for place in (str(trained[1]), str(trained[1].parent), str(Path.home()) + os.sep, str(Path.cwd())):
        assert [name for name, text in texts.items() if place in text] == [], place


def test_paths_of_a_recipe_lose_what_is_above_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {
        "llm": {"model": str(tmp_path / "models" / "big"), "tokenizer": "/home/somebody/big", "revision": None},
        "prompt_template": "/translate {prompt}",
        "training": {"data": {"train": "data/train.tsv", "validation": f"{tmp_path}/../x/validation.tsv", "n": 1}},
    }
    assert without_absolute_paths(fields) == {
        "llm": {"model": "models/big", "tokenizer": "…/big", "revision": None},
        "prompt_template": "/translate {prompt}",
        "training": {"data": {"train": "data/train.tsv", "validation": "…/validation.tsv", "n": 1}},
    }
    assert without_absolute_paths(None) is None
