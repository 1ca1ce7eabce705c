"""Directories and files that appear whole or not at all, and take the place of nothing but their own kind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llm2slm_export.authoring.artifacts import BUNDLE, TRAINED
from llm2slm_export.errors import Llm2SlmError, UsageError
from llm2slm_export.files import atomic
from llm2slm_export.files.atomic import Replacement, cached_file, clear_abandoned, replaced_directory
from llm2slm_export.files.output_target import Kind, foreign_entries
from llm2slm_export.files.workplace import occupied, scratch
from tests.support.small_bundle import write_small_bundle

# A directory that holds `file` and nothing else.
KIND = Kind("a test's directory", lambda path: foreign_entries(path, lambda name, _: name == "file"))
TEXT = Kind("a note", lambda path: [] if path.read_text().startswith("note") else ["it is not a note"], is_file=True)


def write(
    target: Path, text: str, *, force: bool = False, meanwhile: Callable[[], object] = lambda: None, **options: Any
) -> None:
    with replaced_directory(target, KIND, force=force, **options) as directory:
        (directory / "file").write_text(text)
        meanwhile()


def note(path: Path, text: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    with Replacement(path, TEXT).written() as new:
        new.write_text(text)
        meanwhile()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def tree(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): path.read_text() for path in sorted(directory.rglob("*")) if path.is_file()
    }


@pytest.fixture
def without_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange two names."""
    monkeypatch.setattr(atomic, "_rename", lambda *_: False)


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request: pytest.FixtureRequest) -> None:
    """With and without the exchange of two names."""
    if request.param == "two renames":
        request.getfixturevalue("without_renameat2")


# --- whole, or not at all ------------------------------------------------------------------------------------------


def test_a_directory_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "out", KIND, force=False) as directory:
        (directory / "file").write_text("new")
        assert not (tmp_path / "out").exists()
    assert tree(tmp_path) == {"out/file": "new"}


def fail_while_writing(target: Path) -> None:
    with replaced_directory(target, KIND, force=True) as directory:
        (directory / "file").write_text("half")
        raise OSError(28, "No space left on device")


def test_a_failed_block_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(OSError, match="No space"):
        fail_while_writing(tmp_path / "out")
    assert tree(tmp_path) == {"out/file": "old"}
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("either_way")
def test_force_replaces_and_its_absence_refuses(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "old")
    write(target, "new", force=True)
    assert tree(tmp_path) == {"out/file": "new"}
    assert names(tmp_path) == ["out"]
    with pytest.raises(UsageError, match="--force"), replaced_directory(target, KIND, force=False):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with replaced_directory(tmp_path / "out", KIND, force=False) as directory:
            (directory / "file").write_text("x")
            (directory / "file").chmod(0o600)  # as safetensors leaves what it writes
        with cached_file(tmp_path / "cached") as new:
            new.write_text("x")
        with cached_file(tmp_path / "private", private=True) as new:
            new.write_text("x")
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in [*tmp_path.iterdir(), tmp_path / "out" / "file"]}
    assert found == {"out": mode, "file": mode & 0o666, "cached": mode & 0o666, "private": 0o600}


# --- nothing but its own kind --------------------------------------------------------------------------------------


def refused(path: Path, *reasons: str, force: bool = True, kind: Kind = KIND, **options: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Replacement(path, kind, force=force, **options)
    for reason in reasons:
        assert reason in "\n".join(caught.value.evidence), str(caught.value)


def test_an_input_is_never_a_target(tmp_path: Path) -> None:
    composition, llm, data = tmp_path / "c", tmp_path / "c" / "llm", tmp_path / "data.jsonl"
    llm.mkdir(parents=True)
    data.touch()
    (tmp_path / "link").symlink_to("c")
    for target in (composition, tmp_path, composition / "new", llm / "deeper" / "new", tmp_path / "c" / ".." / "c"):
        refused(target, "which is read", inputs=[composition, llm, data])
    refused(composition, "it is ", "it holds ", inputs=[tmp_path / "link", llm, tmp_path / "no such model"])
    refused(tmp_path / "link" / "new", "it lies in", inputs=[composition], force=False)
    Replacement(tmp_path / "cc", KIND, inputs=[composition, data])
    Replacement(tmp_path / "data.jsonl.bundle", KIND, inputs=[composition, data])


def test_what_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for make in (
        lambda: (target / "thesis.txt").write_text("years of work"),
        lambda: (target / "photos").mkdir(),
        lambda: (target / "file.bak").symlink_to("file"),
        lambda: os.mkfifo(target / "pipe"),
    ):
        target.mkdir()
        (target / "file").write_text("old")
        make()
        before = names(target)
        refused(target, "is no part of it")
        assert names(target) == before
        target.rename(tmp_path / f"done-{len(names(tmp_path))}")
    target.mkdir()
    for number in range(9):
        (target / f"{number}.jpg").touch()
    refused(target, "0.jpg is no part of it", "and 4 more")


def test_an_empty_directory_is_replaced_with_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        write(tmp_path / "out", "new")
    write(tmp_path / "out", "new", force=True)
    assert tree(tmp_path) == {"out/file": "new"}


def test_places_that_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "home" / "project" / "deep"
    inside.mkdir(parents=True)
    (inside.parent / "file").touch()
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    refused(Path(), "it is the working directory")
    refused(inside, "it is the working directory")
    refused(Path(".."), "it holds the working directory")
    refused(tmp_path / "home", "it is a home directory", "it holds the working directory")
    refused(tmp_path, "it holds home directories", "it holds the working directory")
    refused(Path("/"), "it is the root of the file system", "it holds the working directory")
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    (tmp_path / "repository" / "file").touch()
    refused(tmp_path / "repository", "it is the root of a repository", "is no part of it")
    assert names(tmp_path) == ["home", "repository"]


def test_links_and_files_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    refused(tmp_path / "file", "it is a file")
    refused(tmp_path / "dangling", "it is a link to nowhere")
    refused(tmp_path / "link", "it is a link to")
    refused(tmp_path / "file" / "out", "is not a directory")
    refused(tmp_path / ("x" * 240), "its name has 240 bytes")
    assert names(tmp_path) == ["dangling", "file", "link", "real"]
    write(tmp_path / "link" / "out", "through a link to the parent")
    assert names(tmp_path / "real") == ["out"]


# --- what appears or changes meanwhile -----------------------------------------------------------------------------


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["directory", "empty directory", "file", "link"])
def test_what_appears_meanwhile_is_kept(tmp_path: Path, what: str, force: bool) -> None:
    target = tmp_path / "out"

    def appear() -> None:
        if what == "file":
            target.write_text("mine")
        elif what == "link":
            target.symlink_to("elsewhere")
        else:
            target.mkdir()
            if what == "directory":
                (target / "file").write_text("mine")

    with pytest.raises(Llm2SlmError, match="appeared") as caught:
        write(target, "new", force=force, meanwhile=appear)
    assert str(tmp_path / "out.new") in str(caught.value)
    assert names(tmp_path) == ["out", "out.new"]
    assert (tmp_path / "out.new" / "file").read_text() == "new"
    kept = {"file": target.is_file, "link": target.is_symlink}.get(what, target.is_dir)
    assert kept()
    assert what != "directory" or (target / "file").read_text() == "mine"


@pytest.mark.usefixtures("either_way")
def test_what_changes_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "old")

    def build(change: Callable[[], object]) -> None:
        with pytest.raises(Llm2SlmError, match="changed"):
            write(target, "new", force=True, meanwhile=change)

    build(lambda: (target / "notes.txt").write_text("mine"))
    assert tree(tmp_path) == {"out/file": "old", "out/notes.txt": "mine", "out.new/file": "new"}
    (target / "notes.txt").unlink()
    build(lambda: (target / "file").write_text("edited by hand"))
    assert tree(tmp_path) == {"out/file": "edited by hand", "out.new/file": "new", "out.new-2/file": "new"}
    build(lambda: write(target, "of another build", force=True))
    assert (target / "file").read_text() == "of another build"


@pytest.mark.usefixtures("either_way")
def test_what_changes_in_the_moment_of_exchange_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, swap = tmp_path / "out", atomic._swap
    write(target, "old")

    def late(place: Any, path: Path) -> None:
        (path / "notes.txt").write_text("mine")
        swap(place, path)

    monkeypatch.setattr(atomic, "_swap", late)
    with pytest.raises(Llm2SlmError, match="changed"):
        write(target, "new", force=True)
    assert tree(tmp_path) == {"out/file": "old", "out/notes.txt": "mine", "out.new/file": "new"}


def test_what_disappears_meanwhile_is_no_obstacle(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with replaced_directory(tmp_path / "out", KIND, force=True) as new:
        (new / "file").write_text("new")
        (tmp_path / "out").rename(tmp_path / "moved")
    assert tree(tmp_path) == {"moved/file": "old", "out/file": "new"}


def test_a_failed_exchange_keeps_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    rename = atomic._rename

    def fails(path: Path, target: Path, flags: int) -> bool:
        if flags == atomic._RENAME_EXCHANGE:
            raise OSError(5, "Input/output error")
        return rename(path, target, flags)

    monkeypatch.setattr(atomic, "_rename", fails)
    with pytest.raises(Llm2SlmError, match="Input/output error") as caught:
        write(tmp_path / "out", "new", force=True)
    assert str(tmp_path / "out.new") in str(caught.value)
    assert tree(tmp_path) == {"out/file": "old", "out.new/file": "new"}


# --- several at once, and killed ones ------------------------------------------------------------------------------


def test_builds_to_one_target_do_not_see_each_other(tmp_path: Path) -> None:
    def build_another() -> None:
        (working,) = tmp_path.glob(".out.partial-*")
        write(tmp_path / "out", "second")
        assert (working / "new" / "file").read_text() == "first"

    with pytest.raises(Llm2SlmError, match="appeared"):
        write(tmp_path / "out", "first", meanwhile=build_another)
    assert tree(tmp_path) == {"out/file": "second", "out.new/file": "first"}


WRITER = """
    import os, sys, time
    from pathlib import Path
    from llm2slm_export.files import atomic
    from llm2slm_export.files.output_target import Kind, foreign_entries

    KIND = Kind("a test's directory", lambda path: foreign_entries(path, lambda name, _: name == "file"))
    target, text, stop = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if stop != "exchange":
        atomic._rename = lambda *_: False
    number = 0
    rename = Path.rename

    def counted(self, to):
        global number
        number += 1
        if stop == f"before rename {number}":
            os.kill(os.getpid(), 9)
        return rename(self, to)

    Path.rename = counted
    with atomic.replaced_directory(target, KIND, force=True) as new:
        (new / "file").write_text(text)
        print("written", flush=True)
        if stop == "wait":
            time.sleep(600)
"""


@contextmanager
def writer(target: Path, text: str, stop: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(target), text, stop], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "written\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_leftovers_of_a_killed_run_are_removed_and_those_of_a_running_one_are_not(
    tmp_path: Path, sent: signal.Signals
) -> None:
    write(tmp_path / "out", "old")
    with writer(tmp_path / "out", "never", "wait") as process:
        (working,) = tmp_path.glob(".out.partial-*")
        write(tmp_path / "out", "first", force=True)
        assert (working / "new" / "file").read_text() == "never", "it is being written"
        process.send_signal(sent)
        process.wait()
    assert working.exists()
    write(tmp_path / "out", "second", force=True)
    assert names(tmp_path) == ["out"]
    assert tree(tmp_path) == {"out/file": "second"}


def test_names_are_compared_and_are_no_patterns(tmp_path: Path) -> None:
    with writer(tmp_path / "victim", "x", "wait") as process:
        process.kill()
        process.wait()
    (left,) = names(tmp_path)
    foreign = [".out.partial-notes", ".[ov]*.partial-0123456789abcdef"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    for name in ("*", "v*", "[v]ictim", "?ictim", "out", "[ov]*"):
        write(tmp_path / name, name)
    assert {left, *foreign} < set(names(tmp_path))
    write(tmp_path / "victim", "y")
    assert left not in names(tmp_path)


# Of the renames with which a directory takes the place of another: to `old` and back, the old one aside, the new one there.
@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("next_run", ["succeeds", "fails", "is refused"])
def test_a_kill_between_the_renames_loses_neither(tmp_path: Path, number: int, next_run: str) -> None:
    target = tmp_path / "out"
    write(target, "old")
    with writer(target, "new", f"before rename {number}") as process:
        assert process.wait() == -signal.SIGKILL
    assert target.exists() == (number != 4)

    def run() -> None:
        if next_run == "succeeds":
            write(target, "next", force=True)
        elif next_run == "fails":
            with pytest.raises(OSError, match="No space"):
                fail_while_writing(target)
        else:
            with pytest.raises(UsageError, match="exists already"):
                write(target, "next")

    if number == 4:
        with pytest.warns(RuntimeWarning, match="has been restored: replacing it was interrupted"):
            run()
    else:
        run()
    assert tree(tmp_path) == {"out/file": "next" if next_run == "succeeds" else "old"}
    assert names(tmp_path) == ["out"]


def test_what_was_set_aside_and_is_foreign_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "old")
    with writer(target, "new", "before rename 4") as process:
        process.wait()
    (aside,) = tmp_path.glob(".out.partial-*/old")
    (aside / "notes.txt").write_text("mine")
    target.mkdir()
    (target / "file").write_text("made meanwhile")
    with pytest.warns(RuntimeWarning, match=r"out\.old"):
        write(target, "next", force=True)
    assert tree(tmp_path) == {"out/file": "next", "out.old/file": "old", "out.old/notes.txt": "mine"}


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_way")
def test_a_file_replaces_its_own_kind_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    for text in ("note 1", "note 2"):
        note(path, text)
    assert tree(tmp_path) == {"deep/a.txt": "note 2"}
    path.write_text("a thesis")
    refused(path, "it is not a note", kind=TEXT)
    refused(path.parent, "it is a directory", kind=TEXT)
    (tmp_path / "link").symlink_to(path)
    refused(tmp_path / "link", "it is not a note", kind=TEXT)
    path.write_text("note 3")
    note(tmp_path / "link", "note 4")
    assert (tmp_path / "link").is_symlink()
    assert path.read_text() == "note 4"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.usefixtures("either_way")
def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(Llm2SlmError, match="appeared"):
        note(path, "note", meanwhile=lambda: path.write_text("mine"))
    assert tree(tmp_path) == {"a.txt": "mine", "a.txt.new": "note"}


def test_leftovers_of_cached_files_are_removed_by_name(tmp_path: Path) -> None:
    def left(name: str) -> Path:
        place = tmp_path / f".{name}.partial-{len(names(tmp_path)):016x}"
        place.mkdir()
        (place / "lock").touch()
        (place / "new").write_text("half")
        return place

    mine, other = left("a"), left("b")
    with cached_file(tmp_path / "a") as new:
        new.write_text("whole")
    assert (mine.exists(), other.exists()) == (False, True)
    clear_abandoned(tmp_path, lambda name: name == "b")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("removed", range(14))
def test_a_run_killed_while_it_removes_what_was_replaced_leaves_nothing_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """And half of a bundle is not taken for something foreign."""
    source = tmp_path / "source"
    write_small_bundle(source)

    def build() -> None:
        with replaced_directory(tmp_path / "site" / "out", BUNDLE, force=True) as new:
            shutil.copytree(source, new, dirs_exist_ok=True)

    build()
    left = removed
    with monkeypatch.context() as patched:
        for name in ("unlink", "rmdir"):
            call = getattr(os, name)

            def counted(*args: Any, call: Any = call, **options: Any) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError(5, "as of a dead process, nothing more is removed")
                call(*args, **options)

            patched.setattr(os, name, counted)
        build()
    build()
    assert names(tmp_path / "site") == ["out"]
    assert tree(tmp_path / "site" / "out") == tree(source)


def test_one_process_at_a_time_has_a_directory(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "work"
    with occupied(place):
        with pytest.raises(BlockingIOError), occupied(place):
            raise AssertionError("the block must not run")
        assert place.is_dir()
    assert names(tmp_path) == [], "it stayed empty"
    (tmp_path / "own").mkdir()
    with occupied(tmp_path / "own"):
        pass
    assert names(tmp_path) == ["own"]
    with occupied(place):
        (place / "file").touch()
    with occupied(place):
        assert names(place) == ["file"]


def test_scratch_is_removed_and_so_is_that_of_a_killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2slm_export.files.workplace.gettempdir", lambda: str(tmp_path))
    left = tmp_path / ".llm2slm-export.partial-0123456789abcdef"
    left.mkdir()
    (left / "lock").touch()
    with scratch() as directory:
        (directory / "model.onnx").touch()
        with scratch() as other:
            assert other != directory
        assert names(directory) == ["model.onnx"]
        assert not left.exists()
    assert names(tmp_path) == []


# --- what the commands write ---------------------------------------------------------------------------------------


def test_a_bundle_is_what_its_manifest_lists(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    write_small_bundle(target)
    (target / "notes").mkdir()
    refused(target, "notes/ is no part of it", kind=BUNDLE)
    (target / "notes").rmdir()
    Replacement(target, BUNDLE, force=True)
    manifest = target / "manifest.json"
    for older in ({"schema_version": 1}, {"schema_version": 99}, {"fields of another release": 1}):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | older))
        Replacement(target, BUNDLE, force=True)
    (target / "README.md").write_text("written by hand")
    refused(target, "README.md is no part of it", kind=BUNDLE)
    (target / "README.md").unlink()
    for text in ('{"format": "llm2slm-bundle"}', '{"format": "llm2slm-bundle", "files": [1, {"path": 2}, {}]}'):
        manifest.write_text(text)
        refused(target, "encoder.onnx is no part of it", kind=BUNDLE)
    for text in ("{}", "[]", "no JSON", '{"format": "llm2slm-composition"}', "[" * 100_000):
        manifest.write_text(text)
        refused(target, "it is not a bundle", kind=BUNDLE)
    manifest.unlink()
    refused(target, "it is not a bundle", kind=BUNDLE)


def test_what_train_wrote_is_what_training_json_lists(tmp_path: Path) -> None:
    target = tmp_path / "pair"
    (target / "slm").mkdir(parents=True)
    for name in ("composition.json", "projector.safetensors", "slm/model.safetensors", "slm/tokenizer.json"):
        (target / name).touch()
    refused(target, "it is not an output of `train`", kind=TRAINED)  # a composition made by hand
    training = target / "training.json"
    training.write_text('{"recipe": {}}')  # of a run before files were listed
    Replacement(target, TRAINED, force=True)
    for name in ("README.md", "slm/notes.txt", "model.bin"):
        (target / name).touch()
        refused(target, f"{name} is no part of it", kind=TRAINED)
        (target / name).unlink()
    listed = ["composition.json", "projector.safetensors", "slm/model.safetensors"]
    training.write_text(json.dumps({"recipe": {}, "files": listed}))
    refused(target, "slm/tokenizer.json is no part of it", kind=TRAINED)
    training.write_text(json.dumps({"recipe": {}, "files": [*listed, "slm/tokenizer.json"]}))
    Replacement(target, TRAINED, force=True)
    (target / "llm").mkdir()
    refused(target, "llm/ is no part of it", kind=TRAINED)
    write_small_bundle(tmp_path / "bundle")
    refused(tmp_path / "bundle", "it is not an output of `train`", kind=TRAINED)
