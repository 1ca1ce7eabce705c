"""`build`: export a pair as a bundle."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llm2slm_export.authoring.pair_sources import BuildChoice, FusionOptions, pair_source
from llm2slm_export.cli import console
from llm2slm_export.cli.exit_codes import full_disk
from llm2slm_export.cli.export_options import (
    BUILD_MODULES,
    ENGINE_PRECISIONS,
    EngineRequest,
    chosen_weight_quantization,
    parse_gate,
    parse_llm_head_precision,
    parse_precision,
)
from llm2slm_export.cli.help import ENGINES, MODELS, OUTPUT, QUANTIZATION
from llm2slm_export.cli.options import (
    PROMPT_FILE_KINDS,
    BlockSizeOption,
    ForceOption,
    FusionOption,
    GateOption,
    JsonOption,
    LayerOption,
    LlmHeadOption,
    LlmHeadPrecisionOption,
    LlmOption,
    MaxDifferingOption,
    PrecisionOption,
    ProjectorOption,
    PromptFieldOption,
    QuantizeLmHeadOption,
    SlmOption,
    TokenizerOption,
)
from llm2slm_export.cli.prompt_fields import prompts_of, refuse_unused_field
from llm2slm_export.cli.resources import directory_bytes, peak_memory_mb
from llm2slm_export.cli.terminal import stdout_to_stderr
from llm2slm_export.contract import LLM_HEAD, WEIGHT_BITS, Precision
from llm2slm_export.errors import UsageError, require_extra

if TYPE_CHECKING:
    from rich.console import Console

    from llm2slm_export.authoring.training_record import TrainingRecord
    from llm2slm_export.bundle.manifest import Manifest
EXAMPLES = """
llm2slm-export build --composition compositions/tatoeba-en-fr
llm2slm-export build --llm t5-base --slm t5-small --random-weights
llm2slm-export build tatoeba-en-fr --precision encoder=int8,decoder=int8
"""


def build(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Recipe that `train` has run on, or that trains nothing.")
    ] = None,
    composition: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=MODELS, help="Composition directory that `train` wrote."),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            rich_help_panel=MODELS,
            help="Composition to export as a head of that name, with the other heads over one shared LLM. Repeatable.",
        ),
    ] = None,
    llm_head: LlmHeadOption = False,
    llm: LlmOption = None,
    slm: SlmOption = None,
    fusion: FusionOption = None,
    tokenizer: TokenizerOption = None,
    layer: LayerOption = None,
    projector: ProjectorOption = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            rich_help_panel=MODELS,
            help="Draw random weights for --llm and --slm; their configurations are enough.",
        ),
    ] = False,
    seed: Annotated[
        int | None, typer.Option(rich_help_panel=MODELS, help="Random seed of --random-weights (default: 0).")
    ] = None,
    precision: PrecisionOption = None,
    llm_head_precision: LlmHeadPrecisionOption = None,
    block_size: BlockSizeOption = None,
    quantize_lm_head: QuantizeLmHeadOption = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=QUANTIZATION,
            help="Calibration prompts for a decoder's int8 or int4 weights, and for an encoder's w8a8 scales "
            f"({PROMPT_FILE_KINDS}).",
        ),
    ] = None,
    gate: GateOption = None,
    max_differing: MaxDifferingOption = None,
    prompt_field: PromptFieldOption = None,
    backend: Annotated[
        Literal["onnx", "tensorrt", "tensorrt-rtx"] | None,
        typer.Option(
            rich_help_panel=ENGINES,
            help="Engines to build beside the ONNX graphs; onnx builds none. tensorrt needs the GPU that the engines are for "
            "(default: the recipe's, else onnx).",
        ),
    ] = None,
    engine_precision: Annotated[
        str | None,
        typer.Option(
            metavar="P|GRAPH=P,…",
            rich_help_panel=ENGINES,
            help=f"Precision of the engines: {', '.join(ENGINE_PRECISIONS)} (default: the recipe's, else fp16).",
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=ENGINES, help="Maximum batch size of the TensorRT engines (default: the recipe's, else 8)."
        ),
    ] = None,
    max_prompt: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=ENGINES,
            help="Maximum prompt length of the engines, in tokens (default: the recipe's, else the pair's).",
        ),
    ] = None,
    max_new: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=ENGINES,
            help="Maximum response length of the engines, in tokens (default: the recipe's, else the pair's).",
        ),
    ] = None,
    prompt_buckets: Annotated[
        str | None,
        typer.Option(
            metavar="N,…",
            rich_help_panel=ENGINES,
            help="Prompt lengths, in tokens, that get an optimization profile of their own besides the maximum (default: the "
            "recipe's, else none).",
        ),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            metavar="N.N,…",
            rich_help_panel=ENGINES,
            help="GPU compute capabilities that tensorrt-rtx engines are built for (default: the recipe's, else 8.6,8.9,12.0).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", rich_help_panel=OUTPUT, help="Bundle directory to write (default: engines/<name>)."
        ),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Export a pair as a bundle of three ONNX graphs.

    The pair is a recipe's, a composition, several compositions as heads, or two models by name. The graphs are compared
    with the unmodified models, and nothing is kept unless they match.
    """
    require_extra("build", *BUILD_MODULES, purpose="`build`")
    source = pair_source(
        BuildChoice(
            recipe, composition, tuple(head or ()), llm, slm, FusionOptions(fusion, tokenizer, layer, projector),
            random_weights=random_weights, seed=seed, llm_head=llm_head,
        )
    )  # fmt: skip
    wanted = parse_precision(precision, source.precision)
    of_llm_head = parse_llm_head_precision(llm_head_precision, source.llm_head, wanted)
    asked = EngineRequest(
        backend, engine_precision, max_batch, max_prompt, max_new, prompt_buckets, compute_capability, source.engines
    )
    compiled = asked.precisions()
    weight_quantization = chosen_weight_quantization(
        block_size, quantize_lm_head, source.weight_quantization, wanted, compiled, of_llm_head
    )
    decoders = {part.get("decoder") for part in (wanted, of_llm_head, compiled)}
    _check_calibration(calibrate, wanted["encoder"], decoders)
    # The first head's record: all heads share the LLM and its prompts.
    record = next(iter(source.records.values()), None)
    refuse_unused_field(prompt_field, "--gate or --calibrate", gate, calibrate)
    held_out = prompts_of("--gate", gate, prompt_field, record)
    fitted = prompts_of("--calibrate", calibrate, prompt_field, record)
    target = out or Path("engines") / source.name
    inputs = [*source.inputs, *(file for file in (gate, calibrate) if file is not None)]
    from llm2slm_export.authoring.artifacts import BUNDLE
    from llm2slm_export.files.atomic import Replacement

    Replacement(target, BUNDLE, force=force, inputs=inputs)  # before a model is loaded
    human = console.console(stderr=json)
    log = console.StageLog(human)
    engines = asked.choice(log.step)
    try:
        with full_disk(target), stdout_to_stderr(json):
            from llm2slm_export.authoring.build import build_heads
            from llm2slm_export.authoring.build_options import BuildOptions
            from llm2slm_export.authoring.torch_threads import choose_threads, torch_threads

            options = BuildOptions(
                wanted, weight_quantization, parse_gate(held_out, max_differing), fitted, engines,
                head_precision={LLM_HEAD: of_llm_head},
            )  # fmt: skip
            threads = choose_threads()
            human.print(threads.reason, soft_wrap=True)
            with torch_threads(threads.count):
                manifest = build_heads(
                    source.heads, target, options, force=force, inputs=inputs, on_start=log.start,
                    on_stage=lambda stage: log.done(stage.name, stage.seconds, stage.bytes),
                )  # fmt: skip
    finally:
        log.stop()
    total, peak = directory_bytes(target), peak_memory_mb()
    for row in [row for manifest in manifest.by_head.values() for row in manifest.parity.rows if gate and row.of_gate]:
        human.print(f"{row.case}: {row.tensor}, {row.measure}: {row.value:.4f}")
    for line in _warnings(manifest, target):
        human.print(line)
    human.print(f"{target} is written: {console.size(total)}, parity passed, peak memory {peak} MB.")
    _print_next(human, manifest, target, source.records)
    if json:
        heads = manifest.by_head
        console.print_json(
            {"bundle": str(target), "bytes": total, "stages": log.stages, "heads": list(heads),
             "parity_passed": all(head.parity.passed for head in heads.values()),
             "trained": all(head.trained for head in heads.values()),
             "stand_in_tokenizer": manifest.tokenizer.stand_in, "peak_rss_mb": peak}
        )  # fmt: skip


def _check_calibration(calibrate: Path | None, encoder: Precision, decoder: Collection[str | None]) -> None:
    """Refuse calibration prompts that nothing is fitted to, and a w8a8 encoder without any.

    Args:
        decoder: the precisions of the decoder's graph, of the LLM head's, and of the engine.

    Raises:
        UsageError: either of the two.
    """
    if encoder == "w8a8" and calibrate is None:
        raise UsageError(
            "An encoder at w8a8 needs calibration prompts.", "--calibrate is not given",
            remedy="add --calibrate FILE with a hundred or more typical prompts, or use encoder=int8",
        )  # fmt: skip
    if calibrate is not None and encoder != "w8a8" and WEIGHT_BITS.keys().isdisjoint(decoder):
        raise UsageError(
            f"--calibrate {calibrate} is for a decoder at int8 or int4, and an encoder at w8a8.",
            f"encoder: {encoder}, decoder: {' and '.join(sorted(filter(None, decoder)))}",
            remedy="add --precision decoder=int8, or leave out --calibrate",
        )


def _print_next(
    human: "Console", manifest: "Manifest", target: Path, records: "Mapping[str, TrainingRecord | None]"
) -> None:
    """Print the heads, and the command that runs the last of them on a prompt of its training data."""
    from llm2slm_export.cli.next_command import example_prompt

    heads, option = list(manifest.by_head), ""
    if manifest.heads:
        human.print(f"Heads: {', '.join(heads)} (default: {manifest.head}).")
        option = f" --head {heads[-1]}"
    record = records.get(heads[-1])
    prompt = example_prompt(record.prompts if record is not None else ())
    human.print(f"Next: llm2slm-export run {target}{option} {prompt}", soft_wrap=True)


def _warnings(manifest: "Manifest", directory: Path) -> Iterator[str]:
    from llm2slm_export.inference.tokenization import open_tokenizer, tokens_without_rows

    for name, head in manifest.by_head.items():
        if not head.trained:
            which = f"the head {name!r}" if manifest.heads else "the pair"
            yield f"WARNING: {which} is untrained: {console.untrained_effect(head)}."
    if manifest.tokenizer.stand_in:
        yield "WARNING: a byte-level stand-in replaces the models' tokenizers; use it for sizes and speed, not for text."
    rows = min((head.prompt_vocab for head in manifest.by_head.values() if head.prompt_vocab is not None), default=None)
    if rows is not None and (beyond := tokens_without_rows(open_tokenizer(directory / manifest.tokenizer.llm), rows)):
        shown = ", ".join(map(repr, beyond[:5])) + (" …" if len(beyond) > 5 else "")
        yield (
            f"WARNING: the prompt's tokenizer has {len(beyond)} tokens beyond the {rows} rows of the models' tables: {shown}. "
            "Prompts that hold one of them are refused."
        )
