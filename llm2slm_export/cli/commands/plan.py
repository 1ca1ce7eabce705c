"""`plan`: predict a pair's sizes, memory and times."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from llm2slm_export.authoring.pair_sources import FusionOptions, named_pair
from llm2slm_export.cli import console
from llm2slm_export.cli.console import Table, facts_table, size
from llm2slm_export.cli.export_options import (
    BUILD_MODULES,
    chosen_weight_quantization,
    parse_llm_head_precision,
    parse_precision,
)
from llm2slm_export.cli.help import INPUT
from llm2slm_export.cli.options import (
    BlockSizeOption,
    FusionOption,
    JsonOption,
    LayerOption,
    LlmHeadOption,
    LlmHeadPrecisionOption,
    LlmOption,
    OptionalRecipeArgument,
    PrecisionOption,
    ProjectorOption,
    QuantizeLmHeadOption,
    SlmOption,
    TokenizerOption,
)
from llm2slm_export.contract import LLM_HEAD
from llm2slm_export.errors import require_extra

if TYPE_CHECKING:
    from rich.console import Console

    from llm2slm_export.authoring.plan import Plan
EXAMPLES = """
llm2slm-export plan tatoeba-en-fr
llm2slm-export plan --llm t5-xl --slm t5-small --precision int8
"""


def plan(
    recipe: OptionalRecipeArgument = None,
    llm: LlmOption = None,
    slm: SlmOption = None,
    fusion: FusionOption = None,
    tokenizer: TokenizerOption = None,
    layer: LayerOption = None,
    projector: ProjectorOption = None,
    llm_head: LlmHeadOption = False,
    precision: PrecisionOption = None,
    llm_head_precision: LlmHeadPrecisionOption = None,
    block_size: BlockSizeOption = None,
    quantize_lm_head: QuantizeLmHeadOption = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=INPUT, help="Length of the prompt, in tokens.")
    ] = 64,
    new_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=INPUT, help="Length of the response, in tokens.")
    ] = 128,
    json: JsonOption = False,
) -> None:
    """Predict the sizes, memory and times of a pair.

    The pair is a recipe's, or two models by name. No weights are downloaded.
    """
    require_extra("build", *BUILD_MODULES, purpose="`plan`")
    pair = named_pair(recipe, llm, slm, FusionOptions(fusion, tokenizer, layer, projector))
    wanted = parse_precision(precision, pair.precision)
    beside = {} if llm_head and pair.llm_head is None else pair.llm_head
    of_llm_head = parse_llm_head_precision(llm_head_precision, beside, wanted)
    weight_quantization = chosen_weight_quantization(
        block_size, quantize_lm_head, pair.weight_quantization, wanted, {}, of_llm_head
    )
    from llm2slm_export.authoring.plan import plan as make_plan

    made = make_plan(
        pair.llm, pair.slm, precision=wanted, weight_quantization=weight_quantization, pair_config=pair.pair_config,
        llm_head=None if beside is None else of_llm_head, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
    )  # fmt: skip
    if json:
        console.print_json(asdict(made))
    else:
        print_plan(console.console(), made)


def print_plan(to: "Console", plan: "Plan") -> None:
    """Print the sizes and the predicted times of a pair."""
    p, cache, machine = plan.parameters, plan.cache, plan.machine
    parts = (("LLM", p.llm), ("LLM encoder", p.llm_encoder), ("projector", p.projector), ("SLM", p.slm),
             ("read per SLM step", p.slm_step), ("read per LLM step", p.llm_step))  # fmt: skip
    to.print(f"{plan.llm} → {plan.slm} ({plan.shape.slm_kind}, {plan.fusion})")
    to.print()
    to.print(
        Table(
            "Parameters",
            ("part", "count"),
            ((name, f"{count / 1e6:,.1f} M") for name, count in parts if count is not None),
            right=(1,),
        )
    )
    to.print()
    rows: list[tuple[str, ...]] = [
        (g.graph, g.precision, f"{g.parameters / 1e6:,.1f} M", size(g.bytes)) for g in plan.graphs
    ]
    beside = plan.llm_head
    if beside is not None:
        rows += [
            (f"{LLM_HEAD}: {g.graph}", g.precision, f"{g.parameters / 1e6:,.1f} M", size(g.bytes))
            for g in beside.graphs
        ]
    rows.append(("bundle", "", "", size(plan.bundle_bytes)))
    to.print(Table("Graphs", ("graph", "precision", "weights", "size"), rows, right=(2, 3)))
    to.print()
    lengths = f"{plan.prompt_tokens} prompt tokens, {plan.new_tokens} new tokens"
    memory = [
        ("keys and values", f"{size(cache.total)} a row at {lengths}"),
        ("", f"{size(cache.self_per_token)} a token" + (
            f" and {size(cache.cross_per_prompt_token)} a prompt token" if cache.cross_per_prompt_token else "")),
        *([(f"{LLM_HEAD}: keys and values", f"{size(beside.cache.total)} a row")] if beside is not None else ()),
        ("to build (estimate)", size(plan.build_ram_bytes)),
        ("to run (estimate)", size(plan.run_ram_bytes)),
    ]  # fmt: skip
    to.print("Memory")
    to.print(facts_table(memory))
    to.print()
    times = [(s.stage, f"{s.ms:.2f}", s.bound) for s in plan.stages]
    to.print(Table(f"Predicted time, one row, {lengths}", ("stage", "ms", "bound by"), times, right=(1,)))
    to.print(
        f"Predicted from this machine's {machine.bandwidth / 1e9:.1f} GB/s and {machine.flops / 1e9:.0f} GFLOP/s "
        f"(probed in {machine.seconds:.2f} s), not a measurement."
    )
