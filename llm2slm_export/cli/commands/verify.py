"""`verify`: check a bundle's hashes, and compare it with its composition."""

from pathlib import Path
from typing import Annotated

import typer

from llm2slm_export.cli import console
from llm2slm_export.cli.export_options import BUILD_MODULES, parse_gate
from llm2slm_export.cli.help import COMPARISON, RUNTIME
from llm2slm_export.cli.options import BundleArgument, GateOption, JsonOption, MaxDifferingOption, PromptFieldOption
from llm2slm_export.cli.prompt_fields import prompts_of, refuse_unused_field
from llm2slm_export.cli.terminal import stdout_to_stderr
from llm2slm_export.errors import UsageError, require_extra

EXAMPLES = """
llm2slm-export verify engines/demo
llm2slm-export verify engines/demo --composition compositions/tatoeba-en-fr
"""


def verify(
    bundle: BundleArgument,
    composition: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=COMPARISON,
            help="Composition to compare the outputs with (default: none, only hashes are checked).",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=COMPARISON, help="Head that the composition belongs to (default: the bundle's first)."
        ),
    ] = None,
    gate: GateOption = None,
    max_differing: MaxDifferingOption = None,
    prompt_field: PromptFieldOption = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="R|GRAPH=R,…",
            rich_help_panel=RUNTIME,
            help="Runtime of the graphs that are compared, given as `run --runtime` is (default: onnxruntime).",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a bundle's hashes, and its outputs against a composition's."""
    needing = {"head": head, "gate": gate, "max-differing": max_differing, "runtime": runtime}
    alone = [f"--{name} {value}" for name, value in needing.items() if value is not None]
    if alone and composition is None:
        raise UsageError(
            f"{' and '.join(alone)} go{'es' if len(alone) == 1 else ''} with --composition.",
            remedy="add --composition DIR, or leave it out",
        )
    from llm2slm_export.authoring.training_record import read_record

    refuse_unused_field(prompt_field, "--gate", gate)
    held_out = prompts_of("--gate", gate, prompt_field, read_record(composition) if composition is not None else None)
    if composition is not None:
        require_extra("build", *BUILD_MODULES, purpose="`verify --composition`")
    from llm2slm_export.bundle.bundle import open_bundle

    files = open_bundle(bundle).manifest.files
    report = None
    if composition is not None:
        from llm2slm_export.authoring.parity.verify import verify as compare

        with stdout_to_stderr(json):
            report = compare(
                bundle, composition, head, gate=parse_gate(held_out, max_differing), runtime=runtime or "onnxruntime"
            )
    human = console.console(stderr=json)
    human.print(f"{bundle}: {len(files)} files, {console.size(sum(file.bytes for file in files))}, hashes match.")
    if report is not None:
        human.print(console.parity_table(report.rows))
        human.print("Parity passed." if report.passed else "Parity FAILED.")
    else:
        human.print("Only hashes were checked; --composition DIR compares the outputs too.")
    if json:
        parity = None if report is None else report.model_dump(mode="json") | {"passed": report.passed}
        console.print_json({"bundle": str(bundle), "files": len(files), "hashes": True, "parity": parity})
    if report is not None and not report.passed:
        raise typer.Exit(1)
