"""`batch`: generate the responses to a file of prompts, offline."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm2slm_export.cli import console
from llm2slm_export.cli.generation_options import (
    AnyDeviceOption,
    BadWordsOption,
    DoSampleOption,
    EarlyStoppingOption,
    LengthPenaltyOption,
    MaxNewTokensOption,
    MinNewTokensOption,
    MinPOption,
    NoRepeatNgramSizeOption,
    NumBeamsOption,
    NumReturnSequencesOption,
    RepetitionPenaltyOption,
    SeedOption,
    SplitSpecialTokensOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    TypicalPOption,
    given_options,
)
from llm2slm_export.cli.help import DATA, OUTPUT, RUNTIME
from llm2slm_export.cli.options import (
    PROMPT_FILE_KINDS,
    BundleArgument,
    HeadOption,
    JsonOption,
    PromptFieldOption,
    ThreadsOption,
    TruncateOption,
)
from llm2slm_export.cli.prompt_fields import prompt_field_of, record_of_bundle
from llm2slm_export.cli.runtime_notes import print_thread_notes
from llm2slm_export.cli.terminal import stdout_to_stderr
from llm2slm_export.errors import Llm2SlmError, UsageError, listed, require_extra

if TYPE_CHECKING:
    from rich.console import Console

    from llm2slm_export.batch_jobs.input_file import InputFile
    from llm2slm_export.batch_jobs.job_file import JobFile
    from llm2slm_export.batch_jobs.output_directory import OutputDirectory
    from llm2slm_export.batch_jobs.part_runner import BatchRequest
    from llm2slm_export.bundle.manifest import Manifest
    from llm2slm_export.files.data_files import Field

BATCH_SIZE = 32
PART_ROWS = 1_000
_MOST_SEED = 2**63 - 1  # what job.json can hold

EXAMPLES = """
llm2slm-export batch engines/demo prompts.jsonl responses
llm2slm-export batch engines/demo prompts.tsv responses --prompt-field text
llm2slm-export batch engines/demo prompts.jsonl responses --ray local
"""


def batch(
    context: typer.Context,
    bundle: BundleArgument,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help=f"File of prompts ({PROMPT_FILE_KINDS}): see --prompt-field, or, in .txt, one per line."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Directory to write to: an empty or a new one, or that of the same job, which is resumed.",
        ),
    ],
    head: HeadOption = None,
    truncate: TruncateOption = False,
    split_special_tokens: SplitSpecialTokensOption = False,
    prompt_field: PromptFieldOption = None,
    id_field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|N",
            rich_help_panel=DATA,
            help="Key or column that is copied to each response as its id, given as --prompt-field is (default: id, where "
            "there is one).",
        ),
    ] = None,
    max_new_tokens: MaxNewTokensOption = None,
    min_new_tokens: MinNewTokensOption = None,
    num_beams: NumBeamsOption = None,
    num_return_sequences: NumReturnSequencesOption = None,
    length_penalty: LengthPenaltyOption = None,
    early_stopping: EarlyStoppingOption = None,
    do_sample: DoSampleOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    typical_p: TypicalPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    no_repeat_ngram_size: NoRepeatNgramSizeOption = None,
    bad_words: BadWordsOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=RUNTIME,
            help="Maximum number of prompts in a batch; fewer where the engines take fewer.",
        ),
    ] = BATCH_SIZE,
    device: AnyDeviceOption = "cpu",
    threads: ThreadsOption = None,
    runtime: Annotated[
        str,
        typer.Option(
            metavar="R|GRAPH=R,…",
            rich_help_panel=RUNTIME,
            help="Runtime of the encoder and the projector: onnxruntime or openvino.",
        ),
    ] = "onnxruntime",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=RUNTIME,
            help="Ray cluster that runs the parts; local starts one on this machine (default: none, this process runs them).",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=RUNTIME,
            help="Number of Ray workers, each with a copy of the pair, with --ray (default: one per node).",
        ),
    ] = None,
    part_rows: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=OUTPUT,
            help="Number of rows per part, which is the work that an interruption loses at most.",
        ),
    ] = PART_ROWS,
    output_scores: Annotated[
        bool,
        typer.Option(
            "--output-scores", rich_help_panel=OUTPUT, help="Add every token's log-probability to the responses."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Generate the responses to a file of prompts, offline.

    They are written in parts, in the order of the prompts. A prompt that cannot be run has its reason in place of a response.
    The same command resumes an interrupted job, and the result is that of one run, byte for byte.
    """
    from llm2slm_export.batch_jobs.input_file import scan
    from llm2slm_export.batch_jobs.job_file import JobBundle, JobFile, JobInput
    from llm2slm_export.batch_jobs.output_directory import opened, started_job
    from llm2slm_export.batch_jobs.part_runner import BatchRequest
    from llm2slm_export.bundle.manifest_file import read_manifest
    from llm2slm_export.files.data_files import require_file
    from llm2slm_export.inference.generation.options import GenerationOptions

    options = given_options(
        max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, num_beams=num_beams,
        num_return_sequences=num_return_sequences, length_penalty=length_penalty, early_stopping=early_stopping,
        do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p,
        repetition_penalty=repetition_penalty, no_repeat_ngram_size=no_repeat_ngram_size, seed=seed, stop=stop,
        output_scores=output_scores or None,
    )  # fmt: skip
    _check_runtime(ray, workers, device, runtime, seed)
    manifest = read_manifest(bundle)
    chosen = _head(bundle, manifest, head)
    require_file(file, "IN")
    field, origin = prompt_field_of(file, "IN", prompt_field, record_of_bundle(bundle, prompt_field))
    started = started_job(out, [bundle, file])
    GenerationOptions.resolve(chosen.generation, **options)
    resolved = GenerationOptions.resolve(chosen.generation, **(options := options | _seed(chosen, options, started)))
    threads = print_thread_notes(threads)
    human = console.console(stderr=True)
    human.print(f"reading {file} …", soft_wrap=True)
    found = scan(file, field, _spelled(id_field, file), part_rows=part_rows, origin=origin)
    job = JobFile(
        bundle=JobBundle(name=manifest.name, head=chosen.head, digest=manifest.digest),
        input=JobInput(
            name=file.name, prompt_field=found.prompt_field, id_field=found.id_field, bytes=found.bytes,
            sha256=found.sha256, rows=found.rows,
        ),
        options=asdict(resolved), bad_words=tuple(bad_words or ()), truncate=truncate,
        split_special_tokens=split_special_tokens, device=device, runtime=runtime, batch_size=batch_size,
        part_rows=part_rows, tool_versions=_tool_versions(),
    )  # fmt: skip
    request = BatchRequest(bundle.absolute(), found, job, options, threads)
    with opened(out, job, found.parts) as directory:
        _print_versions(started, job)
        before = directory.tally.rows
        seconds = _run(context, request, directory, human, ray, workers) if directory.missing else 0.0
        _print_result(human, directory, found, seconds, before, json=json)


def _run(
    context: typer.Context,
    request: "BatchRequest",
    directory: "OutputDirectory",
    human: "Console",
    ray: str | None,
    workers: int | None,
) -> float:
    """Answer the missing parts. Returns the seconds that it took.

    Raises:
        typer.Exit: a signal ended the run.
    """
    from llm2slm_export.batch_jobs.local_run import run_locally
    from llm2slm_export.cli.job_log import JobLog

    rows, before, missing = request.input.rows, directory.tally.rows, directory.missing
    started = perf_counter()
    try:
        with _ended_by_signals(), JobLog(human, rows=rows, done=before) as log:
            kept = f", {before:,} are answered" if before else ""
            log.start(f"answering {rows:,} rows{kept}", total=rows - before)
            if ray is None:
                for result in run_locally(request, missing, on_rows=log.advance, on_warning=human.print):
                    directory.write(result)
            else:
                from llm2slm_export.batch_jobs.ray_run import run_on_ray

                with stdout_to_stderr(wanted=True):
                    for result in run_on_ray(request, missing, ray, workers=workers):
                        directory.write(result)
                        log.advance(result.tally.rows)
    except _Ended as ended:
        human.print(f"stopped by {ended.name}: {directory.answered:,} of {rows:,} rows are answered.", soft_wrap=True)
        human.print(f"Next: {_command(context)}", soft_wrap=True)
        raise typer.Exit(128 + ended.number) from None
    return perf_counter() - started


class _Ended(KeyboardInterrupt):
    """SIGINT or SIGTERM has arrived."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.name = number, signal.Signals(number).name


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise `_Ended` on SIGINT and SIGTERM. The part that is being answered is lost, the complete ones are kept."""

    def end(number: int, frame: object) -> None:
        del frame
        raise _Ended(number)

    former = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _command(context: typer.Context) -> str:
    """The command as it was typed."""
    words = [context.command_path]
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[parameter.name or ""]
        values = value if isinstance(value, list | tuple) else [value]
        if parameter.param_type_name == "argument":
            words += map(str, values)
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += (word for each in values for word in (parameter.opts[0], str(each)))
    return f"{words[0]} {shlex.join(words[1:])}"


def _check_runtime(ray: str | None, workers: int | None, device: str, runtime: str, seed: int | None) -> None:
    """Refuse what cannot run, before anything is read."""
    from llm2slm_export.inference.runtime.selection import check_device, parse_runtime

    if ray is not None:
        from llm2slm_export.batch_jobs.ray_run import MODULES

        require_extra("ray", *MODULES, purpose="--ray")
    elif workers is not None:
        raise UsageError("--workers goes with --ray.", remedy="add --ray local, or leave it out")
    check_device(device)
    if "auto" in parse_runtime(runtime).values():
        raise UsageError(
            f"--runtime {runtime} may choose another runtime when the job is resumed, and so other responses.",
            remedy="give onnxruntime or openvino",
        )
    if seed is not None and seed > _MOST_SEED:
        raise UsageError(f"--seed is {seed}.", remedy=f"give at most {_MOST_SEED}")


def _head(bundle: Path, manifest: "Manifest", head: str | None) -> "Manifest":
    from llm2slm_export.bundle.bundle import Bundle

    return manifest if head is None else Bundle(bundle, manifest).select(head).manifest


def _seed(manifest: "Manifest", options: dict[str, Any], started: "JobFile | None") -> dict[str, int]:
    """The seed of a job that samples without one: that with which it was started, else a new one."""
    from llm2slm_export.inference.generation.draws import fresh_seed

    if "seed" in options or not options.get("do_sample", manifest.generation.do_sample):
        return {}
    kept = None if started is None else started.seed
    return {"seed": fresh_seed() & _MOST_SEED if kept is None else kept}


def _spelled(field: str | None, file: Path) -> "Field | None":
    from llm2slm_export.files.data_files import spelled_field

    return None if field is None else spelled_field(field, file)


def _tool_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("llm2slm-export", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _print_versions(started: "JobFile | None", job: "JobFile") -> None:
    """A note on stderr about releases that are other than those that began the job."""
    if started is None:
        return
    other = [
        f"{name} {started.tool_versions.get(name, 'none')} is now {job.tool_versions.get(name, 'none')}"
        for name in dict.fromkeys((*started.tool_versions, *job.tool_versions))
        if started.tool_versions.get(name) != job.tool_versions.get(name)
    ]
    if other:
        print(
            f"The job was begun with other releases, whose responses may differ: {'; '.join(other)}.", file=sys.stderr
        )


def _print_result(
    human: "Console", directory: "OutputDirectory", found: "InputFile", seconds: float, before: int, *, json: bool
) -> None:
    tally, parts = directory.tally, len(found.parts)
    fresh = tally.rows - before
    if fresh:
        human.print(f"{directory.path} is complete: {tally.rows:,} rows in {parts:,} parts.", soft_wrap=True)
        human.print(f"{fresh:,} rows in {seconds:.1f} s, {fresh / seconds:.1f} rows/s.", soft_wrap=True)
    else:
        human.print(
            f"{directory.path} was complete already: {tally.rows:,} rows in {parts:,} parts; nothing was run.",
            soft_wrap=True,
        )
    if tally.failed:
        human.print(f"{tally.failed:,} rows have no response:", soft_wrap=True)
        for reason in listed(tally.reasons):
            human.print(f"  - {reason}", soft_wrap=True)
    if json:
        console.print_json(
            {"out": str(directory.path), "rows": tally.rows, "failed": tally.failed, "parts": parts, "new_rows": fresh,
             "prompt_tokens": tally.prompt_tokens, "new_tokens": tally.new_tokens, "seconds": round(seconds, 3)}
        )  # fmt: skip
    if tally.failed == tally.rows:
        raise Llm2SlmError(
            "No row has a response.",
            *tally.reasons[:1],
            remedy="correct the prompts or the options, and run another job",
        )
