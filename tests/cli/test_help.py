"""The help of every command: it fits 80 columns, nothing is cut off, and its examples can be typed."""

import shlex

import pytest
from typer.testing import CliRunner

from llm2slm_export.cli.app import app
from llm2slm_export.cli.help import OTHER
from tests.support.cli_reference import PATH, ROOT, commands, help_of, reference

ALL = list(commands())


def examples_of(names: tuple[str, ...]) -> list[str]:
    lines = help_of(names)
    text = "\n".join(lines[lines.index("Examples:") + 1 :]).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("names", ALL, ids=" ".join)
def test_help_fits_the_terminal_and_nothing_is_cut_off(names: tuple[str, ...]) -> None:
    lines = help_of(names)
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.endswith("...") and not line.startswith("Usage:")] == []
    assert not [line for line in lines if line.endswith("-")], "no name is broken at a hyphen"


@pytest.mark.parametrize("names", ALL, ids=" ".join)
def test_every_command_has_examples_that_parse(names: tuple[str, ...]) -> None:
    examples = examples_of(names)
    assert examples
    for example in examples:
        program, *arguments = shlex.split(example.partition(" < ")[0])
        assert program == "llm2slm-export"
        assert tuple(arguments[: len(names)]) == names
        command, context = ROOT, None
        while arguments and arguments[0] in getattr(command, "commands", {}):
            context = command.make_context(program, [], parent=context, resilient_parsing=True)
            name, *arguments = arguments
            command = command.commands[name]
        assert not hasattr(command, "commands")
        if arguments != ["--help"]:
            command.make_context(program, arguments, parent=context)


@pytest.mark.parametrize("names", [names for names in ALL if len(names) == 1 and names != ("recipes",)], ids=" ".join)
def test_options_are_grouped_and_each_is_explained(names: tuple[str, ...]) -> None:
    command = ROOT.commands[names[0]]
    lines = help_of(names)
    assert lines[lines.index(f"{OTHER}:") + 1].split()[:2] == ["-h,", "--help"]
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert parameter.rich_help_panel
            assert f"{parameter.rich_help_panel}:" in lines
        if parameter.name != "help":
            assert parameter.help[0].isupper()
            assert parameter.help.endswith(".")
            assert not parameter.help.startswith(("Of ", "With ", "What "))


def test_defaults_have_one_form() -> None:
    text = " ".join(" ".join(help_of(("eval",))).split())
    for part in (
        "Number of prompts to time; 0 times nothing (default: 16; x>=0).",
        "Maximum number of new tokens (default: the bundle's; x>=1).",
        "Held-out prompts and responses (.jsonl, .tsv or .csv; required).",
        "Head to use (default: the bundle's first).",
    ):
        assert part in text


@pytest.mark.parametrize(("shell", "words"), [("bash", "llm2slm-export re"), ("zsh", "llm2slm-export re")])
def test_a_shell_completes_commands(shell: str, words: str) -> None:
    environment = {
        "_LLM2SLM_EXPORT_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": words,
    }  # fmt: skip
    result = CliRunner().invoke(app, [], env=environment, prog_name="llm2slm-export")
    assert "recipes" in result.stdout
    assert "Traceback" not in result.output


def test_the_reference_holds_the_help_of_every_command() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "run `python -m tests.support.cli_reference`"
