"""`train`: train the pair of a recipe, or one of its models."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llm2slm_export.authoring.pair_sources import run_directory
from llm2slm_export.cli import console
from llm2slm_export.cli.exit_codes import full_disk
from llm2slm_export.cli.help import OUTPUT, RUNTIME, TRAINING
from llm2slm_export.cli.options import ForceOption, JsonOption, PromptFieldOption, RecipeArgument, ResponseFieldOption
from llm2slm_export.cli.resources import peak_memory_mb
from llm2slm_export.cli.terminal import stdout_to_stderr
from llm2slm_export.errors import UsageError, require_extra

TRAIN_MODULES = ("torch", "transformers", "datasets", "accelerate")
EXAMPLES = """
llm2slm-export train tatoeba-en-fr --only llm
llm2slm-export train tatoeba-en-fr training.epochs=5
llm2slm-export train debian-synopsis --teacher --resume
"""


def train(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe keys with other values, such as training.epochs=5."),
    ] = None,
    prompt_field: PromptFieldOption = None,
    response_field: ResponseFieldOption = None,
    only: Annotated[
        Literal["llm", "slm", "slm-alone"] | None,
        typer.Option(
            rich_help_panel=TRAINING,
            help="Train one model by itself: llm, slm, or slm-alone, the pair's SLM without the LLM as a baseline.",
        ),
    ] = None,
    teacher: Annotated[
        bool,
        typer.Option(
            "--teacher",
            rich_help_panel=TRAINING,
            help="Train on the LLM's own responses: sequence-level distillation, with the recipe's training.teacher.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=TRAINING, help="Resume from the newest complete checkpoint.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=RUNTIME, help="Number of torch's CPU threads (default: the number of free cores)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=OUTPUT,
            help="Directory to write to (default: runs/<name>/pair, or runs/<name>/<model> with --only).",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=OUTPUT, help="Directory of checkpoints (default: <out>.work)."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=OUTPUT,
            help="Directory of hidden states and LLM responses that runs share (default: cache, beside --out).",
        ),
    ] = None,
    weights_dtype: Annotated[
        Literal["float32", "float16"], typer.Option(rich_help_panel=OUTPUT, help="Data type of the weights written.")
    ] = "float32",
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Train a recipe's pair, or one of its models.

    The projector and the SLM are trained, and the LLM stays frozen. The result is a composition, which `build` exports.
    """
    require_extra("train", *TRAIN_MODULES, purpose="Training")
    if teacher and only == "llm":
        raise UsageError(
            "--teacher does not go with --only llm: an LLM is not its own teacher.", remedy="leave one out"
        )
    from llm2slm_export.authoring.recipe import with_fields, with_teacher
    from llm2slm_export.authoring.recipe_file import load_recipe

    loaded = with_fields(load_recipe(recipe, overrides or []), prompt_field, response_field)
    if teacher:
        loaded = with_teacher(loaded)
    from llm2slm_export.authoring.training.inputs import refuse_missing

    refuse_missing(loaded, only or "pair", recipe)  # before torch is loaded
    default = run_directory(loaded.name, only or "pair")
    target = out or default
    human = console.console(stderr=json)
    with full_disk(target), stdout_to_stderr(json), console.WorkLog(human) as log:
        import torch

        from llm2slm_export.authoring.training.train import train as run_training

        result = run_training(
            loaded, target, part=only or "pair", work=work, cache=cache, resume=resume, force=force,
            weights_dtype=getattr(torch, weights_dtype), threads=threads, progress=log,
        )  # fmt: skip
    if not result.is_main_process:
        return
    if json:
        console.print_json(
            {
                "directory": str(target),
                "metrics": result.metrics,
                "seconds": result.seconds,
                "peak_rss_mb": peak_memory_mb(),
            }
        )
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    human.print(f"{target} is written: {metrics}, {result.seconds:.0f} s.")
    from llm2slm_export.cli.next_command import after_training

    human.print(f"Next: llm2slm-export {after_training(recipe, loaded, only or 'pair', target)}", soft_wrap=True)
