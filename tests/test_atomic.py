"""Directories that appear whole or not at all."""

from pathlib import Path

import pytest

from llm2slm_export.atomic import replaced_directory
from llm2slm_export.errors import UsageError


def test_a_directory_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "out", force=False) as directory:
        (directory / "file").write_text("new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def fail_while_writing(target: Path) -> None:
    with replaced_directory(target, force=True) as directory:
        (directory / "file").write_text("half")
        raise OSError(28, "No space left on device")


def test_a_failed_block_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(OSError, match="No space"):
        fail_while_writing(target)
    assert (target / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_and_its_absence_refuses(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("old", "new"):
        with replaced_directory(target, force=text == "new") as directory:
            (directory / "file").write_text(text)
    assert (target / "file").read_text() == "new"
    with pytest.raises(UsageError, match="--force"), replaced_directory(target, force=False):
        raise AssertionError("the block must not run")


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-abc").mkdir()
    with replaced_directory(tmp_path / "out", force=False) as directory:
        (directory / "file").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
