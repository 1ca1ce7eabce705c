"""The composition on disk: a trained or freshly initialized pair, before export.

    <dir>/composition.json         CompositionFile
          projector.safetensors    fc_in.weight [d_hidden, d_in], fc_in.bias, fc_out.weight [d_out, d_hidden],
                                   fc_out.bias;
                                   several LLM layers: layer_fusion.weight [layers], layer_fusion.norm.weight [d_in];
                                   tokenizer `llm`: adapter.weight [d_out, d_embedding], adapter.bias
          slm/                     save_pretrained of the SLM and its tokenizer
          training.json            training data, settings and metrics (absent if untrained)

This module holds the formats and imports no torch. `models.reference` computes with them.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from llm2slm_export.bundle.prompt_template import PLACEHOLDER, PromptTemplate
from llm2slm_export.contract import Fusion, TokenizerStrategy
from llm2slm_export.errors import CompositionError
from llm2slm_export.files.json_format import JsonFormat
from llm2slm_export.files.names import NAME
from llm2slm_export.files.strict_model import WHOLE_NUMBER, StrictModel

COMPOSITION_FILE = "composition.json"
PROJECTOR_FILE = "projector.safetensors"
TRAINING_FILE = "training.json"
SLM_DIRECTORY = "slm"
VERSION = 1
MOST = 1_000_000  # of widths and tokens
MOST_LAYERS = 10_000
Width = Annotated[int, Field(gt=0, le=MOST)]
Layer = Annotated[int, Field(ge=-MOST_LAYERS, le=MOST_LAYERS)]
Location = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]


class LlmEntry(StrictModel):
    """The frozen LLM: a hub id, or a path relative to composition.json.

    `layer` indexes its hidden states (0: the embeddings, -1: the output). The projector fuses several layers.
    """

    model: Location
    revision: str | None = None
    layer: Layer | Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MOST_LAYERS)] = -1
    tokenizer: Location | None = None


class SlmEntry(StrictModel):
    """The SLM: a path relative to composition.json, or a hub id."""

    model: Location = SLM_DIRECTORY


class ProjectorEntry(StrictModel):
    """The projector from H, the LLM's hidden states, to Z, the SLM's conditioning.

    `mlp`: Z = fc_out(relu(fc_in(H))), with widths d_in, d_hidden, d_out. `identity`: Z = H.
    With several LLM layers (`layers`), H = RMSNorm(Σ sigmoid(weight_i) · H_i).
    With the tokenizer `llm`, prompt embeddings are adapter(embeddings of the LLM), of width `d_embedding`.
    """

    kind: Literal["mlp", "identity"] = "mlp"
    d_in: Width
    d_hidden: Width | None = None
    d_out: Width
    activation: Literal["relu"] = "relu"
    layers: int = Field(default=1, gt=0, le=MOST_LAYERS)
    d_embedding: Width | None = None

    @model_validator(mode="after")
    def _has_its_widths(self) -> "ProjectorEntry":
        if self.kind == "mlp" and self.d_hidden is None:
            raise ValueError("an mlp projector needs d_hidden")
        if self.kind == "identity" and self.d_in != self.d_out:
            raise ValueError(f"an identity projector needs d_in = d_out, got {self.d_in} and {self.d_out}")
        return self


class CompositionFile(StrictModel):
    """The content of composition.json."""

    format: Literal["llm2slm-composition"] = "llm2slm-composition"
    version: Annotated[Literal[1], WHOLE_NUMBER] = 1
    name: str = Field(pattern=NAME)
    llm: LlmEntry
    slm: SlmEntry = SlmEntry()
    projector: ProjectorEntry
    fusion: Fusion = "add"
    tokenizer: TokenizerStrategy = "shared"
    prompt_template: str = PLACEHOLDER
    prompt_special_tokens: bool = True
    prompt_strip: bool = False
    max_prompt_tokens: int = Field(default=512, gt=0, le=MOST)
    max_new_tokens: int = Field(default=128, gt=0, le=MOST)

    @field_validator("prompt_template")
    @classmethod
    def _holds_the_prompt(cls, template: str) -> str:
        if template.count(PLACEHOLDER) != 1:
            raise ValueError("must contain {prompt} exactly once")
        return template

    @property
    def template(self) -> PromptTemplate:
        """The text around a prompt."""
        return PromptTemplate(self.prompt_template, self.prompt_special_tokens, self.prompt_strip)


_FORMAT = JsonFormat(
    "a composition", CompositionFile, CompositionError, if_damaged="train the composition again",
    if_invalid="fix these fields, or train the composition again", version_field="version", newest=VERSION,
)  # fmt: skip


def read_composition(directory: Path) -> CompositionFile:
    """Read and validate `composition.json`.

    Raises:
        CompositionError: the file is missing, not a composition, of a newer version, or has invalid fields.
    """
    path = directory / COMPOSITION_FILE
    if not path.is_file():
        raise CompositionError(
            f"{directory} is not a composition: it has no {COMPOSITION_FILE}.",
            remedy="give the directory that `llm2slm-export train` wrote",
        )
    return _FORMAT.read(path)
