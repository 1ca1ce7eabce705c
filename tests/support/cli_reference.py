"""The command line's reference, docs/cli.md: `python -m tests.support.cli_reference` writes it."""

from collections.abc import Iterator
from typing import Any

import typer
from typer.testing import CliRunner

from llm2slm_export.cli.app import app
from tests.support.paths import REPOSITORY

PATH = REPOSITORY / "docs" / "cli.md"
ROOT: Any = typer.main.get_command(app)
_HEAD = """# Command line

The help of every command, as `--help` prints it. Values in angle brackets are types or choices.
"""


def commands(group: Any = ROOT, *names: str) -> Iterator[tuple[str, ...]]:
    """The names that lead to a group and to every command in it."""
    yield names
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)


def help_of(names: tuple[str, ...], width: int = 80) -> list[str]:
    """The lines of a command's help in a terminal of `width` columns."""
    result = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": str(width)}, prog_name="llm2slm-export")
    assert result.exit_code == 0
    return result.stdout.splitlines()


def reference() -> str:
    """The text of docs/cli.md."""
    sections = [_HEAD]
    for names in commands():
        title = " ".join(("llm2slm-export", *names))
        sections.append(f"## {title}\n\n```text\n" + "\n".join(help_of(names)).strip("\n") + "\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
