"""`eval`: score and time a bundle on held-out data."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm2slm_export.cli import console
from llm2slm_export.cli.console import Table, break_even_line
from llm2slm_export.cli.export_options import parse_baseline_precision
from llm2slm_export.cli.help import COMPARISON, DATA, GENERATION, OUTPUT, TIMING
from llm2slm_export.cli.options import (
    BaselineOption,
    BaselinePrecisionOption,
    BundleArgument,
    DeviceOption,
    EvaluatedCompositionOption,
    HeadOption,
    JsonOption,
    PromptFieldOption,
    ResponseFieldOption,
    RuntimeOption,
    ThreadsOption,
    TruncateOption,
    WorkOption,
)
from llm2slm_export.cli.runtime_notes import print_thread_notes
from llm2slm_export.cli.terminal import stdout_to_stderr
from llm2slm_export.errors import require_extra

if TYPE_CHECKING:
    from rich.console import Console

    from llm2slm_export.evaluation.report import EvaluationReport

EVAL_MODULES = ("sacrebleu", "rouge_score", "matplotlib", "jinja2")
EXAMPLES = """
llm2slm-export eval engines/demo --data tests/data/held_out.tsv
llm2slm-export eval engines/demo --data tests/data/held_out.tsv --controls
llm2slm-export eval engines/tatoeba-en-fr --data tests/data/held_out.tsv \\
    --baseline llm --baseline slm --metrics bleu,chrf,loss --html report.html
"""


def evaluate(
    bundle: BundleArgument,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE", rich_help_panel=DATA, help="Held-out prompts and responses (.jsonl, .tsv or .csv)."
        ),
    ],
    prompt_field: PromptFieldOption = None,
    response_field: ResponseFieldOption = None,
    task_field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|N",
            rich_help_panel=DATA,
            help="Key or column of a task's name, for scores by task (default: none).",
        ),
    ] = None,
    train_data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=DATA,
            help="Training data; a held-out prompt that is in it is refused (default: the data named in training.json).",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=DATA, help="Maximum number of prompts (default: all).")
    ] = None,
    head: HeadOption = None,
    truncate: TruncateOption = False,
    composition: EvaluatedCompositionOption = None,
    baseline: BaselineOption = None,
    baseline_precision: BaselinePrecisionOption = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            rich_help_panel=COMPARISON,
            help="Add the controls: no conditioning, zeros, a constant, and another prompt's.",
        ),
    ] = False,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="M,M…", rich_help_panel=COMPARISON, help="Metrics: bleu, chrf, rouge, exact_match or loss."
        ),
    ] = "bleu,chrf",
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            rich_help_panel=COMPARISON,
            help="Random seed of significance tests, confidence intervals and the constant control.",
        ),
    ] = 0,
    num_beams: Annotated[
        int, typer.Option(min=1, rich_help_panel=GENERATION, help="Number of beams of every system.")
    ] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=GENERATION, help="Maximum number of new tokens (default: the bundle's)."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, rich_help_panel=GENERATION, help="Number of prompts in a batch, for scoring.")
    ] = 32,
    speed_prompts: Annotated[
        int, typer.Option(min=0, rich_help_panel=TIMING, help="Number of prompts to time; 0 times nothing.")
    ] = 16,
    speed_tokens: Annotated[
        int, typer.Option(min=2, rich_help_panel=TIMING, help="Response length, in tokens, for the time per token.")
    ] = 64,
    speed_rounds: Annotated[int, typer.Option(min=1, rich_help_panel=TIMING, help="Number of rounds to time.")] = 5,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    runtime: RuntimeOption = "onnxruntime",
    work: WorkOption = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=OUTPUT,
            help="HTML page with plots to write, which opens offline. An earlier page is replaced, no other file.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score and time a bundle on held-out data, beside baselines.

    The baselines are the LLM by itself, the SLM by itself and other bundles. Scores have confidence intervals and paired
    significance tests.
    """
    require_extra("eval", *EVAL_MODULES, purpose="`eval`")
    from llm2slm_export.authoring.training_record import fields_of, record_of
    from llm2slm_export.bundle.manifest_file import read_manifest
    from llm2slm_export.evaluation.compared_systems import EvaluationRequest
    from llm2slm_export.evaluation.evaluate import EvaluationSettings
    from llm2slm_export.evaluation.evaluate import evaluate as run_evaluation
    from llm2slm_export.evaluation.metrics import parse_metrics
    from llm2slm_export.files.data_files import require_file, spelled_field

    manifest = read_manifest(bundle)
    require_file(data, "--data")
    given = {"prompt": prompt_field, "response": response_field}
    record = None if prompt_field and response_field else record_of(manifest.name, composition)
    fields, origin = fields_of(data, given, record)
    settings = EvaluationSettings(
        data, fields["prompt"], fields["response"], None if task_field is None else spelled_field(task_field, data), origin,
        rows=rows, metrics=parse_metrics(metrics), num_beams=num_beams, max_new_tokens=max_new_tokens,
        batch_size=batch_size, truncate=truncate, speed_prompts=speed_prompts, speed_tokens=speed_tokens,
        speed_rounds=speed_rounds, seed=seed,
    )  # fmt: skip
    request = EvaluationRequest(
        bundle, head, composition, tuple(baseline or ()), controls, train_data, given, device, print_thread_notes(threads), runtime,
        work or Path("runs") / manifest.name / "eval", seed, parse_baseline_precision(baseline_precision),
    )  # fmt: skip
    from llm2slm_export.evaluation.html_report import PAGE, page
    from llm2slm_export.files.atomic import Replacement

    drawn = None if html is None else Replacement(html, PAGE, inputs=[bundle], option="--html")
    human = console.console(stderr=json)
    with stdout_to_stderr(json), console.WorkLog(human) as log:
        report = run_evaluation(request, settings, log)
    print_evaluation(human, report)
    if json:
        console.print_json(report.model_dump(mode="json"))
    if drawn is not None:
        with drawn.written() as new:
            new.write_text(page(report), encoding="utf-8")
        human.print(f"{html} is written.")
    from llm2slm_export.cli.next_command import after_evaluation

    after = after_evaluation(request, data, {"prompt": prompt_field, "response": response_field}, report.composition)
    human.print(f"Next: llm2slm-export {after}", soft_wrap=True)


def print_evaluation(to: "Console", report: "EvaluationReport") -> None:
    """Print an evaluation as tables."""
    systems = (
        (
            system.name, system.description, f"{system.parameters / 1e6:.1f} M", f"{system.length_ratio:.2f}",
            f"{100 * system.unfinished:.1f} %", system.truncated,
        )
        for system in report.systems
    )  # fmt: skip
    columns = ("system", "description", "parameters", "length", "cut at the limit", "prompts cut")
    to.print(Table(f"{report.data.examples} prompts", columns, systems, right=(2, 3, 4, 5)))
    for metric in report.pair.scores:
        scores = (
            (system.name, f"{found.value:.2f}", f"{found.low:.2f} – {found.high:.2f}", _p(found.p))
            for system in report.systems
            for found in [system.scores[metric]]
        )
        to.print()
        to.print(Table(metric, ("system", "value", "95 % interval", "p against the pair"), scores, right=(1, 2, 3)))
    for metric, share in report.gap_recovered.items():
        to.print(f"{metric}: the pair covers {100 * share:.0f} % of the way from the SLM alone to the LLM alone.")
    if report.data.tasks:
        tasks = report.data.tasks
        for metric in report.pair.tasks[next(iter(tasks))]:
            by_task = ((s.name, *(f"{s.tasks[task][metric]:.2f}" for task in tasks)) for s in report.systems)
            to.print()
            to.print(Table(f"{metric} by task", ("system", *tasks), by_task, right=range(1, len(tasks) + 1)))
    timed = [system for system in report.systems if system.speed is not None]
    if timed:
        to.print()
        to.print(_speed_table(timed))
    for entry in report.break_even:
        to.print(break_even_line(entry))
    for note in report.notes:
        to.print(f"Note: {note}.")


def _speed_table(timed: Sequence[Any]) -> Table:
    rows = (
        (
            system.name, *(f"{ms:.2f}" for ms in system.speed.stages_ms.values()), f"{system.speed.ms_per_token:.3f}",
            *(f"{ms:.1f}" for ms in system.speed.total_ms.values()), f"{system.speed.new_tokens:.0f}",
            f"{system.decoder_mb:.1f}",
        )
        for system in timed
    )  # fmt: skip
    columns = (
        "system", "tokenize", "encode", "project", "prefill", "ms/token", "p50 ms", "p90 ms", "p99 ms", "tokens", "decoder MB",
    )  # fmt: skip
    return Table("Speed: one prompt at a time, medians in ms", columns, rows, right=range(1, len(columns)))


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
