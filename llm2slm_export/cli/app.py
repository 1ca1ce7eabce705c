"""The command line: the app, with its commands. No command's dependencies are imported before it runs."""

import warnings
from typing import Annotated

import typer

from llm2slm_export.cli.commands import recipes
from llm2slm_export.cli.commands.bench import bench
from llm2slm_export.cli.commands.build import build
from llm2slm_export.cli.commands.doctor import doctor
from llm2slm_export.cli.commands.evaluate import evaluate
from llm2slm_export.cli.commands.inspect import inspect
from llm2slm_export.cli.commands.plan import plan
from llm2slm_export.cli.commands.run import run
from llm2slm_export.cli.commands.train import train
from llm2slm_export.cli.commands.verify import verify
from llm2slm_export.cli.exit_codes import Commands
from llm2slm_export.cli.terminal import show_warning

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Join a large language model that reads with a small one that writes, and ship the pair as ONNX graphs.",
)  # fmt: skip
app.command("train")(train)
app.command("build")(build)
app.command("run")(run)
app.command("verify")(verify)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("inspect")(inspect)
app.command("plan")(plan)
app.command("doctor")(doctor)
recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The recipes that come with the package.")
recipes_app.command("ls")(recipes.list_recipes)
recipes_app.command("show")(recipes.show_recipe)
recipes_app.command("cp")(recipes.copy_recipe)
app.add_typer(recipes_app, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        import llm2slm_export

        print(llm2slm_export.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """The entry point `llm2slm-export`."""
    warnings.showwarning = show_warning
    app(prog_name="llm2slm-export")
