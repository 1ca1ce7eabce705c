"""The help of a command: its options in groups, its examples, and no line over 80 columns. rich is not loaded for it."""

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

INPUT = "Input"
DATA = "Data"
MODELS = "Models"
TRAINING = "Training"
QUANTIZATION = "Quantization"
ENGINES = "TensorRT engines"
GENERATION = "Generation"
DRAFTING = "Drafting"
COMPARISON = "Comparison"
TIMING = "Timing"
NETWORK = "Network"
LIMITS = "Limits"
RUNTIME = "Runtime"
OUTPUT = "Output"
OTHER = "Other"


_HYPHEN = "\u2011"  # one at which no line is broken


class HelpCommand(TyperCommand):
    """A command whose help has a section for each `rich_help_panel`, and its epilog as examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each group of options in the order in which the command has them."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                names, text = record
                # Without this, the name of an option could be broken at its hyphens.
                sentence = _with_facts_in_the_sentence(text).replace("-", _HYPHEN)
                groups.setdefault(_group(parameter), []).append((names, sentence))
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl(rows, col_max=26)
        formatter.buffer[:] = (part.replace(_HYPHEN, "-") for part in formatter.buffer)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        del ctx
        _write_examples(self.epilog, formatter)


class HelpGroup(TyperGroup):
    """A group of commands whose help has its epilog as examples."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        del ctx
        _write_examples(self.epilog, formatter)


def _write_examples(examples: str | None, formatter: Any) -> None:
    """Write the examples as they are: a command that is wrapped cannot be copied."""
    if examples:
        with formatter.section("Examples"):
            for line in examples.strip().splitlines():
                formatter.write(f"  {line}\n")


def _group(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or OTHER


def _with_facts_in_the_sentence(text: str) -> str:
    """`Prompts to time.  [default: 16]` as `Prompts to time (default: 16).`, the form that other defaults have."""
    sentence, found, facts = text.partition("  [")
    if not found:
        return text
    facts = facts.removesuffix("]")
    if sentence.endswith(")."):
        return f"{sentence[:-2]}; {facts})."
    return f"{re.sub(r'[.]$', '', sentence)} ({facts})."
