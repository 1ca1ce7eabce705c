"""The end of every command: a message and an exit code, whatever was raised, whatever the standard streams are."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from llm2slm_export.cli import console, terminal
from llm2slm_export.cli.exit_codes import Commands
from tests.support.paths import DEMO

COMMAND = [sys.executable, "-m", "llm2slm_export"]


class PanicException(BaseException):
    """As Rust's libraries raise it: no Exception."""


def app_that(does: Callable[[], None]) -> typer.Typer:
    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command("one")(does)
    app.command("two")(lambda: None)
    return app


def raising(error: BaseException) -> typer.Typer:
    def fail() -> None:
        raise error

    return app_that(fail)


def command(*arguments: str, environment: dict[str, str] | None = None, shell: str = "") -> tuple[int, str, str]:
    """A command in a process of its own, with redirections of the shell."""
    if shell:
        quoted = " ".join(f"'{part}'" for part in (*COMMAND, *arguments))
        run = subprocess.run(["bash", "-c", f"{quoted} {shell}"], capture_output=True, check=False, timeout=120)
    else:
        run = subprocess.run(
            [*COMMAND, *arguments], env=os.environ | (environment or {}), capture_output=True, check=False, timeout=120
        )
    return run.returncode, run.stdout.decode(), run.stderr.decode()


def test_a_warning_is_its_text_without_the_place_in_the_code(tmp_path: Path) -> None:
    run = ("run", str(DEMO), "How are you?", "--cache", str(tmp_path / "kept"))
    assert command(*run)[0] == 0
    (kept,) = (tmp_path / "kept").glob("*.safetensors")
    kept.write_bytes(b"damaged")
    code, out, err = command(*run)
    assert (code, out) == (0, "Comment vas-tu ?\n")
    (line,) = (line for line in err.splitlines() if "it is removed" in line)
    assert line.startswith("Warning: ")
    assert kept.name in line
    assert ".py:" not in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ZeroDivisionError(), "An unexpected ZeroDivisionError."),
        (ValueError("\n  first line  \nsecond line"), "An unexpected ValueError: first line\n"),
        (ValueError("x" * 5000), "x…\n"),
        (PanicException("called `Option::unwrap()`"), "An unexpected PanicException: called `Option::unwrap()`"),
        (RecursionError("too deep"), "An unexpected RecursionError: too deep"),
        (EOFError("EOF when reading a line"), "An unexpected EOFError: EOF when reading a line"),
    ],
)
def test_what_nobody_expected_is_a_short_message(error: BaseException, message: str) -> None:
    result = CliRunner().invoke(raising(error), ["one"])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "LLM2SLM_TRACEBACK=1" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 800


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "There is not enough memory."),
        (ConnectionResetError(104, "Connection reset by peer"), 1, "Connection reset by peer"),
        (BrokenPipeError(32, "Broken pipe", "/a/fifo"), 1, "Broken pipe: /a/fifo"),
    ],
)
def test_what_the_machine_does_is_no_fault_of_the_program(error: BaseException, code: int, message: str) -> None:
    result = CliRunner().invoke(raising(error), ["one"])
    assert (result.exit_code, message in result.stderr, "unexpected" in result.stderr) == (code, True, False)


def test_a_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2SLM_TRACEBACK", "1")
    result = CliRunner().invoke(raising(ZeroDivisionError("division")), ["one"])
    assert "Traceback (most recent call last)" in result.stderr
    assert "test_exit_codes.py" in result.stderr
    assert result.exit_code == 1


def test_a_message_cannot_steer_the_terminal() -> None:
    result = CliRunner().invoke(raising(ValueError("\x1b]0;title\x07\x9b2J")), ["one"])
    assert "\\x1b]0;title\\x07\\x9b2J" in result.stderr
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_encoding_lacks_are_escaped_and_counted(encoding: str) -> None:
    def say() -> None:
        print("é → 中 😀 \udc80")

    result = CliRunner(charset=encoding).invoke(app_that(say), ["one"])
    kept = "é" if encoding == "latin-1" else "\\xe9"
    assert result.stdout_bytes.decode(encoding) == f"{kept} -> \\u4e2d \\U0001f600 \\udc80\n"
    assert result.exit_code == 0
    assert result.stderr.count("PYTHONIOENCODING=utf-8") == 1
    assert "U+4E2D" in result.stderr


def test_nothing_is_said_where_every_character_is_there() -> None:
    result = CliRunner().invoke(app_that(lambda: print("é → 中 😀")), ["one"])
    assert (result.stdout, result.stderr) == ("é → 中 😀\n", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_json_is_json_in_every_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.prepare()
    console.print_json({"text": "é → 中 😀", "odd": "\ud800"})
    stream.flush()
    assert json.loads(raw.getvalue().decode(encoding)) == {"text": "é → 中 😀", "odd": "\ud800"}


@pytest.mark.parametrize("arguments", [["doctor"], ["inspect", str(DEMO)], ["recipes", "ls"], ["--help"]])
def test_commands_print_in_ascii(arguments: list[str]) -> None:
    code, out, err = command(*arguments, environment={"PYTHONIOENCODING": "ascii", "COLUMNS": "60"})
    assert (code, out.isascii(), err.isascii()) == (0, True, True)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "shell", "code", "message"),
    [
        (["recipes", "ls"], ">/dev/full", 1, "No space left on device"),
        (["inspect", str(DEMO), "--json"], ">/dev/full", 1, "No space left on device"),
        (["--help"], ">/dev/full", 1, "No space left on device"),
        (["recipes", "ls"], ">&-", 1, "Standard output is closed."),
        (["inspect", str(DEMO), "--json"], ">&-", 1, "Standard output is closed."),
        (["run", str(DEMO), "-"], "<&-", 1, "Standard input is closed."),
        (["recipes", "ls"], "1</dev/null", 1, "Bad file descriptor"),
    ],
)
def test_streams_that_are_closed_or_full(arguments: list[str], shell: str, code: int, message: str) -> None:
    found, _, err = command(*arguments, shell=shell)
    assert (found, message in err) == (code, True), err
    assert not {"Traceback", "Exception ignored", "unexpected"} & set(err.replace(":", " ").split()), err
    assert err.count("→") == 1, err


@pytest.mark.parametrize("arguments", [["recipes", "ls"], ["run", "nothing", "x"], ["frobnicate"]])
def test_a_closed_standard_error_changes_no_exit_code_and_no_output(arguments: list[str]) -> None:
    code, out, _ = command(*arguments)
    found, shown, err = command(*arguments, shell="2>&-")
    assert (found, shown, err) == (code, out, "")
