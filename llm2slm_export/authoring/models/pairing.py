"""Loading of a pair: its models, tokenizers and projector, as one reference."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedTokenizerFast

from llm2slm_export.authoring.composition import CompositionFile, LlmEntry, ProjectorEntry, read_composition
from llm2slm_export.authoring.models.aliases import hub_id
from llm2slm_export.authoring.models.architectures import check_types
from llm2slm_export.authoring.models.byte_tokenizer import byte_tokenizer
from llm2slm_export.authoring.models.chat_template import prompt_template
from llm2slm_export.authoring.models.compatibility import (
    layers_outside,
    prompt_limit,
    require_compatible_parts,
    require_known_ids,
    require_same_tokenization,
    require_special_tokens,
    without_cross_attention,
)
from llm2slm_export.authoring.models.generation_config import require_exportable
from llm2slm_export.authoring.models.loading import load_config, load_full, load_llm, load_tokenizer
from llm2slm_export.authoring.models.projector import Projector, load_projector
from llm2slm_export.authoring.models.reference import Layer, Reference, context_width, llm_width
from llm2slm_export.authoring.recipe import LlmSource, ModelSource, ProjectorSettings, Recipe
from llm2slm_export.authoring.training_record import read_record
from llm2slm_export.bundle.prompt_template import PLACEHOLDER, PromptTemplate
from llm2slm_export.contract import Fusion, TokenizerStrategy, reads_ids
from llm2slm_export.errors import CompositionError
from llm2slm_export.files.names import joined_name

MAX_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class LoadedPair:
    """A reference with its tokenizers and sources. `prompts`: prompts of its task, from its training record."""

    reference: Reference
    file: CompositionFile
    llm_tokenizer: PreTrainedTokenizerFast
    slm_tokenizer: PreTrainedTokenizerFast
    sources: dict[str, dict[str, Any]]
    trained: bool
    prompts: tuple[str, ...] = ()
    stand_in_tokenizer: bool = False


def source_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    """Load the tokenizer named beside a model, or the model's own (at the model's `revision`)."""
    if source.tokenizer is None or source.tokenizer == source.model:
        return load_tokenizer(str(source.model), source.revision)
    return load_tokenizer(source.tokenizer)


def composition_llm(directory: Path, file: CompositionFile) -> LlmSource:
    """The LLM of a composition, with its resolved location."""
    beside = _resolve(directory, file.llm.tokenizer) if file.llm.tokenizer else None
    name = _resolve(directory, file.llm.model)
    return LlmSource(model=name, revision=file.llm.revision, tokenizer=beside, layer=file.llm.layer)


def load_composition(directory: Path) -> LoadedPair:
    """Load a composition and check that its parts are compatible.

    Raises:
        CompositionError: a part is missing or damaged, or widths, layers or tokenizers are incompatible. The message
            lists every problem.
    """
    file, record = read_composition(directory), read_record(directory)
    source, slm_name = composition_llm(directory, file), _resolve(directory, file.slm.model)
    llm_name = str(source.model)
    check_types(load_config(llm_name, source.revision), load_config(slm_name))
    slm = load_full(slm_name)
    llm = load_llm(llm_name, source.revision)
    projector = load_projector(directory, file.projector)
    slm_tokenizer = load_tokenizer(slm_name)
    llm_tokenizer = source_tokenizer(source)
    reference = compose(llm, projector, slm, file, llm_tokenizer, slm_tokenizer)
    return LoadedPair(
        reference,
        file,
        llm_tokenizer,
        slm_tokenizer,
        sources={"llm": model_source(file.llm.model, llm), "slm": model_source(file.slm.model, slm)},
        trained=record is not None,
        prompts=record.prompts if record is not None else (),
    )


def compose(
    llm: nn.Module,
    projector: Projector,
    slm: nn.Module,
    file: CompositionFile,
    llm_tokenizer: PreTrainedTokenizerFast,
    slm_tokenizer: PreTrainedTokenizerFast,
) -> Reference:
    """Create the reference from its parts, after checking that they are compatible.

    Raises:
        CompositionError: the message lists every incompatibility of the parts, else of the special tokens, else of the
            tokenizations.
    """
    require_compatible_parts(llm, projector, slm, file)
    require_special_tokens(slm, llm_tokenizer, slm_tokenizer, file.tokenizer)
    require_exportable(slm)
    require_known_ids(llm, llm_tokenizer)
    if file.tokenizer == "shared":
        require_same_tokenization(llm_tokenizer, slm_tokenizer)
    return Reference(llm, projector, slm, file.fusion, file.llm.layer).eval()


@dataclass(frozen=True)
class PairConfig:
    """How two models are combined: a recipe's settings, or the defaults. A composition records its own."""

    fusion: Fusion = "add"
    tokenizer: TokenizerStrategy = "shared"
    layer: Layer = -1
    projector: ProjectorSettings = field(default_factory=ProjectorSettings)
    prompt_template: str | PromptTemplate = PLACEHOLDER
    max_prompt_tokens: int | None = None  # None: 512, or less if the models have fewer positions
    max_new_tokens: int = 128

    @classmethod
    def of(cls, recipe: Recipe) -> "PairConfig":
        """The settings of a recipe."""
        return cls(
            recipe.fusion,
            recipe.tokenizer,
            recipe.llm.layer,
            recipe.projector,
            recipe.prompt_template,
            recipe.generation.max_prompt_tokens,
            recipe.generation.max_new_tokens,
        )


def projector_entry(llm: nn.Module, slm: nn.Module, pair_config: PairConfig) -> ProjectorEntry:
    """The projector's kind and widths for two models.

    Raises:
        CompositionError: the LLM lacks a layer, the SLM does not support the fusion, or `identity` would need equal
            widths.
    """
    problems = [*layers_outside(llm, pair_config.layer), *without_cross_attention(slm, pair_config.fusion)]
    if problems:
        raise CompositionError("The two models cannot be combined.", *problems, remedy="fix these settings")
    model: Any = llm
    d_out = context_width(slm, pair_config.fusion)
    adapts = pair_config.tokenizer == "llm" and reads_ids(pair_config.fusion)
    settings = pair_config.projector
    try:
        return ProjectorEntry(
            kind=settings.kind,
            d_in=llm_width(llm, pair_config.layer),
            d_hidden=(settings.d_hidden or d_out) if settings.kind == "mlp" else None,
            d_out=d_out,
            activation=settings.activation,
            layers=1 if isinstance(pair_config.layer, int) else len(pair_config.layer),
            d_embedding=model.get_input_embeddings().embedding_dim if adapts else None,
        )
    except ValidationError as error:
        raise CompositionError(
            "The projector does not fit the two models.",
            *(item["msg"].removeprefix("Value error, ") for item in error.errors()),
            remedy="use projector.kind: mlp",
        ) from error


def composition_file(
    name: str, llm: LlmEntry, entry: ProjectorEntry, pair_config: PairConfig, llm_tokenizer: PreTrainedTokenizerFast
) -> CompositionFile:
    """The composition.json of a pair."""
    template = pair_config.prompt_template
    if isinstance(template, str):
        template = prompt_template(template, llm_tokenizer)
    return CompositionFile(
        name=name,
        llm=llm,
        projector=entry,
        fusion=pair_config.fusion,
        tokenizer=pair_config.tokenizer,
        prompt_template=template.text,
        prompt_special_tokens=template.special_tokens,
        prompt_strip=template.strip,
        max_prompt_tokens=pair_config.max_prompt_tokens or MAX_PROMPT_TOKENS,
        max_new_tokens=pair_config.max_new_tokens,
    )


def compose_untrained(
    llm: ModelSource,
    slm: ModelSource,
    *,
    pair_config: PairConfig | None = None,
    random_weights: bool = False,
    seed: int = 0,
    name: str | None = None,
) -> LoadedPair:
    """Compose two models with a new projector.

    With `add` and a shared tokenizer, the untrained pair equals the SLM.

    Args:
        llm, slm: sources that name a `model`.
        pair_config: fusion, tokenizer and projector; None: the defaults.
        random_weights: initialize the weights from `seed` instead of loading them. A configuration is then sufficient.
            If a tokenizer is not available, a byte-level stand-in replaces both, and the pair is labelled so.
        seed: of random weights and of the projector.
        name: of the pair; None: made from both models' names.
    """
    pair_config = pair_config or PairConfig()
    llm_name, slm_name = str(llm.model), str(slm.model)
    llm_config, slm_config = load_config(llm_name, llm.revision), load_config(slm_name, slm.revision)
    check_types(llm_config, slm_config)
    torch.manual_seed(seed)
    slm_model = load_full(slm_name, slm.revision, random=random_weights)
    llm_model = load_llm(llm_name, llm.revision, random=random_weights)
    stand_in = random_weights and not (_has_tokenizer(llm_name) and _has_tokenizer(slm_name))
    if stand_in:
        slm_tokenizer = byte_tokenizer(slm_config)
        llm_tokenizer = byte_tokenizer(llm_config) if pair_config.tokenizer == "llm" else slm_tokenizer
    else:
        llm_tokenizer, slm_tokenizer = source_tokenizer(llm), source_tokenizer(slm)
    entry = projector_entry(llm_model, slm_model, pair_config)
    limit = prompt_limit(llm_model, slm_model, pair_config.fusion)
    if limit is not None and pair_config.max_prompt_tokens is None:
        pair_config = replace(pair_config, max_prompt_tokens=min(MAX_PROMPT_TOKENS, limit))
    source = LlmEntry(model=hub_id(llm_name), revision=llm.revision, layer=pair_config.layer)
    file = composition_file(name or joined_name(llm_name, slm_name), source, entry, pair_config, llm_tokenizer)
    weights = {"weights": "random", "seed": seed} if random_weights else {"weights": "pretrained"}
    return LoadedPair(
        compose(llm_model, Projector(entry), slm_model, file, llm_tokenizer, slm_tokenizer),
        file,
        llm_tokenizer,
        slm_tokenizer,
        sources={
            "llm": model_source(llm_name, llm_model) | weights,
            "slm": model_source(slm_name, slm_model) | weights,
        },
        trained=False,
        stand_in_tokenizer=stand_in,
    )


def _has_tokenizer(name: str) -> bool:
    return (Path(name) / "tokenizer.json").is_file()


def model_source(name: str, model: nn.Module) -> dict[str, Any]:
    """The manifest's entry of a loaded model."""
    config: Any = model.config
    return {
        "model": hub_id(name),
        "revision": getattr(config, "_commit_hash", None),
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": "pretrained",
    }


def _resolve(directory: Path, model: str) -> str:
    """A directory relative to the composition, or a hub id."""
    local = directory / model
    return str(local) if local.is_dir() else model
