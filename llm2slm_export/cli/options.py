"""The options and arguments that several commands have, each declared once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llm2slm_export.cli.export_options import HEAD_PRECISIONS, PRECISIONS
from llm2slm_export.cli.help import COMPARISON, DATA, DRAFTING, INPUT, MODELS, OUTPUT, QUANTIZATION, RUNTIME
from llm2slm_export.contract import BLOCK_SIZES, DEFAULT_BLOCK_SIZES, LLM_HEAD, Fusion, TokenizerStrategy

PROMPT_FILE_KINDS = ".jsonl, .tsv, .csv or .txt"

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle directory that `build` wrote.")]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe: a YAML file, or a name from `recipes ls`.")
]
OptionalRecipeArgument = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="Recipe: a YAML file, or a name from `recipes ls`.")
]

LlmOption = Annotated[
    str | None,
    typer.Option(
        "--llm", metavar="MODEL", rich_help_panel=MODELS,
        help="LLM that encodes the prompt: alias, Hugging Face hub id or local directory.",
    ),
]  # fmt: skip
SlmOption = Annotated[
    str | None,
    typer.Option(
        "--slm", metavar="MODEL", rich_help_panel=MODELS,
        help="SLM that generates the response: alias, Hugging Face hub id or local directory.",
    ),
]  # fmt: skip
FusionOption = Annotated[
    Fusion | None,
    typer.Option(
        rich_help_panel=MODELS,
        help="Fusion of the projected LLM states with the SLM's prompt embeddings, for --llm and --slm (default: add).",
    ),
]
TokenizerOption = Annotated[
    TokenizerStrategy | None,
    typer.Option(
        rich_help_panel=MODELS,
        help="Tokenizer of the prompt, for --llm and --slm: one that both share, or the LLM's (default: shared).",
    ),
]
LayerOption = Annotated[
    str | None,
    typer.Option(
        metavar="N|N,N…", rich_help_panel=MODELS,
        help="LLM layers whose hidden states are projected, for --llm and --slm; -1 is the last (default: -1).",
    ),
]  # fmt: skip
ProjectorOption = Annotated[
    Literal["mlp", "identity"] | None,
    typer.Option(rich_help_panel=MODELS, help="Kind of projector, for --llm and --slm (default: mlp)."),
]

PrecisionOption = Annotated[
    str | None,
    typer.Option(
        metavar="P|GRAPH=P,…", rich_help_panel=QUANTIZATION,
        help=f"Precision of all graphs, or of each: {', '.join(PRECISIONS[:-1])}; {PRECISIONS[-1]} for the encoder alone "
        "(default: the recipe's, else fp32).",
    ),
]  # fmt: skip
LlmHeadOption = Annotated[
    bool,
    typer.Option(
        "--llm-head", rich_help_panel=MODELS, show_default=False,
        help=f"Add the LLM's own decoder as the head {LLM_HEAD!r}: the LLM by itself, over the same encoder (default: the "
        "recipe's, else no such head).",
    ),
]  # fmt: skip
LlmHeadPrecisionOption = Annotated[
    str | None,
    typer.Option(
        metavar="P|GRAPH=P,…", rich_help_panel=QUANTIZATION,
        help=f"Precision of the LLM head's projector and decoder, or of each: {', '.join(HEAD_PRECISIONS)} (default: the "
        "recipe's, else the pair's).",
    ),
]  # fmt: skip
BlockSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=QUANTIZATION,
        help=f"Number of int8 or int4 weights that share a scale: {', '.join(map(str, BLOCK_SIZES))}. Larger blocks are faster "
        f"and less exact (default: the recipe's, else {DEFAULT_BLOCK_SIZES[8]} at int8, {DEFAULT_BLOCK_SIZES[4]} at int4).",
    ),
]  # fmt: skip
QuantizeLmHeadOption = Annotated[
    bool | None,
    typer.Option(
        "--quantize-lm-head", rich_help_panel=QUANTIZATION, show_default=False,
        help="Quantize the LM head to 4 bits too at int4 (default: the recipe's, else 8 bits).",
    ),
]  # fmt: skip
GateOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", rich_help_panel=QUANTIZATION,
        help="Held-out prompts on which a reduced precision is compared with the unmodified models "
        f"({PROMPT_FILE_KINDS}). Prompts over the limit are skipped.",
    ),
]  # fmt: skip
MaxDifferingOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", min=0.0, max=1.0, rich_help_panel=QUANTIZATION,
        help="Maximum fraction of next tokens that may differ on the --gate prompts (default: 0.005 per fp16, bf16, int8 "
        "or w8a8 graph, 0.02 per int4 graph).",
    ),
]  # fmt: skip

PromptFieldOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|N", rich_help_panel=DATA,
        help="Key or column of the prompt in a data file. In TSV and CSV files a name means that the first row is a header, "
        "and a number, from 0, that there is none (default: the training data's, else prompt).",
    ),
]  # fmt: skip
ResponseFieldOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|N", rich_help_panel=DATA,
        help="Key or column of the response, given as --prompt-field is (default: the training data's, else response).",
    ),
]  # fmt: skip
TruncateOption = Annotated[
    bool,
    typer.Option("--truncate", rich_help_panel=INPUT, help="Truncate prompts over the limit instead of refusing them."),
]

HeadOption = Annotated[
    str | None, typer.Option(rich_help_panel=INPUT, help="Head to use (default: the bundle's first).")
]
DeviceOption = Annotated[str, typer.Option(rich_help_panel=RUNTIME, help="Device: cpu or cuda[:n].")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=RUNTIME, help="Number of CPU threads, at most one per core (default: the runtime's choice)."
    ),
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        metavar="R|GRAPH=R,…", rich_help_panel=RUNTIME,
        help="Runtime of the encoder and the projector: onnxruntime, openvino, or auto, the faster one on this machine, "
        "measured once and cached.",
    ),
]  # fmt: skip

CacheOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", rich_help_panel=RUNTIME,
        help="Directory of cached encodings to reuse and extend (default: none).",
    ),
]  # fmt: skip

DrafterOption = Annotated[
    Literal["ngram"] | None,
    typer.Option(
        rich_help_panel=DRAFTING,
        help="Drafter of tokens that one decoder call verifies together: ngram proposes what followed the same tokens earlier "
        "in the prompt or the response; with --verifier the pair drafts where that finds nothing (default: the pair itself with "
        "--verifier, else none).",
    ),
]  # fmt: skip
VerifierOption = Annotated[
    str | None,
    typer.Option(
        metavar="HEAD", rich_help_panel=DRAFTING,
        help="Head that verifies the tokens that the pair drafts; without --defer the response is that head's (default: none).",
    ),
]  # fmt: skip
DeferOption = Annotated[
    float | None,
    typer.Option(
        metavar="P", rich_help_panel=DRAFTING,
        help="Probability from which the pair's own tokens stand unverified, from 0 (all of them) to 1, with --verifier "
        "(default: all tokens are verified).",
    ),
]  # fmt: skip
NumDraftTokensOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=DRAFTING,
        help="Number of tokens per draft, from 1 to 64 (default: adapted to the acceptance and to the times of calls).",
    ),
]  # fmt: skip

EvaluatedCompositionOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", rich_help_panel=COMPARISON,
        help="Composition that the bundle was built from (default: the one found in runs/ or compositions/).",
    ),
]  # fmt: skip
BaselineOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="B", rich_help_panel=COMPARISON,
        help="System to compare with: llm or slm (that model alone), llm=DIR or slm=DIR (a model elsewhere), or NAME=BUNDLE. "
        "Repeatable.",
    ),
]  # fmt: skip
BaselinePrecisionOption = Annotated[
    str | None,
    typer.Option(
        metavar="P|GRAPH=P,…", rich_help_panel=COMPARISON,
        help="Precision of --baseline llm and slm, given as `build --precision` is (default: the bundle's; fp32, with a note, "
        "for a model that does not pass the parity check at that).",
    ),
]  # fmt: skip
WorkOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", rich_help_panel=OUTPUT,
        help="Directory of cached responses and baselines (default: runs/<name>/eval).",
    ),
]  # fmt: skip

ForceOption = Annotated[
    bool,
    typer.Option(
        "--force", rich_help_panel=OUTPUT,
        help="Replace this command's earlier result at --out, once the new one is complete.",
    ),
]  # fmt: skip
JsonOption = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OUTPUT, help="Print JSON to stdout and log messages to stderr."),
]
