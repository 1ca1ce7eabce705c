"""The command line: parse, call one function, render. Nothing heavy is imported before a command needs it."""

import itertools
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llm2slm_export.authoring.pair_sources import (
    ENGINE_PRECISIONS,
    PRECISIONS,
    BuildChoice,
    EngineRequest,
    FusionOptions,
    chosen_weight_quantization,
    named_pair,
    pair_source,
    parse_precision,
    run_directory,
)
from llm2slm_export.cli.exit_codes import Commands, full_disk
from llm2slm_export.contract import Fusion, GraphName, Precision, TokenizerStrategy
from llm2slm_export.errors import BundleError, PromptError, UnknownTokenError, UsageError, require_extra

if TYPE_CHECKING:
    from llm2slm_export.authoring.parity.compare import Gate
    from llm2slm_export.authoring.training_record import TrainingRecord
    from llm2slm_export.bundle.manifest import Manifest
    from llm2slm_export.files.data_files import Field
    from llm2slm_export.inference.generation.options import GenerationOptions
    from llm2slm_export.inference.orchestrator import BundlePart, Orchestrator

PROMPT_FILES = "X.jsonl|X.tsv|X.csv|X.txt"
BATCH_SIZE = 8  # prompts run together; more gains little on a CPU and costs cache memory
TRAIN_MODULES = ("torch", "transformers", "datasets", "accelerate")
EVAL_MODULES = ("sacrebleu", "rouge_score", "matplotlib", "jinja2")
BUILD_MODULES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "safetensors")


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Join a large language model that reads with a small one that writes, and ship the pair as ONNX graphs.",
)  # fmt: skip
recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The recipes that come with the package.")
app.add_typer(recipes_app, name="recipes")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; what people read goes to stderr.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what this command wrote to --out before, once the new one is complete.")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(metavar="P|GRAPH=P,…", help=f"{' or '.join(PRECISIONS)}, for all graphs or by graph."),
]
BaselinePrecisionOption = Annotated[
    str | None,
    typer.Option(
        metavar="P|GRAPH=P,…",
        help="Precision of --baseline llm and slm, as build --precision takes it. Default: the bundle's. A model that does not pass "
        "the parity check at the default is exported at fp32, with a note.",
    ),
]
BlockSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="int8 or int4 weights that share a scale: 16 to 256; by default 128 at int8, 32 at int4. More are faster and "
        "less exact.",
    ),
]
QuantizeLmHeadOption = Annotated[
    bool | None,
    typer.Option(
        "--quantize-lm-head", help="At int4, four bits for the output layer too, and not eight.", show_default=False
    ),
]
GateOption = Annotated[
    Path | None,
    typer.Option(
        metavar=PROMPT_FILES,
        help="Held-out prompts that a reduced precision is measured on; too long ones are left out.",
    ),
]
MaxDifferingOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", min=0.0, max=1.0,
        help="Of next tokens that may differ on --gate's prompts; by default 0.005 for each graph at fp16, bf16 or int8, 0.02 at int4.",
    ),
]  # fmt: skip
LlmOption = Annotated[str | None, typer.Option(metavar="MODEL", help="Alias, hub id or local directory.")]
SlmOption = Annotated[str | None, typer.Option(metavar="MODEL", help="Alias, hub id or local directory.")]
FusionOption = Annotated[Fusion | None, typer.Option(help="With --llm and --slm; add by default.")]
TokenizerOption = Annotated[
    TokenizerStrategy | None,
    typer.Option(help="With --llm and --slm: whose tokens the prompt is in; shared by default."),
]
LayerOption = Annotated[
    str | None,
    typer.Option(metavar="N|N,N…", help="With --llm and --slm: which hidden states; -1, the output, by default."),
]
ProjectorOption = Annotated[
    Literal["mlp", "identity"] | None, typer.Option(help="With --llm and --slm; mlp by default.")
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        metavar="R|GRAPH=R,…",
        help="Of encoder and projector: onnxruntime, openvino, or auto: the faster one here, measured once and kept.",
    ),
]
PromptFieldOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|N",
        help="Key or column of the prompt in a data file; in TSV and CSV a name says that the first row is a header, a number from 0 "
        "that there is none. What the pair was trained with by default, else prompt.",
    ),
]
ResponseFieldOption = Annotated[
    str | None, typer.Option(metavar="NAME|N", help="Key or column of the response, likewise.")
]
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
    only: Annotated[
        Literal["llm", "slm", "slm-alone"] | None,
        typer.Option(help="Train that model by itself; slm-alone: the SLM as the pair starts from it, as a baseline."),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Learn the LLM's own responses, as training.teacher says.")
    ] = False,
    prompt_field: PromptFieldOption = None,
    response_field: ResponseFieldOption = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; runs/<name>/<pair or --only> by default.")] = None,
    work: Annotated[Path | None, typer.Option(help="Checkpoints; <out>.work by default.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Hidden states and responses that runs share; cache beside --out by default."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that is whole.")] = False,
    force: Force = False,
    weights_dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="Type of the weights written.")
    ] = "float32",
    threads: Annotated[
        int | None, typer.Option(help="Threads that torch computes on; as many as cores are free by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Train the pair of a recipe (or one of its models) and write a composition."""
    require_extra("train", *TRAIN_MODULES, purpose="Training")
    if teacher and only == "llm":
        raise UsageError(
            "--teacher does not go with --only llm: an LLM is not its own teacher.", remedy="leave one out"
        )
    from llm2slm_export.authoring.recipe import load_recipe, with_fields, with_teacher
    from llm2slm_export.cli import console

    loaded = with_fields(load_recipe(recipe, overrides or []), prompt_field, response_field)
    if teacher:
        loaded = with_teacher(loaded)
    from llm2slm_export.authoring.training.inputs import refuse_missing

    refuse_missing(loaded, only or "pair", recipe)  # said before torch is loaded
    default = run_directory(loaded.name, only or "pair")
    target = out or default
    human = console.console(stderr=json)
    with full_disk(target), _stdout_to_stderr(json):
        import torch

        from llm2slm_export.authoring.training.train import train as run_training

        result = run_training(
            loaded, target, part=only or "pair", work=work, cache=cache, resume=resume, force=force,
            weights_dtype=getattr(torch, weights_dtype), threads=threads,
        )  # fmt: skip
    if not result.is_main_process:
        return
    if json:
        console.print_json(
            {
                "directory": str(target),
                "metrics": result.metrics,
                "seconds": result.seconds,
                "peak_rss_mb": _peak_rss_mb(),
            }
        )
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    human.print(f"{target} is written: {metrics}, {result.seconds:.0f} s.")
    from llm2slm_export.cli.next_command import after_training

    human.print(f"Next: llm2slm-export {after_training(recipe, loaded, only or 'pair', target)}", soft_wrap=True)


@app.command()
def build(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe that `train` has run on.")] = None,
    composition: Annotated[Path | None, typer.Option(metavar="DIR", help="A directory that `train` wrote.")] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Several compositions over one LLM: a bundle with a head for each."),
    ] = None,
    llm: LlmOption = None,
    slm: SlmOption = None,
    fusion: FusionOption = None,
    tokenizer: TokenizerOption = None,
    layer: LayerOption = None,
    projector: ProjectorOption = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; engines/<name> by default.")] = None,
    precision: PrecisionOption = None,
    block_size: BlockSizeOption = None,
    quantize_lm_head: QuantizeLmHeadOption = None,
    gate: GateOption = None,
    max_differing: MaxDifferingOption = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar=PROMPT_FILES,
            help="Prompts that a decoder's int8 or int4 weights, or an encoder's w8a8, are fitted to.",
        ),
    ] = None,
    prompt_field: PromptFieldOption = None,
    backend: Annotated[
        Literal["onnx", "tensorrt", "tensorrt-rtx"] | None,
        typer.Option(
            help="Engines to compile besides the ONNX graphs; tensorrt needs the GPU that they are for. What the recipe says, "
            "or onnx, none, by default."
        ),
    ] = None,
    engine_precision: Annotated[
        str | None,
        typer.Option(metavar="P|GRAPH=P,…", help=f"Of engines: {' or '.join(ENGINE_PRECISIONS)}; fp16 by default."),
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="Of engines: most rows; 8 by default.")] = None,
    max_prompt: Annotated[
        int | None, typer.Option(help="Of engines: longest prompt in tokens; the pair's by default.")
    ] = None,
    max_new: Annotated[
        int | None, typer.Option(help="Of engines: longest response in tokens; the pair's by default.")
    ] = None,
    prompt_buckets: Annotated[
        str | None,
        typer.Option(
            metavar="N,…",
            help="Of engines: prompt lengths to be fast at, each with a profile of its own, besides the longest.",
        ),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(metavar="N.N,…", help="Of tensorrt-rtx: the devices to build for; 8.6,8.9,12.0 by default."),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="With --llm and --slm: draw weights; a configuration is enough.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of --random-weights; 0 by default.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Export a pair as three ONNX graphs, checked against the composition before they are kept, and compile them."""
    require_extra("build", *BUILD_MODULES, purpose="`build`")
    from llm2slm_export.cli import console

    source = pair_source(
        BuildChoice(
            recipe, composition, tuple(head or ()), llm, slm, FusionOptions(fusion, tokenizer, layer, projector),
            random_weights=random_weights, seed=seed,
        )
    )  # fmt: skip
    wanted = parse_precision(precision, source.precision)
    asked = EngineRequest(
        backend, engine_precision, max_batch, max_prompt, max_new, prompt_buckets, compute_capability, source.engines
    )
    compiled = asked.precisions()
    weight_quantization = chosen_weight_quantization(
        block_size, quantize_lm_head, source.weight_quantization, wanted, compiled
    )
    measured = wanted["encoder"] == "w8a8"
    if calibrate is not None and not measured and not {"int8", "int4"} & {wanted["decoder"], compiled.get("decoder")}:
        raise UsageError(
            f"--calibrate {calibrate} is for a decoder at int8 or int4, and an encoder at w8a8.",
            f"encoder: {wanted['encoder']}, decoder: {wanted['decoder']}",
            remedy="add --precision decoder=int8, or leave out --calibrate",
        )
    if measured and calibrate is None:
        raise UsageError(
            "An encoder at w8a8 needs prompts to measure what its layers are given.", "--calibrate was not given",
            remedy="add --calibrate FILE with a hundred prompts or more like those it will read, or use encoder=int8",
        )  # fmt: skip
    # Of several heads the first one's: they share the prompt's side.
    record = next(iter(source.records.values()), None)
    _refuse_unused_field(prompt_field, "--gate or --calibrate", gate, calibrate)
    held_out = _texts("--gate", gate, prompt_field, record)
    fitted = _texts("--calibrate", calibrate, prompt_field, record)
    target = out or Path("engines") / source.name
    inputs = [*source.inputs, *(file for file in (gate, calibrate) if file is not None)]
    from llm2slm_export.authoring.artifacts import BUNDLE
    from llm2slm_export.files.atomic import Replacement

    Replacement(target, BUNDLE, force=force, inputs=inputs)  # said before a model is loaded
    human = console.console(stderr=json)
    log = console.StageLog(human)
    engines = asked.choice(log.step)
    try:
        with full_disk(target), _stdout_to_stderr(json):
            from llm2slm_export.authoring.build import build_heads
            from llm2slm_export.authoring.torch_threads import choose_threads, torch_threads

            threads = choose_threads()
            human.print(threads.reason, soft_wrap=True)
            with torch_threads(threads.count):
                manifest = build_heads(
                    source.heads, target, precision=wanted, weight_quantization=weight_quantization, force=force, inputs=inputs, engines=engines,
                    gate=_gate(held_out, max_differing), calibration=fitted, on_start=log.start,
                    on_stage=lambda stage: log.done(stage.name, stage.seconds, stage.bytes),
                )  # fmt: skip
    finally:
        log.stop()
    from llm2slm_export.cli.next_command import example_prompt

    total, peak = _bytes_of(target), _peak_rss_mb()
    for row in [row for manifest in manifest.by_head.values() for row in manifest.parity.rows if gate and row.of_gate]:
        human.print(f"{row.case}: {row.tensor}, {row.measure}: {row.value:.4f}")
    for line in _warnings(manifest, target):
        human.print(line)
    human.print(f"{target} is written: {console.size(total)}, parity passed, peak memory {peak} MB.")
    heads = manifest.by_head
    chosen = ""
    if manifest.heads:
        human.print(f"Heads: {', '.join(heads)}; {manifest.head} where none is named.")
        chosen = f" --head {list(heads)[-1]}"
    own = source.records.get(list(heads)[-1])
    prompt = example_prompt(own.prompts if own is not None else ())
    human.print(f"Next: llm2slm-export run {target}{chosen} {prompt}", soft_wrap=True)
    if json:
        console.print_json(
            {"bundle": str(target), "bytes": total, "stages": log.stages, "heads": list(heads),
             "parity_passed": all(head.parity.passed for head in heads.values()),
             "trained": all(head.trained for head in heads.values()),
             "stand_in_tokenizer": manifest.tokenizer.stand_in, "peak_rss_mb": peak}
        )  # fmt: skip


@app.command()
def run(
    bundle: BundleArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]... | -", help="Prompts; '-' reads one a line from standard input."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar=PROMPT_FILES, help="Prompts of a data file (see --prompt-field), or, of .txt, one a line."
        ),
    ] = None,
    prompt_field: PromptFieldOption = None,
    encoding: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of prompts: what --save-encoding wrote, maybe elsewhere."),
    ] = None,
    save_encoding: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Encode the prompts into this file, and write no response; an earlier encoding is replaced, and no other file.",
        ),
    ] = None,
    head: Annotated[str | None, typer.Option(help="Which of the bundle's heads writes; its first by default.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest response. What is not said, the bundle decides.")
    ] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Shortest response.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams; 1: no beam search.")] = None,
    num_return_sequences: Annotated[
        int | None, typer.Option(help="Responses to each prompt, of beams or of sampling.")
    ] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of beams: above 0 favours long responses.")] = None,
    early_stopping: Annotated[
        Literal["true", "false", "never"] | None,
        typer.Option(help="Of beams: whether to stop once as many are finished."),
    ] = None,
    do_sample: Annotated[bool | None, typer.Option(help="Sample instead of taking the likeliest token.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens; 0: from all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that make up p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below min_p times the likeliest.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Sample from the most typical tokens that make up p.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No sequence of so many tokens twice; 0: no limit.")
    ] = None,
    bad_words: Annotated[
        list[str] | None,
        typer.Option(
            metavar="S",
            help="Never write this text, as it is split into tokens at the start and after a space; can be given several times.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="S", help="Stop at this text; can be given several times.")
    ] = None,
    output_scores: Annotated[
        bool, typer.Option("--output-scores", help="With --json: every token's log-probability.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda[:n] or tensorrt[:n].")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, at most one per core; the runtime's choice by default.")
    ] = None,
    gpu_memory_mb: Annotated[
        int | None,
        typer.Option(min=1, help="With --device cuda: most MB of its memory for each graph's weights and work."),
    ] = None,
    no_cuda_graph: Annotated[
        bool, typer.Option("--no-cuda-graph", help="With --device cuda: launch a step's kernels one by one.")
    ] = False,
    runtime: RuntimeOption = "onnxruntime",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"Most prompts run together; {BATCH_SIZE} by default, or what engines take."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep encodings here, and take those that are here already.")
    ] = None,
    cache_mb: Annotated[int | None, typer.Option(min=1, help="Most MB in --cache; 256 by default.")] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Shorten prompts over the limit instead of refusing them.")
    ] = False,
    split_special_tokens: Annotated[
        bool,
        typer.Option(
            "--split-special-tokens", help="Take text that spells a special token, such as </s>, as any other text."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One object a line for each response.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Times by stage, on stderr.")] = False,
) -> None:
    """Run a bundle on prompts: one is streamed, several are answered in order, one line each (line ends as \\n)."""
    given = {
        "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "num_beams": num_beams,
        "num_return_sequences": num_return_sequences, "length_penalty": length_penalty,
        "early_stopping": {"true": True, "false": False}.get(early_stopping or "", early_stopping),
        "do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "typical_p": typical_p, "repetition_penalty": repetition_penalty, "no_repeat_ngram_size": no_repeat_ngram_size,
        "seed": seed, "stop": tuple(stop) if stop else None, "output_scores": output_scores or None,
    }  # fmt: skip
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    _refuse_run({
        "--output-scores goes with --json": output_scores and not json,
        "--cache-mb goes with --cache": cache_mb is not None and cache is None,
        f"--cache {cache} lies in the bundle": cache is not None
        and bundle.resolve() in (cache.resolve(), *cache.resolve().parents),
        "--encoding takes the place of prompts": encoding is not None and bool(prompts or file),
        "--encoding is not saved again: leave out --save-encoding": encoding is not None and save_encoding is not None,
        "--batch-size is for prompts that are answered; an encoding is one batch": batch_size is not None
        and (encoding is not None or save_encoding is not None),
        "--truncate and --cache are for prompts, not for --encoding": encoding is not None and bool(truncate or cache),
        "--split-special-tokens is for prompts, not for --encoding": encoding is not None and split_special_tokens,
        "--profile and options of generation are for responses, not for --save-encoding": save_encoding is not None
        and bool(options or bad_words or profile),
    })  # fmt: skip
    from llm2slm_export.cli.prompt_files import Prompt, read_prompts, with_locations
    from llm2slm_export.cli.responses import print_answers, print_profile, print_stream
    from llm2slm_export.cli.terminal import standard_input
    from llm2slm_export.inference.encodings.cache import DEFAULT_BYTES, EncodingCache
    from llm2slm_export.inference.orchestrator import load

    if save_encoding is not None:
        from llm2slm_export.files.atomic import Replacement
        from llm2slm_export.inference.encodings.safetensors_file import TENSORS

        # Said before the prompts are encoded.
        Replacement(save_encoding, TENSORS, inputs=[bundle], option="--save-encoding")
    reading = {"truncate": truncate} | ({"split_special_tokens": True} if split_special_tokens else {})
    unknown: UnknownTokenError | None = None
    read: list[Prompt] = []
    _refuse_unused_field(prompt_field, "--file", file)
    if encoding is None:
        field, origin = None, ""
        if file is not None:
            field, origin = _prompt_field(file, "--file", prompt_field, _record_of(bundle, prompt_field))
        read = read_prompts(prompts or [], file, standard_input, prompt_field=field, origin=origin)
    texts = [prompt.text for prompt in read]
    max_bytes = DEFAULT_BYTES if cache_mb is None else cache_mb * 10**6
    kept = None if cache is None else EncodingCache(max_bytes=max_bytes, directory=cache)
    part: BundlePart = "reader" if save_encoding else "writer" if encoding else "pair"
    cuda = None
    if gpu_memory_mb is not None or no_cuda_graph:
        from llm2slm_export.inference.runtime.onnxruntime.cuda_backend import CudaOptions

        memory_bytes = None if gpu_memory_mb is None else gpu_memory_mb * 10**6
        cuda = CudaOptions(memory_bytes=memory_bytes, graphs=not no_cuda_graph)
    with load(
        bundle, head=head, device=device, threads=threads, runtime=runtime, part=part, cache=kept, cuda=cuda
    ) as pair:
        _tell_measured(bundle, pair, runtime, threads)
        told = pair.warnings
        for note in told:
            print(note, file=sys.stderr)
        if bad_words:
            options["bad_words_ids"] = pair.bad_words_ids(bad_words)
        try:
            if save_encoding is not None:
                _save_encoding(pair, texts, bundle, save_encoding, head=head, json=json, **reading)
                return
            if encoding is not None:
                parts = iter([pair.generate_from(pair.load_encoding(encoding), **options)])
                answered = print_answers(parts, [], json=json)
            elif len(read) == 1 and not json and _streams(pair.options(**options)):
                answered = print_stream(pair.stream(texts[0], **reading, **options), read[0])
            else:
                size = batch_size or pair.at_a_time(BATCH_SIZE, **options)
                try:
                    parts = pair.generate_batches(texts, batch_size=size, **reading, **options)
                except UnknownTokenError as error:
                    # The others are answered before it is told.
                    unknown = error
                    kept_texts = [text for index, text in enumerate(texts) if index not in error.prompts]
                    if not kept_texts:
                        raise
                    parts = pair.generate_batches(kept_texts, batch_size=size, **reading, **options)
                answered = print_answers(parts, read, json=json, refused=unknown.prompts if unknown else {})
        except PromptError as error:
            raise with_locations(error, read) from error
    for warning in dict.fromkeys(warning for generation in answered for warning in generation.warnings):
        if warning not in told:
            print(warning, file=sys.stderr)
    if profile:
        print_profile(answered)
    if unknown is not None:
        raise with_locations(unknown, read)


def _refuse_run(mistakes: dict[str, bool]) -> None:
    """Raise `UsageError` with every sentence that is true."""
    made = [mistake for mistake, is_made in mistakes.items() if is_made]
    if made:
        raise UsageError("These options do not go together.", *made, remedy="leave out one side of each")


def _told_threads(threads: int | None) -> int | None:
    """As many threads as are used where so many are asked for; on stderr, why they are fewer."""
    from llm2slm_export.environment.cores import thread_notes, usable_threads

    for note in thread_notes(threads):
        print(note, file=sys.stderr)
    return None if threads is None else usable_threads(threads)


def _tell_measured(directory: Path, pair: "Orchestrator", runtime: str, threads: int | None) -> None:
    """Say, on stderr, what `auto` has chosen and why."""
    if "auto" not in runtime:
        return
    from llm2slm_export.bundle.bundle import Bundle
    from llm2slm_export.inference.runtime.selection import measure

    for entry in measure(Bundle(directory, pair.manifest), runtime, graphs=list(pair.runtimes), threads=threads):
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in entry.ms.items())
        kept = f"kept in {entry.kept_in}" if entry.kept_in else "the cache directory cannot be written: not kept"
        print(f"{entry.graph}: {entry.fastest} ({times}; {kept})", file=sys.stderr)


def _streams(options: "GenerationOptions") -> bool:
    """Whether a single response can be shown as it is written; where it cannot, say why nothing is seen yet."""
    if options.num_beams > 1:
        print("beams are printed when they are complete", file=sys.stderr)
    elif options.num_return_sequences > 1:
        print("several responses are printed when they are complete", file=sys.stderr)
    return options.num_beams == options.num_return_sequences == 1


def _save_encoding(
    pair: "Orchestrator",
    texts: list[str],
    bundle: Path,
    target: Path,
    *,
    head: str | None,
    json: bool,
    **reading: bool,
) -> None:
    from llm2slm_export.cli import console

    encoding = pair.encode(texts, **reading)
    pair.save_encoding(encoding, target)
    written, human = target.stat().st_size, console.console(stderr=json)
    human.print(f"{target} is written: {len(encoding)} prompts, {console.size(written)}.")
    chosen = f" --head {head}" if head is not None else ""
    human.print(f"Next: llm2slm-export run {bundle}{chosen} --encoding {target}", soft_wrap=True)
    if json:
        console.print_json(
            {"encoding": str(target), "bytes": written, "prompts": len(encoding), "prompt_tokens": encoding.prompt_tokens,
             "dropped_tokens": encoding.dropped_tokens}
        )  # fmt: skip


@app.command()
def verify(
    bundle: BundleArgument,
    composition: Annotated[Path | None, typer.Option(metavar="DIR", help="Compare with it numerically too.")] = None,
    head: Annotated[str | None, typer.Option(help="Which head the composition is of; the first by default.")] = None,
    gate: GateOption = None,
    max_differing: MaxDifferingOption = None,
    prompt_field: PromptFieldOption = None,
    runtime: Annotated[
        str | None, typer.Option(metavar="R|GRAPH=R,…", help="What runs the graphs that are compared; see `run`.")
    ] = None,
    json: Json = False,
) -> None:
    """Check a bundle's hashes and, with its composition at hand, that it computes the same."""
    needing = {"head": head, "gate": gate, "max-differing": max_differing, "runtime": runtime}
    alone = [f"--{name} {value}" for name, value in needing.items() if value is not None]
    if alone and composition is None:
        raise UsageError(
            f"{' and '.join(alone)} go{'es' if len(alone) == 1 else ''} with --composition.",
            remedy="add --composition DIR, or leave it out",
        )
    from llm2slm_export.authoring.training_record import read_record

    _refuse_unused_field(prompt_field, "--gate", gate)
    held_out = _texts("--gate", gate, prompt_field, read_record(composition) if composition is not None else None)
    if composition is not None:
        require_extra("build", *BUILD_MODULES, purpose="`verify --composition`")
    from llm2slm_export.bundle.bundle import open_bundle
    from llm2slm_export.cli import console

    files = open_bundle(bundle).manifest.files
    report = None
    if composition is not None:
        from llm2slm_export.authoring.parity.compare import verify as compare

        with _stdout_to_stderr(json):
            report = compare(
                bundle, composition, head, gate=_gate(held_out, max_differing), runtime=runtime or "onnxruntime"
            )
    human = console.console(stderr=json)
    human.print(f"{bundle}: {len(files)} files, {console.size(sum(file.bytes for file in files))}, as built.")
    if report is not None:
        human.print(console.parity_table(report.rows))
        human.print("Parity passed." if report.passed else "Parity FAILED.")
    else:
        human.print("Only hashes were checked; --composition DIR compares the numbers too.")
    if json:
        parity = None if report is None else report.model_dump(mode="json") | {"passed": report.passed}
        console.print_json({"bundle": str(bundle), "files": len(files), "hashes": True, "parity": parity})
    if report is not None and not report.passed:
        raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    bundle: BundleArgument,
    data: Annotated[Path, typer.Option(metavar="FILE", help="Held-out prompts and responses: JSONL, TSV or CSV.")],
    head: Annotated[str | None, typer.Option(help="Which of the bundle's heads; its first by default.")] = None,
    composition: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What it was built from; runs/ and compositions/ are looked in.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(metavar="llm|slm[=DIR]", help="Compare with that model alone, or NAME=BUNDLE; several times."),
    ] = None,
    baseline_precision: BaselinePrecisionOption = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="And with no, zero, a constant and another prompt's conditioning.")
    ] = False,
    metrics: Annotated[
        str, typer.Option(metavar="M,M…", help="Of bleu, chrf, rouge, exact_match, loss.")
    ] = "bleu,chrf",
    prompt_field: PromptFieldOption = None,
    response_field: ResponseFieldOption = None,
    task_field: Annotated[
        str | None, typer.Option(metavar="NAME|N", help="Key or column of a task's name, for scores by task.")
    ] = None,
    train_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Refuse prompts that are in it; training.json's by default.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Most prompts; all by default.")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Of every system's responses.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="The bundle's by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together for scoring.")] = 32,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Shorten prompts over the limit instead of refusing them.")
    ] = False,
    speed_prompts: Annotated[int, typer.Option(min=0, help="Prompts to time; 0: time nothing.")] = 16,
    speed_tokens: Annotated[int, typer.Option(min=2, help="Response length of ms per token.")] = 64,
    speed_rounds: Annotated[int, typer.Option(min=1, help="Times that each is timed.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda[:n].")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, at most one per core; the runtime's choice by default.")
    ] = None,
    runtime: RuntimeOption = "onnxruntime",
    seed: Annotated[int, typer.Option(min=0, help="Of the tests, the intervals and the learned constant.")] = 0,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Responses and baselines kept; runs/<name>/eval by default.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a page with plots that opens offline; an earlier page is replaced, and no other file.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Score and time a bundle on held-out data, against its LLM alone, its SLM alone and the controls."""
    require_extra("eval", *EVAL_MODULES, purpose="`eval`")
    from llm2slm_export.authoring.training_record import fields_of, record_of
    from llm2slm_export.bundle.manifest_file import read_manifest
    from llm2slm_export.cli import console
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
    choice = EvaluationRequest(
        bundle, head, composition, tuple(baseline or ()), controls, train_data, given, device, _told_threads(threads), runtime,
        work or Path("runs") / manifest.name / "eval", seed, _baseline_precision(baseline_precision),
    )  # fmt: skip
    from llm2slm_export.evaluation.html_report import PAGE, page
    from llm2slm_export.files.atomic import Replacement

    drawn = None if html is None else Replacement(html, PAGE, inputs=[bundle], option="--html")
    human = console.console(stderr=json)
    with _stdout_to_stderr(json), console.WorkLog(human) as log:
        report = run_evaluation(choice, settings, log)
    console.print_evaluation(human, report)
    if json:
        console.print_json(report.model_dump(mode="json"))
    if drawn is not None:
        with drawn.written() as new:
            new.write_text(page(report), encoding="utf-8")
        human.print(f"{html} is written.")
    from llm2slm_export.cli.next_command import after_evaluation

    after = after_evaluation(choice, data, {"prompt": prompt_field, "response": response_field}, report.composition)
    human.print(f"Next: llm2slm-export {after}", soft_wrap=True)


def _baseline_precision(text: str | None) -> dict[GraphName, Precision] | None:
    return None if text is None else parse_precision(text, {}, option="--baseline-precision")


@app.command()
def bench(
    bundle: BundleArgument,
    head: Annotated[str | None, typer.Option(help="Which of the bundle's heads; its first by default.")] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=BUNDLE|llm|slm[=DIR]", help="Compare with it in the same run; several times."),
    ] = None,
    baseline_precision: BaselinePrecisionOption = None,
    composition: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For --baseline llm and slm: what the bundle was built from.")
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(metavar="N,N…", help="Prompt lengths, in the LLM's tokens.")] = "64",
    new_tokens: Annotated[int, typer.Option(min=2, help="Length of every response.")] = 128,
    batch_size: Annotated[str, typer.Option(metavar="N,N…", help="Prompts that are answered together.")] = "1",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is timed; one more comes first.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda[:n].")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, at most one per core; the runtime's choice by default.")
    ] = None,
    runtime: RuntimeOption = "onnxruntime",
    seed: Annotated[int, typer.Option(min=0, help="Of the made-up prompts.")] = 0,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Baselines kept; runs/<name>/eval by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Time a bundle: its stages, tokens per second, share of the memory's bandwidth; made-up prompts, forced lengths."""
    from llm2slm_export.bundle.manifest_file import read_manifest
    from llm2slm_export.cli import console
    from llm2slm_export.evaluation.compared_systems import EvaluationRequest, compared_systems
    from llm2slm_export.evaluation.latency import BenchSettings, batches
    from llm2slm_export.evaluation.latency import bench as run_bench

    lengths, rows = _counts(prompt_tokens, "--prompt-tokens"), _counts(batch_size, "--batch-size")
    settings = BenchSettings(lengths, new_tokens, rows, rounds, seed)
    threads = _told_threads(threads)
    choice = EvaluationRequest(
        bundle, head, composition, tuple(baseline or ()), device=device, threads=threads, runtime=runtime,
        work=work or Path("runs") / read_manifest(bundle).name / "eval",
        baseline_precision=_baseline_precision(baseline_precision),
    )  # fmt: skip
    human = console.console(stderr=json)
    # The prompts are made later, of lengths that fit: there are none to check, and none to look for in training data.
    with (
        _stdout_to_stderr(json),
        console.WorkLog(human) as log,
        closing(compared_systems(choice, [], truncate=True, progress=log)) as made,
    ):
        log.start("timing", batches(len(made.systems), settings))
        systems = {system.name: system.orchestrator() for system in made.systems}
        _tell_measured(bundle, systems[made.systems[0].name], runtime, threads)
        report = run_bench(
            made.systems[0].bundle, systems, settings, threads=threads, advance=log.advance, notes=made.notes
        )
    console.print_bench(human, report)
    if json:
        console.print_json(report.model_dump(mode="json"))


def _counts(text: str, option: str) -> tuple[int, ...]:
    """Positive numbers, separated by commas.

    Raises:
        UsageError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"{option} is {text!r}.", remedy=f"give numbers from 1 on, such as {option} 64,256")
    return tuple(dict.fromkeys(int(part) for part in parts))


@app.command()
def inspect(bundle: BundleArgument, json: Json = False) -> None:
    """Tell what a bundle is: models, graphs, tensors, sizes, defaults, parity."""
    from llm2slm_export.bundle.manifest_file import read_manifest
    from llm2slm_export.cli import console

    manifest = read_manifest(bundle)
    total = _bytes_of(bundle)
    files = {graph.file for head in manifest.by_head.values() for graph in head.graphs.values()}
    sizes = {entry.path: entry.bytes for entry in manifest.files} | {
        file: _graph_bytes(manifest, file) for file in files
    }
    if json:
        by_head = {
            name: {graph: sizes[entry.file] for graph, entry in head.graphs.items()}
            for name, head in manifest.by_head.items()
        }
        told = {"graph_bytes": by_head[manifest.head], "graph_bytes_by_head": by_head, "total_bytes": total}
        console.print_json(manifest.model_dump(mode="json") | told)
    else:
        console.print_manifest(console.console(), manifest, sizes, total)


@app.command()
def plan(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A YAML file, or a name from `recipes ls`.")
    ] = None,
    llm: LlmOption = None,
    slm: SlmOption = None,
    fusion: FusionOption = None,
    tokenizer: TokenizerOption = None,
    layer: LayerOption = None,
    projector: ProjectorOption = None,
    precision: PrecisionOption = None,
    block_size: BlockSizeOption = None,
    quantize_lm_head: QuantizeLmHeadOption = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length to plan for.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Response length to plan for.")] = 128,
    json: Json = False,
) -> None:
    """Tell sizes, memory and predicted times of a pair; downloads no weights."""
    require_extra("build", *BUILD_MODULES, purpose="`plan`")
    from llm2slm_export.cli import console

    pair = named_pair(recipe, llm, slm, FusionOptions(fusion, tokenizer, layer, projector))
    wanted = parse_precision(precision, pair.precision)
    weight_quantization = chosen_weight_quantization(block_size, quantize_lm_head, pair.weight_quantization, wanted, {})
    from llm2slm_export.authoring.plan import plan as make_plan

    made = make_plan(
        pair.llm, pair.slm, precision=wanted, weight_quantization=weight_quantization, pair_config=pair.pair_config, prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )  # fmt: skip
    if json:
        console.print_json(asdict(made))
    else:
        console.print_plan(console.console(), made)


@app.command()
def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Check that this bundle opens here.")
    ] = None,
    json: Json = False,
) -> None:
    """Tell what this machine has, which extras are complete, and whether a bundle opens here."""
    from llm2slm_export.cli import console
    from llm2slm_export.doctor import diagnose

    found = diagnose(bundle)
    if json:
        extras = [asdict(extra) | {"complete": extra.complete, "pip": extra.pip} for extra in found.extras]
        checked = asdict(found.bundle) | {"ok": found.bundle.ok} if found.bundle else None
        console.print_json(asdict(found) | {"extras": extras, "bundle": checked})
    else:
        console.print_diagnosis(console.console(), found)
    if found.bundle is not None and not found.bundle.ok:
        raise typer.Exit(1)


@recipes_app.command("ls")
def list_recipes() -> None:
    """List them, with the first sentence of each."""
    from llm2slm_export.authoring import recipe
    from llm2slm_export.cli import console

    rows = ((path.stem, _first_sentence(path)) for path in recipe.list_recipes())
    console.console().print(console.Table(None, ("recipe", "what it is"), rows))


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print one."""
    from llm2slm_export.authoring.recipe import find_recipe

    print(find_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    destination: Annotated[Path | None, typer.Argument(metavar="[DEST]", help="<name>.yaml here by default.")] = None,
) -> None:
    """Copy one, to change it."""
    from llm2slm_export.authoring.recipe import find_recipe

    source = find_recipe(name)
    target = destination or Path(source.name)
    target = target / source.name if target.is_dir() else target
    from llm2slm_export.authoring.artifacts import RECIPE
    from llm2slm_export.files.atomic import Replacement
    from llm2slm_export.files.names import safe_name

    # The copy is a pair of its own, and what is made of it lies under its own name.
    text = re.sub(
        r"^name: .*$",
        f"name: {safe_name(target.stem)}",
        source.read_text(encoding="utf-8"),
        count=1,
        flags=re.MULTILINE,
    )
    with Replacement(target, RECIPE, option="DEST").written() as new:
        new.write_text(text, encoding="utf-8")
    from llm2slm_export.cli.next_command import after_copying

    print(f"Next: edit {target}, then llm2slm-export {after_copying(target)}")


def _first_sentence(path: Path) -> str:
    """Of the comment that a recipe begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.lstrip("# ").strip() for line in lines)
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def _warnings(manifest: "Manifest", directory: Path) -> Iterator[str]:
    from llm2slm_export.cli.console import untrained_effect
    from llm2slm_export.inference.tokenization import open_tokenizer, tokens_without_rows

    for name, head in manifest.by_head.items():
        if not head.trained:
            which = f"the head {name!r}" if manifest.heads else "the pair"
            yield f"WARNING: {which} is untrained: {untrained_effect(head)}."
    if manifest.tokenizer.stand_in:
        yield "WARNING: a byte-level stand-in takes the place of the models' tokenizers: good for sizes and speed, not for text."
    rows = min((head.prompt_vocab for head in manifest.by_head.values() if head.prompt_vocab is not None), default=None)
    if rows is not None and (beyond := tokens_without_rows(open_tokenizer(directory / manifest.tokenizer.llm), rows)):
        shown = ", ".join(map(repr, beyond[:5])) + (" …" if len(beyond) > 5 else "")
        yield (
            f"WARNING: the prompt's tokenizer has {len(beyond)} tokens beyond the {rows} rows of the models' tables: {shown}. "
            "Prompts that hold one of them are refused."
        )


def _graph_bytes(manifest: "Manifest", file: str) -> int:
    """A graph's file and its external data, which is named after it."""
    return sum(entry.bytes for entry in manifest.files if entry.path == file or entry.path.startswith(f"{file}."))


def _bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _texts(option: str, file: Path | None, given: str | None, record: "TrainingRecord | None") -> tuple[str, ...]:
    """The prompts of a file that an option names; none where it names none."""
    from llm2slm_export.cli.prompt_files import read_file

    if file is None:
        return ()
    field, origin = _prompt_field(file, option, given, record)
    return tuple(prompt.text for prompt in read_file(file, option, field, origin))


def _prompt_field(
    file: Path, option: str, given: str | None, record: "TrainingRecord | None"
) -> "tuple[Field | None, str]":
    """Where the prompts of a file are, and who says so; None: in its lines."""
    from llm2slm_export.authoring.training_record import fields_of
    from llm2slm_export.files.data_files import kind_of

    if kind_of(file) == "text":
        if given is not None:
            raise UsageError(
                f"{option} {file} has a prompt a line, and no fields.",
                f"--prompt-field {given}",
                remedy="leave out --prompt-field, or name the file .jsonl, .tsv or .csv",
            )
        return None, ""
    fields, origin = fields_of(file, {"prompt": given}, record)
    return fields["prompt"], origin


def _record_of(bundle: Path, given: str | None) -> "TrainingRecord | None":
    """What the training of a bundle's pair has recorded, where that is needed and at hand."""
    from llm2slm_export.authoring.training_record import record_of
    from llm2slm_export.bundle.manifest_file import read_manifest

    if given is not None:
        return None
    try:
        name = read_manifest(bundle).name
    except BundleError:  # told when it is loaded
        return None
    return record_of(name)


def _refuse_unused_field(given: str | None, options: str, *files: Path | None) -> None:
    if given is not None and not any(files):
        raise UsageError(
            f"--prompt-field {given} goes with {options}.", remedy=f"add {options} with a file, or leave it out"
        )


def _gate(prompts: tuple[str, ...], differing: float | None) -> "Gate | None":
    """Raise `UsageError` for a share without prompts."""
    if not prompts:
        if differing is not None:
            raise UsageError(
                f"--max-differing {differing} is of a gate's tokens.", remedy="add --gate FILE, or leave it out"
            )
        return None
    from llm2slm_export.authoring.parity.compare import Gate

    return Gate(prompts, differing)


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
    from llm2slm_export.cli.terminal import show_warning

    warnings.showwarning = show_warning
    app(prog_name="llm2slm-export")
