"""The generation options of the commands that answer prompts, each declared once."""

from typing import Annotated, Any, Literal

import typer

from llm2slm_export.cli.help import GENERATION, INPUT, RUNTIME

SplitSpecialTokensOption = Annotated[
    bool,
    typer.Option(
        "--split-special-tokens",
        rich_help_panel=INPUT,
        help="Tokenize special tokens in prompts, such as </s>, as plain text.",
    ),
]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(rich_help_panel=GENERATION, help="Maximum number of new tokens (default: the bundle's)."),
]
MinNewTokensOption = Annotated[
    int | None,
    typer.Option(rich_help_panel=GENERATION, help="Minimum number of new tokens (default: the bundle's)."),
]
NumBeamsOption = Annotated[
    int | None,
    typer.Option(rich_help_panel=GENERATION, help="Number of beams; 1 disables beam search (default: the bundle's)."),
]
NumReturnSequencesOption = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=GENERATION,
        help="Number of responses to each prompt, from beams or sampling (default: the bundle's).",
    ),
]
LengthPenaltyOption = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=GENERATION,
        help="Exponent of the length in beam scores; above 0 favours longer responses (default: the bundle's).",
    ),
]
EarlyStoppingOption = Annotated[
    Literal["true", "false", "never"] | None,
    typer.Option(
        rich_help_panel=GENERATION,
        help="End of beam search: true, once --num-beams responses are finished; false, once a better one is unlikely; "
        "never, once none is possible (default: the bundle's).",
    ),
]
DoSampleOption = Annotated[
    bool | None,
    typer.Option(
        rich_help_panel=GENERATION, help="Sample instead of taking the most likely token (default: the bundle's)."
    ),
]
TemperatureOption = Annotated[
    float | None, typer.Option(rich_help_panel=GENERATION, help="Sampling temperature (default: the bundle's).")
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=GENERATION,
        help="Number of most likely tokens to sample from; 0 allows all (default: the bundle's).",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=GENERATION,
        help="Probability mass of the most likely tokens to sample from (default: the bundle's).",
    ),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=GENERATION,
        help="Minimum probability of a sampled token, relative to the most likely one's (default: the bundle's).",
    ),
]
TypicalPOption = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=GENERATION,
        help="Probability mass of the most typical tokens to sample from (default: the bundle's).",
    ),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=GENERATION,
        help="Penalty on tokens that have occurred; above 1 repeats less (default: the bundle's).",
    ),
]
NoRepeatNgramSizeOption = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=GENERATION,
        help="Length, in tokens, of sequences that may occur only once; 0 allows all (default: the bundle's).",
    ),
]
BadWordsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        rich_help_panel=GENERATION,
        help="Text that is never generated, as it is tokenized at the start of a text and after a space. Repeatable.",
    ),
]
SeedOption = Annotated[int | None, typer.Option(rich_help_panel=GENERATION, help="Random seed for sampling.")]
StopOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", rich_help_panel=GENERATION, help="Text that ends a response. Repeatable."),
]
AnyDeviceOption = Annotated[str, typer.Option(rich_help_panel=RUNTIME, help="Device: cpu, cuda[:n] or tensorrt[:n].")]


def given_options(**values: Any) -> dict[str, Any]:
    """The generation options that the user gave, as `GenerationOptions.resolve` takes them, from the values of a command's."""
    given = values | {
        "early_stopping": {"true": True, "false": False}.get(values["early_stopping"] or "", values["early_stopping"]),
        "stop": tuple(values["stop"]) if values["stop"] else None,
    }
    return {name: value for name, value in given.items() if value is not None}
