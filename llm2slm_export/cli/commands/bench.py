"""`bench`: time a bundle."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm2slm_export.cli import console
from llm2slm_export.cli.console import Table, break_even_line
from llm2slm_export.cli.export_options import parse_baseline_precision
from llm2slm_export.cli.help import INPUT, TIMING
from llm2slm_export.cli.options import (
    BaselineOption,
    BaselinePrecisionOption,
    BundleArgument,
    DeviceOption,
    EvaluatedCompositionOption,
    HeadOption,
    JsonOption,
    RuntimeOption,
    ThreadsOption,
    WorkOption,
)
from llm2slm_export.cli.runtime_notes import print_measured_runtimes, print_thread_notes
from llm2slm_export.cli.terminal import stdout_to_stderr
from llm2slm_export.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from llm2slm_export.evaluation.latency import BenchReport
EXAMPLES = """
llm2slm-export bench engines/demo
llm2slm-export bench engines/demo --prompt-tokens 16,64 --batch-size 1,8
llm2slm-export bench engines/demo --baseline fp32=engines/tatoeba-en-fr
"""


def bench(
    bundle: BundleArgument,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N,N…", rich_help_panel=INPUT, help="Prompt lengths, in tokens of the LLM.")
    ] = "64",
    new_tokens: Annotated[
        int, typer.Option(min=2, rich_help_panel=INPUT, help="Length of every response, in tokens.")
    ] = 128,
    batch_size: Annotated[str, typer.Option(metavar="N,N…", rich_help_panel=INPUT, help="Batch sizes.")] = "1",
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=INPUT, help="Random seed of the prompts.")] = 0,
    head: HeadOption = None,
    baseline: BaselineOption = None,
    baseline_precision: BaselinePrecisionOption = None,
    composition: EvaluatedCompositionOption = None,
    rounds: Annotated[
        int, typer.Option(min=1, rich_help_panel=TIMING, help="Number of rounds to time, after one to warm up.")
    ] = 10,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    runtime: RuntimeOption = "onnxruntime",
    work: WorkOption = None,
    json: JsonOption = False,
) -> None:
    """Time a bundle by stage, beside baselines.

    Prompts are random tokens and responses have a fixed length. The report has times by stage, tokens per second and the
    share of the memory bandwidth that a step uses.
    """
    from llm2slm_export.bundle.manifest_file import read_manifest
    from llm2slm_export.evaluation.compared_systems import EvaluationRequest, compared_systems
    from llm2slm_export.evaluation.latency import BenchSettings, batches
    from llm2slm_export.evaluation.latency import bench as run_bench

    lengths, rows = _counts(prompt_tokens, "--prompt-tokens"), _counts(batch_size, "--batch-size")
    settings = BenchSettings(lengths, new_tokens, rows, rounds, seed)
    threads = print_thread_notes(threads)
    request = EvaluationRequest(
        bundle, head, composition, tuple(baseline or ()), device=device, threads=threads, runtime=runtime,
        work=work or Path("runs") / read_manifest(bundle).name / "eval",
        baseline_precision=parse_baseline_precision(baseline_precision),
    )  # fmt: skip
    human = console.console(stderr=json)
    # The prompts are random and made later, so there are none to check against the limit or the training data.
    with (
        stdout_to_stderr(json),
        console.WorkLog(human) as log,
        closing(compared_systems(request, [], truncate=True, progress=log)) as comparison,
    ):
        log.start("timing", batches(len(comparison.systems), settings))
        systems = {system.name: system.orchestrator() for system in comparison.systems}
        print_measured_runtimes(bundle, systems[comparison.systems[0].name], runtime, threads)
        report = run_bench(
            comparison.systems[0].bundle,
            systems,
            settings,
            threads=threads,
            advance=log.advance,
            notes=comparison.notes,
        )
    print_bench(human, report)
    if json:
        console.print_json(report.model_dump(mode="json"))


def _counts(text: str, option: str) -> tuple[int, ...]:
    """The positive numbers in a comma-separated list, without repetitions.

    Raises:
        UsageError: the text is no such list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"{option} is {text!r}.", remedy=f"give positive numbers, such as {option} 64,256")
    return tuple(dict.fromkeys(int(part) for part in parts))


def print_bench(to: "Console", report: "BenchReport") -> None:
    """Print the measurements: the first case by stage, and one line for every case."""
    threads = "the runtime's choice of threads" if report.threads is None else f"--threads {report.threads}"
    precision = ", ".join(f"{graph} {precision}" for graph, precision in report.precision.items())
    runtimes = ", ".join(f"{graph} {runtime}" for graph, runtime in report.runtimes.items())
    to.print(f"{report.bundle} ({precision}) on {report.device}, {threads}, {report.rounds} rounds")
    to.print(f"Runtimes: {runtimes}.")
    first = report.cases[0]
    stages = (
        (stage.replace("_", " "), *(f"{ms:.3f}" for ms in (times.p50, times.p90, times.p99)))
        for stage, times in first.stages_ms.items()
    )
    title = (
        f"{first.system}: {first.prompt_tokens} prompt tokens, {first.new_tokens} new tokens, batch {first.batch_size}"
    )
    to.print()
    to.print(Table(title, ("stage", "p50 ms", "p90 ms", "p99 ms"), stages, right=(1, 2, 3)))
    rows = (
        (
            case.system, case.prompt_tokens, case.batch_size, f"{case.read_ms:.2f}", f"{case.ms_per_token:.3f}",
            f"{case.stages_ms['total'].p50:.1f}", f"{case.tokens_per_second:.0f}",
            "-" if case.step_bytes is None else f"{case.step_bytes / 1e6:.1f}",
            "-" if case.bandwidth_share is None else f"{100 * case.bandwidth_share:.0f} %",
        )
        for case in report.cases
    )  # fmt: skip
    columns = (
        "system", "prompt", "batch", "first token ms", "ms/token", "total ms", "tokens/s", "MB a step", "bandwidth",
    )  # fmt: skip
    to.print()
    to.print(Table("Medians", columns, rows, right=range(1, len(columns))))
    if report.bandwidth is not None:
        to.print(f"100 % of the bandwidth is {report.bandwidth / 1e9:.1f} GB/s, measured on all cores of this machine.")
    if any(case.step_bytes is None for case in report.cases):
        to.print(
            "A bundle of an earlier version does not hold the bytes that a step reads: build it again to see them."
        )
    for entry in report.break_even:
        to.print(break_even_line(entry))
    for note in report.notes:
        to.print(f"Note: {note}.")
