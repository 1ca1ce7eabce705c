"""The recipe: a YAML file that defines a pair, its training and its export. It is data, never code."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from llm2slm_export.contract import (
    WEIGHT_BITS,
    EnginePrecision,
    Fusion,
    GraphName,
    HeadGraph,
    HeadPrecision,
    Precision,
    TensorRtVariant,
    TokenizerStrategy,
    WeightQuantization,
)
from llm2slm_export.files.data_files import spelled_field
from llm2slm_export.files.names import NAME
from llm2slm_export.files.strict_model import WHOLE_NUMBER, StrictModel

# Fields whose value can be the path of a file or a directory.
_PATHS = ("model", "tokenizer", "train", "validation", "further_prompts")

MOST = 1_000_000  # upper bound of counts (rows, tokens, widths): a larger value is a typo
MOST_LAYERS = 10_000
Layer = Annotated[int, Field(ge=-MOST_LAYERS, le=MOST_LAYERS)]


class _Section(StrictModel):
    model_config = ConfigDict(validate_default=True, allow_inf_nan=False)


class ModelSource(_Section):
    """The source of a model: `model` (alias, hub id or local directory) or `config` (train it from scratch).

    With both, `train --only llm` and `--only slm` create the model from `config`, and the pair starts from `model`.
    """

    model: str | None = Field(default=None, description="alias, hub id or local directory")
    revision: str | None = Field(
        default=None, description="branch, tag or commit of a hub id (default: the hub's main branch)"
    )
    tokenizer: str | None = Field(default=None, description="directory or hub id (default: the model's own tokenizer)")
    config: dict[str, Any] | None = Field(default=None, description="transformers configuration, with its model_type")

    @model_validator(mode="after")
    def _has_a_source(self) -> "ModelSource":
        if self.model is None and self.config is None:
            raise ValueError("needs `model` (an alias, a hub id or a directory) or `config` (an architecture)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs a `model_type`, for example t5")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("`config` needs a `tokenizer` beside it: a model trained from scratch has none")
        return self


class LlmSource(ModelSource):
    """The LLM and the indices of its hidden states that the projector receives."""

    layer: Layer | Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MOST_LAYERS)] = Field(
        default=-1, description="index into the LLM's hidden states; -1: its output; several: a learned weighted sum"
    )


class ProjectorSettings(_Section):
    """The projector: maps the LLM's hidden states into the SLM's embedding space."""

    kind: Literal["mlp", "identity"] = Field(
        default="mlp",
        description="mlp: Linear → ReLU → Linear; identity: hidden states unchanged",
    )
    start: Literal["zero", "random"] = Field(
        default="zero",
        description="initialization of the mlp's output layer. zero: for a pretrained SLM; "
        "random: for an SLM trained from scratch, and for the fusions replace and cross_attention",
    )
    d_hidden: int | None = Field(
        default=None, gt=0, le=MOST, description="hidden size of the mlp (default: the SLM's hidden size)"
    )
    activation: Literal["relu"] = Field(default="relu", description="activation between the mlp's two layers")


class DataSettings(_Section):
    """Prompt and response pairs: a JSONL, TSV or CSV file (by its ending), or the name of a `datasets` dataset."""

    train: str = Field(description="file, or dataset as name:split (default split: train)")
    validation: str = Field(
        description="file or dataset that selects the best checkpoint; it shares no prompt with train"
    )
    prompt_field: str | int = Field(
        default="prompt",
        description="key or column of the prompt; in TSV and CSV, a name requires a header row, a number (from 0) no header row",
    )
    response_field: str | int = Field(default="response", description="key or column of the response; as prompt_field")

    @field_validator("prompt_field", "response_field", mode="before")
    @classmethod
    def _is_a_column(cls, value: Any) -> Any:
        if (
            value == ""
            or isinstance(value, bool)
            or not isinstance(value, str | int)
            or (value.__class__ is int and value < 0)
        ):
            raise ValueError("must be a name, or a column number from 0")
        return value


TeacherRows = Literal["replaced", "both", "kept"]


class TeacherSettings(_Section):
    """Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947): the SLM is trained on the LLM's responses."""

    num_beams: int = Field(default=1, gt=0, le=MOST, description="number of beams of the LLM; 1: greedy")
    batch_size: int = Field(default=64, gt=0, le=MOST, description="prompts per batch of the LLM")
    rows: TeacherRows = Field(
        default="replaced",
        description="responses of training.data.train. replaced: the LLM's instead of the data's; both: the data's and the "
        "LLM's; kept: the data's only, the LLM responds to further_prompts",
    )
    further_prompts: str | None = Field(
        default=None,
        description="file of additional prompts for the LLM, in the format of training.data.train; responses are not needed",
    )

    @model_validator(mode="after")
    def _has_prompts(self) -> "TeacherSettings":
        if self.rows == "kept" and self.further_prompts is None:
            raise ValueError(
                "with rows: kept the LLM has no prompts to respond to; name further_prompts, or set rows: replaced"
            )
        return self


class LoraSettings(_Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), through peft. They are merged before the SLM is saved."""

    r: int = Field(default=8, gt=0, le=MOST, description="rank")
    alpha: int = Field(default=16, gt=0, le=MOST, description="adapter outputs are scaled by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout probability of adapter inputs")
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="all-linear", description="names, or ends of names, of the linear layers with adapters"
    )


class TrainingSettings(_Section):
    """Training of the pair, or of its LLM or SLM alone (`train --only`)."""

    data: DataSettings = Field(description="training and validation data")
    teacher: TeacherSettings | None = Field(
        default=None, description="sequence-level distillation from the LLM; not with --only llm"
    )
    slm: Literal["full", "frozen", "lora"] = Field(
        default="full", description="trained weights of the SLM: all, none, or low-rank adapters"
    )
    lora: LoraSettings | None = Field(default=None, description="adapters, with slm: lora (default: r 8, alpha 16)")
    freeze_encoder: bool = Field(
        default=False,
        description="with --only and an encoder-decoder: freeze the encoder and the input embeddings",
    )
    epochs: float = Field(default=3.0, gt=0, le=MOST, description="number of epochs")
    batch_size: int = Field(default=128, gt=0, le=MOST, description="rows per batch and process")
    gradient_accumulation_steps: int = Field(default=1, gt=0, le=MOST, description="batches per optimizer step")
    learning_rate: float = Field(default=1e-3, gt=0, le=1000, description="peak learning rate")
    lr_scheduler: str = Field(default="linear", description="transformers' lr_scheduler_type")
    warmup_steps: int = Field(
        default=200, ge=0, le=1000 * MOST, description="optimizer steps until the learning rate reaches its peak"
    )
    weight_decay: float = Field(
        default=0.0, ge=0, le=1000, description="weight decay of all weights except biases and norms"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="label smoothing in training; validation losses have none"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9, description="gradients are clipped to this norm")
    optimizer: Literal["adamw", "adafactor"] = Field(
        default="adamw", description="adafactor: updates relative to each weight's scale, for T5 from scratch"
    )
    bf16: bool = Field(
        default=True,
        description="compute matrix products in bfloat16 if the device supports it; weights stay float32",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="random seed for new weights, dropout and the order of rows"
    )
    max_prompt_tokens: int = Field(default=256, gt=0, le=MOST, description="rows with longer prompts are dropped")
    max_response_tokens: int = Field(
        default=256, gt=0, le=MOST, description="rows with longer responses (EOS included) are dropped"
    )
    evaluations_per_epoch: int = Field(
        default=1, gt=0, le=MOST, description="evaluations per epoch, each with a checkpoint; the best one is kept"
    )
    cache_hidden_states: bool = Field(
        default=True, description="encode every prompt once and cache its hidden states on disk"
    )

    @model_validator(mode="after")
    def _lora_is_used(self) -> "TrainingSettings":
        if self.lora is not None and self.slm != "lora":
            raise ValueError(f"`lora` has no effect with slm: {self.slm}; set slm: lora, or leave `lora` out")
        return self


class EngineSettings(_Section):
    """The TensorRT engines that `build` compiles in addition to the ONNX graphs."""

    backend: TensorRtVariant = Field(
        description="tensorrt builds on the GPU that the engines are for; tensorrt-rtx builds without a GPU"
    )
    precision: dict[GraphName, EnginePrecision] = Field(
        default_factory=dict, description="precision of each graph (default: fp16)"
    )
    max_batch: int = Field(default=8, gt=0, le=MOST, description="maximum batch size")
    max_prompt: int | None = Field(
        default=None, gt=0, le=MOST, description="maximum prompt length in tokens (default: the pair's)"
    )
    max_new: int | None = Field(
        default=None, gt=0, le=MOST, description="maximum response length in tokens (default: the pair's)"
    )
    prompt_buckets: tuple[Annotated[int, Field(gt=0, le=MOST)], ...] = Field(
        default=(), description="prompt lengths in tokens; engines get an optimization profile up to each"
    )
    compute_capabilities: tuple[str, ...] = Field(
        default=(), description='target devices of tensorrt-rtx (default: "8.6", "8.9" and "12.0")'
    )


class LlmHeadSettings(_Section):
    """The LLM head: the LLM's own decoder as one more head named `llm`, over the pair's encoder."""

    precision: dict[HeadGraph, HeadPrecision] = Field(
        default_factory=dict, description="precision of its projector and decoder (default: that of the pair's)"
    )


class ExportSettings(_Section):
    """Precision of the exported graphs, the LLM head, and the engines beside them."""

    precision: dict[GraphName, Precision] = Field(
        default_factory=dict, description="precision of each graph (default: fp32)"
    )
    block_size: Annotated[Literal[16, 32, 64, 128, 256], WHOLE_NUMBER] | None = Field(
        default=None,
        description="int8 or int4 weights per scale (default: 128 at int8, 32 at int4)",
    )
    quantize_lm_head: bool = Field(
        default=False, description="with int4: quantize the output layer to 4 bits instead of 8"
    )
    llm_head: LlmHeadSettings | None = Field(
        default=None,
        description="the LLM's own decoder as the head `llm`; {} for the pair's precision (default: no such head)",
    )
    engines: EngineSettings | None = Field(default=None, description="TensorRT engines (default: none)")

    @model_validator(mode="after")
    def _rounding_is_used(self) -> "ExportSettings":
        precisions = {
            *self.precision.values(),
            *(self.llm_head.precision.values() if self.llm_head else ()),
            *(self.engines.precision.values() if self.engines else ()),
        }
        unused = []
        if self.block_size is not None and WEIGHT_BITS.keys().isdisjoint(precisions):
            unused.append(f"`block_size: {self.block_size}` has no effect: no graph is int8 or int4")
        if self.quantize_lm_head and "int4" not in precisions:
            unused.append("`quantize_lm_head: true` has no effect: no graph is int4")
        if unused:
            raise ValueError(f"{'; '.join(unused)}; change `precision`, or leave it out")
        return self

    @property
    def weight_quantization(self) -> WeightQuantization:
        """The weight quantization of int8 and int4 graphs."""
        return WeightQuantization(self.block_size, self.quantize_lm_head)


class GenerationSettings(_Section):
    """Defaults of `run`, and the maximum prompt length of the pair."""

    max_new_tokens: int = Field(default=128, gt=0, le=MOST, description="maximum response length in SLM tokens")
    max_prompt_tokens: int = Field(default=512, gt=0, le=MOST, description="maximum prompt length in LLM tokens")


class Recipe(_Section):
    """A pair: its LLM and SLM, their fusion, training and export."""

    name: str = Field(pattern=NAME, description="name of the directories runs/<name> and engines/<name>")
    llm: LlmSource = Field(description="the frozen LLM, which encodes the prompt")
    slm: ModelSource = Field(description="the trained SLM, which writes the response")
    fusion: Fusion = Field(default="add", description="combines the projected states with the SLM's prompt embeddings")
    tokenizer: TokenizerStrategy = Field(
        default="shared",
        description="shared: LLM and SLM have one tokenizer; llm: the LLM's for the prompt, the SLM's for the response",
    )
    prompt_template: str = Field(
        default="{prompt}", description="text around the prompt, or chat for the LLM's own chat template"
    )
    projector: ProjectorSettings = Field(
        default=ProjectorSettings(), description="maps the LLM's hidden states into the SLM's embedding space"
    )
    training: TrainingSettings | None = Field(default=None, description="settings of `train`")
    export: ExportSettings = Field(default=ExportSettings(), description="settings of `build`")
    generation: GenerationSettings = Field(default=GenerationSettings(), description="defaults of `run`")

    @field_validator("prompt_template")
    @classmethod
    def _has_the_prompt(cls, template: str) -> str:
        if template != "chat" and template.count("{prompt}") != 1:
            raise ValueError("must contain {prompt} exactly once, or be `chat` for the LLM's own chat template")
        return template


def with_teacher(recipe: Recipe) -> Recipe:
    """The recipe with its own teacher, or with a teacher of default settings if it has none (`train --teacher`)."""
    if recipe.training is None or recipe.training.teacher is not None:
        return recipe
    training = recipe.training.model_copy(update={"teacher": TeacherSettings()})
    return recipe.model_copy(update={"training": training})


def with_fields(recipe: Recipe, prompt_field: str | None, response_field: str | None) -> Recipe:
    """The recipe with other data fields, given as strings (`train --prompt-field --response-field`)."""
    given = {"prompt_field": prompt_field, "response_field": response_field}
    if recipe.training is None or not any(given.values()):
        return recipe
    data = recipe.training.data
    fields = {key: spelled_field(field, Path(data.train)) for key, field in given.items() if field}
    training = recipe.training.model_copy(update={"data": data.model_copy(update=fields)})
    return recipe.model_copy(update={"training": training})


def without_absolute_paths(fields: Any) -> Any:
    """Shorten absolute paths in a recipe's fields, for publication.

    A path below the working directory becomes relative to it. Any other path is reduced to its last part, as
    `…/data.jsonl`: no valid file name, so that it cannot be confused with a local file.
    """
    if not isinstance(fields, dict):
        return fields
    return {
        key: _relative(value) if key in _PATHS and isinstance(value, str) else without_absolute_paths(value)
        for key, value in fields.items()
    }


def _relative(name: str) -> str:
    if not Path(name).is_absolute():
        return name
    path, here = Path(os.path.abspath(name)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else f"…/{path.name}"
