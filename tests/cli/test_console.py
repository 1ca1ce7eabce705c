"""Tables: as wide as the terminal, and without one tabs between cells that are whole."""

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

from llm2slm_export.cli import console

ROWS = [("a", "one two three " * 20, "1"), ("b\tc\nd", "中" * 70, "22"), ("x" * 90, "", "333")]


def shown(table: console.Table, *, width: int | None) -> list[str]:
    to = io.StringIO()
    if width is None:
        console = Console(file=to, markup=False, highlight=False, force_terminal=False, soft_wrap=True)
    else:
        console = Console(
            file=to,
            markup=False,
            highlight=False,
            force_terminal=True,
            color_system=None,
            width=width,
            legacy_windows=False,
        )
    console.print(table)
    return to.getvalue().removesuffix("\n").split("\n")


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("columns", [("name", "what it is", "count"), None])
def test_a_table_fits_the_terminal(width: int, columns: tuple[str, ...] | None) -> None:
    lines = shown(console.Table("Title " * 9, columns, ROWS, right=(2,)), width=width)
    assert max(map(cell_len, lines)) <= width
    assert "three" in "".join(lines)


def test_without_a_terminal_cells_are_whole_and_nothing_is_padded() -> None:
    assert shown(console.Table("Title", ("name", "what", "n"), ROWS, right=(2,)), width=None) == [
        "Title", "name\twhat\tn", f"a\t{ROWS[0][1]}\t1", f"b\\tc\\nd\t{'中' * 70}\t22", f"{'x' * 90}\t\t333",
    ]  # fmt: skip
    assert shown(console.Table(None, None, [("a", 1)]), width=None) == ["a\t1"]
    assert shown(console.Table(None, ("a",), []), width=None) == ["a"]


def test_a_command_takes_the_width_of_its_terminal_and_of_no_pipe() -> None:
    command = [sys.executable, "-m", "llm2slm_export", "recipes", "ls"]
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "\t" in piped
    assert not any(line != line.rstrip(" ") or "   " in line for line in piped.splitlines())
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command, stdout=follower, stderr=follower, env=os.environ | {"COLUMNS": "50", "TERM": "dumb"}
    )
    os.close(follower)
    drawn = b""
    try:
        while part := os.read(leader, 65536):
            drawn += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0
    lines = drawn.decode().replace("\r", "").splitlines()
    assert max(map(cell_len, lines)) <= 50
    assert len(lines) > 4
