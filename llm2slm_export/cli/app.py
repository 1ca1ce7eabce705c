"""The command line: the app, with its commands. No command's dependencies are imported before it runs."""

import warnings
from typing import Annotated

import typer

from llm2slm_export.cli.commands import (
    batch,
    bench,
    build,
    doctor,
    evaluate,
    inspect,
    plan,
    recipes,
    run,
    serve,
    train,
    verify,
)
from llm2slm_export.cli.exit_codes import Commands
from llm2slm_export.cli.help import HelpCommand, HelpGroup
from llm2slm_export.cli.terminal import show_warning

EXAMPLES = """
llm2slm-export run engines/demo "How are you?"
llm2slm-export build --composition compositions/tatoeba-en-fr
llm2slm-export run --help
"""


class _Program(HelpGroup, Commands):
    """The commands, with examples in the help, and a message and an exit code at the end of each."""


app = typer.Typer(
    cls=_Program, epilog=EXAMPLES, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Join a large language model that encodes the prompt with a small one that generates the response, and run the pair "
    "as ONNX graphs.",
)  # fmt: skip
app.command("train", cls=HelpCommand, epilog=train.EXAMPLES)(train.train)
app.command("build", cls=HelpCommand, epilog=build.EXAMPLES)(build.build)
app.command("run", cls=HelpCommand, epilog=run.EXAMPLES)(run.run)
app.command("batch", cls=HelpCommand, epilog=batch.EXAMPLES)(batch.batch)
app.command("serve", cls=HelpCommand, epilog=serve.EXAMPLES)(serve.serve)
app.command("verify", cls=HelpCommand, epilog=verify.EXAMPLES)(verify.verify)
app.command("eval", cls=HelpCommand, epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("bench", cls=HelpCommand, epilog=bench.EXAMPLES)(bench.bench)
app.command("inspect", cls=HelpCommand, epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("plan", cls=HelpCommand, epilog=plan.EXAMPLES)(plan.plan)
app.command("doctor", cls=HelpCommand, epilog=doctor.EXAMPLES)(doctor.doctor)
recipes_app = typer.Typer(
    cls=HelpGroup, epilog=recipes.EXAMPLES, no_args_is_help=True, rich_markup_mode=None,
    help="List, print and copy the recipes that come with the package.",
)  # fmt: skip
recipes_app.command("ls", cls=HelpCommand, epilog=recipes.LIST_EXAMPLES)(recipes.list_recipes)
recipes_app.command("show", cls=HelpCommand, epilog=recipes.SHOW_EXAMPLES)(recipes.show_recipe)
recipes_app.command("cp", cls=HelpCommand, epilog=recipes.COPY_EXAMPLES)(recipes.copy_recipe)
app.add_typer(recipes_app, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        import llm2slm_export

        print(llm2slm_export.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """The entry point `llm2slm-export`."""
    warnings.showwarning = show_warning
    app(prog_name="llm2slm-export")
