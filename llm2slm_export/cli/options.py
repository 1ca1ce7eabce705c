"""The options and arguments that several commands have, each declared once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llm2slm_export.cli.export_options import PRECISIONS
from llm2slm_export.contract import Fusion, TokenizerStrategy

PROMPT_FILES = "X.jsonl|X.tsv|X.csv|X.txt"

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; what people read goes to stderr.")]
ForceOption = Annotated[
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
LlmOption = Annotated[str | None, typer.Option("--llm", metavar="MODEL", help="Alias, hub id or local directory.")]
SlmOption = Annotated[str | None, typer.Option("--slm", metavar="MODEL", help="Alias, hub id or local directory.")]
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
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from `recipes ls`.")]
OptionalRecipeArgument = Annotated[
    str | None, typer.Argument(metavar="[RECIPE]", help="A YAML file, or a name from `recipes ls`.")
]
HeadOption = Annotated[str | None, typer.Option(help="Which of the bundle's heads; its first by default.")]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda[:n].")]
ThreadsOption = Annotated[
    int | None, typer.Option(help="CPU threads, at most one per core; the runtime's choice by default.")
]
TruncateOption = Annotated[
    bool, typer.Option("--truncate", help="Shorten prompts over the limit instead of refusing them.")
]
EvaluatedCompositionOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="What the bundle was built from; runs/ and compositions/ are looked in."),
]
BaselineOption = Annotated[
    list[str] | None,
    typer.Option(metavar="llm|slm[=DIR]", help="Compare with that model alone, or NAME=BUNDLE; several times."),
]
WorkOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Responses and baselines kept; runs/<name>/eval by default.")
]
