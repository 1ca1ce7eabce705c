"""The command line: parse, call one function, render. Nothing heavy is imported before a command needs it."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llm2slm_export.errors import PromptError, UsageError, require_extra
from llm2slm_export.failures import Commands, full_disk
from llm2slm_export.sources import PRECISIONS, BuildChoice, one_model_pair, pair_source, parse_precision, run_directory

if TYPE_CHECKING:
    from llm2slm_export.bundle import Manifest
    from llm2slm_export.orchestrator import Generation, Orchestrator
    from llm2slm_export.prompts import Prompt

BATCH_SIZE = 8  # prompts run together; more gains little on a CPU and costs cache memory
TRAIN_MODULES = ("torch", "transformers", "datasets", "accelerate")
BUILD_MODULES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "safetensors")


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Join a large language model that reads with a small one that writes, and ship the pair as ONNX graphs.",
)  # fmt: skip
recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The recipes that come with the package.")
app.add_typer(recipes_app, name="recipes")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; what people read goes to stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing --out once the new one is complete.")]
PrecisionOption = Annotated[
    str | None,
    typer.Option(metavar="P|GRAPH=P,…", help=f"{' or '.join(PRECISIONS)}, for all graphs or by graph."),
]
LlmOption = Annotated[str | None, typer.Option(metavar="MODEL", help="Alias, hub id or local directory.")]
SlmOption = Annotated[str | None, typer.Option(metavar="MODEL", help="Alias, hub id or local directory.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory that `build` wrote.")]


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


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from `recipes ls`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as training.epochs=5.")
    ] = None,
    only: Annotated[Literal["llm", "slm"] | None, typer.Option(help="Train that model by itself.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; runs/<name>/<pair|llm|slm> by default.")] = None,
    work: Annotated[Path | None, typer.Option(help="Checkpoints and caches; <out>.work by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    force: Force = False,
    weights_dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="Type of the weights written.")
    ] = "float32",
    json: Json = False,
) -> None:
    """Train the pair of a recipe (or one of its models) and write a composition."""
    require_extra("train", *TRAIN_MODULES, purpose="Training")
    from llm2slm_export import render
    from llm2slm_export.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    default = run_directory(loaded.name, only or "pair")
    target = out or default
    human = render.console(stderr=json)
    with full_disk(target), _stdout_to_stderr(json):
        import torch

        from llm2slm_export.training.trainer import train as run_training

        result = run_training(
            loaded, target, part=only or "pair", work=work, resume=resume, force=force,
            weights_dtype=getattr(torch, weights_dtype),
        )  # fmt: skip
    if json:
        render.print_json(
            {
                "directory": str(target),
                "metrics": result.metrics,
                "seconds": result.seconds,
                "peak_rss_mb": _peak_rss_mb(),
            }
        )
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    human.print(f"{target} is written: {metrics}, {result.seconds:.0f} s.")
    after = f"train {recipe}" if only else f"build {recipe}" if target == default else f"build --composition {target}"
    human.print(f"Next: llm2slm-export {after}")


@app.command()
def build(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe that `train` has run on.")] = None,
    composition: Annotated[Path | None, typer.Option(metavar="DIR", help="A directory that `train` wrote.")] = None,
    llm: LlmOption = None,
    slm: SlmOption = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; engines/<name> by default.")] = None,
    precision: PrecisionOption = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="With --llm and --slm: draw weights; a configuration is enough.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of --random-weights; 0 by default.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Export a pair as three ONNX graphs, checked against the composition before they are kept."""
    require_extra("build", *BUILD_MODULES, purpose="`build`")
    from llm2slm_export import render

    source = pair_source(BuildChoice(recipe, composition, llm, slm, random_weights=random_weights, seed=seed))
    wanted = parse_precision(precision, source.precision)
    target = out or Path("engines") / source.name
    if target.exists() and not force:
        raise UsageError(
            f"{target} exists already.",
            remedy="choose another --out, or add --force to replace it once the new one is complete",
        )
    human = render.console(stderr=json)
    log = render.StageLog(human)
    try:
        with full_disk(target), _stdout_to_stderr(json):
            from llm2slm_export.build import build as export

            log.start("load")
            started = time.monotonic()
            pair = source.load()
            log.done("load", time.monotonic() - started, None)
            manifest = export(
                pair, target, precision=wanted, force=force, on_start=log.start,
                on_stage=lambda stage: log.done(stage.name, stage.seconds, stage.bytes),
            )  # fmt: skip
    finally:
        log.stop()
    total, peak = _bytes_of(target), _peak_rss_mb()
    for line in _warnings(trained=manifest.trained, stand_in=manifest.tokenizer.stand_in):
        human.print(line)
    human.print(f"{target} is written: {render.size(total)}, parity passed, peak memory {peak} MB.")
    human.print(f'Next: llm2slm-export run {target} "How are you?"')
    if json:
        render.print_json(
            {"bundle": str(target), "bytes": total, "stages": log.stages, "parity_passed": manifest.parity.passed,
             "trained": manifest.trained, "stand_in_tokenizer": manifest.tokenizer.stand_in, "peak_rss_mb": peak}
        )  # fmt: skip


@app.command()
def run(
    bundle: BundleArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]... | -", help="Prompts; '-' reads one a line from standard input."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="X.jsonl|X.txt", help='Objects with a "prompt", or one prompt a line.')
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest response. What is not said, the bundle decides.")
    ] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Shortest response.")] = None,
    do_sample: Annotated[bool | None, typer.Option(help="Sample instead of taking the likeliest token.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens; 0: from all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that make up p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below min_p times the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="S", help="Stop at this text; can be given several times.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda[:n] or tensorrt.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts run together.")] = BATCH_SIZE,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Shorten prompts over the limit instead of refusing them.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One object a line for each prompt.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Times by stage, on stderr.")] = False,
) -> None:
    """Run a bundle on prompts: one is streamed, several are answered in order, one line each (line ends as \\n)."""
    from llm2slm_export.orchestrator import load
    from llm2slm_export.prompts import placed, read_prompts

    read = read_prompts(prompts or [], file, sys.stdin.buffer)
    given = {
        "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "do_sample": do_sample,
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "stop": tuple(stop) if stop else None,
    }  # fmt: skip
    options = {"truncate": truncate, **{name: value for name, value in given.items() if value is not None}}
    with load(bundle, device=device, threads=threads) as pair:
        try:
            if len(read) == 1 and not json:
                batches = [[_stream(pair, read[0], options)]]
            else:
                batches = list(_answer(pair, read, batch_size, options, json=json))
        except PromptError as error:
            raise placed(error, read) from error
    if profile:
        _show_profile(batches)


def _stream(pair: "Orchestrator", prompt: "Prompt", options: dict[str, Any]) -> "Generation":
    """Print a response as it arrives."""
    generation = None
    for step in pair.stream(prompt.text, **options):
        print(step.text, end="", flush=True)
        generation = step.generation
    print()
    assert generation is not None  # the last step carries it
    _tell_dropped(prompt, generation)
    return generation


def _answer(
    pair: "Orchestrator", prompts: "list[Prompt]", batch_size: int, options: dict[str, Any], *, json: bool
) -> "Iterator[list[Generation]]":
    """Print the responses to several prompts in order."""
    from llm2slm_export import render

    waiting = iter(prompts)
    for batch in pair.generate_batches([prompt.text for prompt in prompts], batch_size=batch_size, **options):
        # The batch comes first: zip takes from its first iterator before it sees that the other has ended.
        for generation, prompt in zip(batch, waiting, strict=False):
            if json:
                fields = {"prompt": prompt.text, **asdict(generation)}
                if not fields["dropped_tokens"]:
                    del fields["dropped_tokens"]
                render.print_json(fields)
            else:
                print(generation.text.replace("\n", "\\n"), flush=True)
            _tell_dropped(prompt, generation)
        yield batch


def _tell_dropped(prompt: "Prompt", generation: "Generation") -> None:
    if generation.dropped_tokens:
        print(f"{prompt.place}: {generation.dropped_tokens} tokens of the prompt were dropped", file=sys.stderr)


def _show_profile(batches: "list[list[Generation]]") -> None:
    """Times by stage. The rows of a batch run together, so a batch took what its slowest row took."""
    from llm2slm_export import render

    answered = [generation for batch in batches for generation in batch]
    read, written = (sum(getattr(g, field) for g in answered) for field in ("prompt_tokens", "new_tokens"))
    # The prefill call already yields each row's first token.
    tokens = {"decode": written - len(answered), "total": written}
    rows = [
        (stage, sum(max(g.timings_ms[stage] for g in batch) for batch in batches), tokens.get(stage, read))
        for stage in answered[0].timings_ms
    ]
    render.console(stderr=True).print(render.profile_table(rows))


@app.command()
def verify(
    bundle: BundleArgument,
    composition: Annotated[Path | None, typer.Option(metavar="DIR", help="Compare with it numerically too.")] = None,
    json: Json = False,
) -> None:
    """Check a bundle's hashes and, with its composition at hand, that it computes the same."""
    if composition is not None:
        require_extra("build", *BUILD_MODULES, purpose="`verify --composition`")
    from llm2slm_export import render
    from llm2slm_export.bundle import open_bundle

    files = open_bundle(bundle).manifest.files
    report = None
    if composition is not None:
        from llm2slm_export.verify import verify as compare

        with _stdout_to_stderr(json):
            report = compare(bundle, composition)
    human = render.console(stderr=json)
    human.print(f"{bundle}: {len(files)} files, {render.size(sum(file.bytes for file in files))}, as built.")
    if report is not None:
        human.print(render.parity_table(report.rows))
        human.print("Parity passed." if report.passed else "Parity FAILED.")
    else:
        human.print("Only hashes were checked; --composition DIR compares the numbers too.")
    if json:
        parity = None if report is None else report.model_dump(mode="json") | {"passed": report.passed}
        render.print_json({"bundle": str(bundle), "files": len(files), "hashes": True, "parity": parity})
    if report is not None and not report.passed:
        raise typer.Exit(1)


@app.command()
def inspect(bundle: BundleArgument, json: Json = False) -> None:
    """Tell what a bundle is: models, graphs, tensors, sizes, defaults, parity."""
    from llm2slm_export import render
    from llm2slm_export.bundle import read_manifest

    manifest = read_manifest(bundle)
    total = _bytes_of(bundle)
    sizes = {name: _graph_bytes(manifest, entry.file) for name, entry in manifest.graphs.items()}
    if json:
        render.print_json(manifest.model_dump(mode="json") | {"graph_bytes": sizes, "total_bytes": total})
    else:
        render.print_manifest(render.console(), manifest, sizes, total)


@app.command()
def plan(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A YAML file, or a name from `recipes ls`.")
    ] = None,
    llm: LlmOption = None,
    slm: SlmOption = None,
    precision: PrecisionOption = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length to plan for.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Response length to plan for.")] = 128,
    json: Json = False,
) -> None:
    """Tell sizes, memory and predicted times of a pair; downloads no weights."""
    require_extra("build", *BUILD_MODULES, purpose="`plan`")
    from llm2slm_export import render

    loaded, llm_source, slm_source = one_model_pair(recipe, llm, slm)
    wanted = parse_precision(precision, loaded.export.precision if loaded else {})
    from llm2slm_export.plan import plan as make_plan

    made = make_plan(
        llm_source, slm_source, precision=wanted, d_hidden=loaded.projector.d_hidden if loaded else None,
        fusion=loaded.fusion if loaded else "add", prompt_tokens=prompt_tokens, new_tokens=new_tokens,
    )  # fmt: skip
    if json:
        render.print_json(asdict(made))
    else:
        render.print_plan(render.console(), made)


@app.command()
def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Check that this bundle opens here.")
    ] = None,
    json: Json = False,
) -> None:
    """Tell what this machine has, which extras are complete, and whether a bundle opens here."""
    from llm2slm_export import render
    from llm2slm_export.doctor import diagnose

    found = diagnose(bundle)
    if json:
        extras = [asdict(extra) | {"complete": extra.complete, "pip": extra.pip} for extra in found.extras]
        checked = asdict(found.bundle) | {"ok": found.bundle.ok} if found.bundle else None
        render.print_json(asdict(found) | {"extras": extras, "bundle": checked})
    else:
        render.print_diagnosis(render.console(), found)
    if found.bundle is not None and not found.bundle.ok:
        raise typer.Exit(1)


@recipes_app.command("ls")
def list_recipes() -> None:
    """List them, with the first line of each."""
    from llm2slm_export import recipe, render

    rows = ((path.stem, _first_line(path)) for path in recipe.list_recipes())
    render.console().print(render.table(None, ("recipe", "what it is"), rows))


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print one."""
    from llm2slm_export.recipe import find_recipe

    print(find_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    destination: Annotated[Path | None, typer.Argument(metavar="[DEST]", help="<name>.yaml here by default.")] = None,
) -> None:
    """Copy one, to change it."""
    from llm2slm_export.recipe import find_recipe

    source = find_recipe(name)
    target = destination or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UsageError(f"{target} exists already.", remedy="give another DEST, or remove it first")
    shutil.copyfile(source, target)
    print(f"Next: edit {target}, then llm2slm-export train {target}")


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def _warnings(*, trained: bool, stand_in: bool) -> Iterator[str]:
    if not trained:
        yield "WARNING: the pair is untrained: the LLM adds nothing until `train` has run."
    if stand_in:
        yield "WARNING: a byte-level stand-in takes the place of the models' tokenizers: good for sizes and speed, not for text."


def _graph_bytes(manifest: "Manifest", file: str) -> int:
    """A graph's file and its external data, which is named after it."""
    return sum(entry.bytes for entry in manifest.files if entry.path == file or entry.path.startswith(f"{file}."))


def _bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _peak_rss_mb() -> int:
    """The most memory this process has held. Linux counts in KiB, macOS in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)


@contextmanager
def _stdout_to_stderr(wanted: bool) -> Iterator[None]:
    """Keep libraries that print out of the JSON."""
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield


def main() -> None:
    """The entry point `llm2slm-export`."""
    app(prog_name="llm2slm-export")
