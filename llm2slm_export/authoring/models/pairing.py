"""Compose a pair: check that models, tokenizers and projector are compatible, and create the reference."""

from collections.abc import Iterator
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
from llm2slm_export.authoring.models.generation_config import require_exportable
from llm2slm_export.authoring.models.loading import load_config, load_full, load_llm, load_tokenizer
from llm2slm_export.authoring.models.projector import Projector, load_projector
from llm2slm_export.authoring.models.reference import (
    Layer,
    Reference,
    context_width,
    is_encoder_decoder,
    llm_layers,
    llm_width,
)
from llm2slm_export.authoring.models.special_tokens import slm_special_ids
from llm2slm_export.authoring.recipe import ModelSource, ProjectorSettings, Recipe
from llm2slm_export.authoring.training_record import read_record
from llm2slm_export.bundle.prompt_template import PLACEHOLDER, PromptTemplate
from llm2slm_export.contract import Fusion, TokenizerStrategy, context_per_token, reads_ids
from llm2slm_export.errors import CompositionError
from llm2slm_export.files.names import joined_name

MAX_PROMPT_TOKENS = 512

# Sentences on which two tokenizers must agree: plain words, case, punctuation, digits, accents, scripts, spacing,
# symbols.
PROBES = (
    "The quick brown fox jumps over the lazy dog.", "Where is the station?", "It's 3:45 p.m. — 1,234.50 €!",
    "translate English to French: I don't know.", "Où est la gare ? Ça va être très difficile.", "ÄÖÜß ñ ç œ Ł",
    "Привет, мир", "日本語のテキスト", "العربية", "😀👍🏽", "  two  spaces\tand a tab\n", "CamelCase snake_case x+y=z {a: [1]}", "a",
)  # fmt: skip


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


def require_same_tokenization(llm: PreTrainedTokenizerFast, slm: PreTrainedTokenizerFast) -> None:
    """Check that both tokenizers of the strategy `shared` give the same ids: fusion adds states position by position.

    Raises:
        CompositionError: the message counts the probe sentences that differ, and shows the first.
    """
    differing = [text for text in PROBES if llm(text).input_ids != slm(text).input_ids]
    if differing:
        text = differing[0]
        raise CompositionError(
            f"The LLM and the SLM tokenize prompts differently ({len(differing)} of {len(PROBES)} probe sentences), "
            "so position i of one is not position i of the other.",
            f"{text!r}: LLM ids {llm(text).input_ids[:12]}, SLM ids {slm(text).input_ids[:12]}",
            remedy="use `tokenizer: llm` (the prompt in the LLM's tokens, through an adapter), or models that share a "
            "tokenizer",
        )


def require_special_tokens(
    slm: nn.Module,
    llm_tokenizer: PreTrainedTokenizerFast,
    slm_tokenizer: PreTrainedTokenizerFast,
    strategy: TokenizerStrategy,
) -> None:
    """Check the SLM's special ids: present, equal to its tokenizer's and, with `shared`, equal to the LLM tokenizer's.

    Raises:
        CompositionError: the message lists every mismatch.
    """
    model: Any = slm
    ids = slm_special_ids(slm)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    problems = []
    if not ids.eos:
        problems.append("the SLM's generation_config has no eos_token_id: generation would never stop")
    elif slm_tokenizer.eos_token_id is not None and slm_tokenizer.eos_token_id not in ids.eos:
        problems.append(f"the SLM's eos_token_id is {list(ids.eos)}, its tokenizer's is {slm_tokenizer.eos_token_id}")
    if model.config.is_encoder_decoder and ids.decoder_start is None:
        problems.append("the SLM has no decoder_start_token_id")
    beyond = [id for id in (*ids.eos, ids.decoder_start) if id is not None and not 0 <= id < vocab]
    if beyond:
        problems.append(f"special ids {beyond} are outside the SLM's vocabulary of {vocab}")
    if strategy == "shared":
        for name in ("eos_token_id", "pad_token_id"):
            theirs, ours = getattr(llm_tokenizer, name), getattr(slm_tokenizer, name)
            # Padding is masked, so a tokenizer without a padding token is compatible.
            harmless = name == "pad_token_id" and None in (theirs, ours)
            if theirs != ours and not harmless:
                problems.append(f"{name}: {theirs} in the LLM's tokenizer, {ours} in the SLM's")
    if prompt_pad(llm_tokenizer) is None:
        problems.append("the LLM's tokenizer has neither a padding nor an end-of-sequence token")
    if problems:
        raise CompositionError(
            "The special tokens of the pair are not compatible.",
            *problems,
            remedy="fix generation_config.json or tokenizer_config.json of the models named",
        )


def prompt_rows(llm: nn.Module, slm: nn.Module, file: CompositionFile) -> int:
    """Rows of the embedding tables that prompt ids index: the LLM's and, if the fusion uses it, the SLM's."""
    tables: list[Any] = [llm]
    if file.tokenizer == "shared" and reads_ids(file.fusion):
        tables.append(slm)
    return min(int(model.get_input_embeddings().num_embeddings) for model in tables)


def require_known_ids(llm: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that the LLM has embeddings for its tokenizer's ids, on probe sentences and for the padding.

    Prompts with other unknown tokens, such as image placeholders, are refused one by one at run time.

    Raises:
        CompositionError: the message lists the unknown ids; or the tokenizer splits special tokens by default, which
            bundles do not support.
    """
    if tokenizer.split_special_tokens:
        raise CompositionError(
            "The LLM's tokenizer splits special tokens in the text by default.",
            "split_special_tokens is true in its tokenizer_config.json",
            remedy="set it to false there, and give split_special_tokens=True (--split-special-tokens) with the prompts",
        )
    model: Any = llm
    rows = model.get_input_embeddings().num_embeddings
    written = {id for text in PROBES for id in tokenizer(text).input_ids} | {prompt_pad(tokenizer) or 0}
    beyond = sorted(id for id in written if id >= rows)
    if beyond:
        raise CompositionError(
            f"The prompt's tokenizer gives ids beyond the {rows} rows of the LLM's embedding table.",
            f"ids: {', '.join(map(str, beyond[:8]))}{' …' if len(beyond) > 8 else ''}",
            remedy="give the LLM's own tokenizer; for an LLM and an SLM with two vocabularies use `tokenizer: llm` "
            "(--tokenizer llm)",
        )


def source_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    """Load the tokenizer named beside a model, or the model's own (at the model's `revision`)."""
    if source.tokenizer is None or source.tokenizer == source.model:
        return load_tokenizer(str(source.model), source.revision)
    return load_tokenizer(source.tokenizer)


def prompt_pad(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that pads prompts: the padding token's or, because padding is masked, EOS."""
    pad: int | None = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pad


def load_composition(directory: Path) -> LoadedPair:
    """Load a composition and check that its parts are compatible.

    Raises:
        CompositionError: a part is missing or damaged, or widths, layers or tokenizers are incompatible. The message
            lists every problem.
    """
    file, record = read_composition(directory), read_record(directory)
    llm_name, slm_name = _resolve(directory, file.llm.model), _resolve(directory, file.slm.model)
    check_types(load_config(llm_name, file.llm.revision), load_config(slm_name))
    slm = load_full(slm_name)
    llm = load_llm(llm_name, file.llm.revision)
    projector = load_projector(directory, file.projector)
    slm_tokenizer = load_tokenizer(slm_name)
    beside = _resolve(directory, file.llm.tokenizer) if file.llm.tokenizer else None
    llm_tokenizer = source_tokenizer(ModelSource(model=llm_name, revision=file.llm.revision, tokenizer=beside))
    reference = compose(llm, projector, slm, file, llm_tokenizer, slm_tokenizer)
    return LoadedPair(
        reference,
        file,
        llm_tokenizer,
        slm_tokenizer,
        sources={"llm": _source(file.llm.model, llm), "slm": _source(file.slm.model, slm)},
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
    problems = [*_fusion_problems(slm, file), *_layer_problems(llm, file), *_position_problems(llm, slm, file)]
    if not problems:
        problems = list(_width_problems(llm, projector, slm, file))
    if problems:
        raise CompositionError(
            "The parts of the pair are not compatible.",
            *problems,
            remedy="fix these values, or train the pair again with these models",
        )
    require_special_tokens(slm, llm_tokenizer, slm_tokenizer, file.tokenizer)
    require_exportable(slm)
    require_known_ids(llm, llm_tokenizer)
    if file.tokenizer == "shared":
        require_same_tokenization(llm_tokenizer, slm_tokenizer)
    return Reference(llm, projector, slm, file.fusion, file.llm.layer).eval()


def _fusion_problems(slm: nn.Module, file: CompositionFile) -> Iterator[str]:
    yield from _without_cross_attention(slm, file.fusion)
    wants_adapter = file.tokenizer == "llm" and reads_ids(file.fusion)
    if wants_adapter != (file.projector.d_embedding is not None):
        yield (
            f"fusion {file.fusion} with tokenizer {file.tokenizer} {'needs an' if wants_adapter else 'has no'} adapter; "
            f"projector.d_embedding is {file.projector.d_embedding}"
        )


def _without_cross_attention(slm: nn.Module, fusion: Fusion) -> Iterator[str]:
    if fusion == "cross_attention" and not is_encoder_decoder(slm):
        config: Any = slm.config
        yield f"fusion cross_attention needs an SLM with cross-attention; {config.model_type} is decoder-only"


def _layer_problems(llm: nn.Module, file: CompositionFile) -> Iterator[str]:
    yield from _layers_outside(llm, file.llm.layer)
    count = 1 if isinstance(file.llm.layer, int) else len(file.llm.layer)
    if count != file.projector.layers:
        yield f"the composition uses {count} LLM layers, the projector fuses {file.projector.layers}"


def _layers_outside(llm: nn.Module, layer: Layer) -> Iterator[str]:
    layers = llm_layers(llm)
    several = (layer,) if isinstance(layer, int) else layer
    outside = [i for i in several if not -layers - 1 <= i <= layers]
    if outside:
        yield f"LLM layer {', '.join(map(str, outside))} of {layers} layers; choose {-layers - 1} to {layers}"


def _position_problems(llm: nn.Module, slm: nn.Module, file: CompositionFile) -> Iterator[str]:
    most = prompt_limit(llm, slm, file.fusion)
    if most is not None and file.max_prompt_tokens > most:
        yield f"max_prompt_tokens is {file.max_prompt_tokens}; the models' positions end at {most} prompt tokens"

    limit = positions_known(slm)
    context = 0 if is_encoder_decoder(slm) else context_per_token(file.fusion)  # of the shortest prompt
    if limit is not None and context + file.max_new_tokens > limit:
        yield f"max_new_tokens is {file.max_new_tokens}; the SLM's decoder has {limit} positions"


def positions_known(model: Any) -> int | None:
    """The model's max_position_embeddings; None if positions are relative and unbounded (T5)."""
    config = model.config.get_text_config(decoder=model.config.is_encoder_decoder)
    return getattr(config, "max_position_embeddings", None)


def prompt_limit(llm: nn.Module, slm: nn.Module, fusion: Fusion) -> int | None:
    """The longest prompt, in tokens, that the positions of LLM and SLM encoder allow; None: unlimited."""
    limits = [positions_known(llm)]
    if is_encoder_decoder(slm) and fusion != "cross_attention":
        model: Any = slm
        known = positions_known(model.get_encoder())
        limits.append(known // context_per_token(fusion) if known is not None else None)
    return min((limit for limit in limits if limit is not None), default=None)


def _width_problems(llm: nn.Module, projector: Projector, slm: nn.Module, file: CompositionFile) -> Iterator[str]:
    entry, width = projector.entry, llm_width(llm, file.llm.layer)
    if entry.d_in != width:
        yield f"projector d_in is {entry.d_in}, the LLM's hidden size is {width}"
    wanted = context_width(slm, file.fusion)
    if entry.d_out != wanted:
        yield f"projector d_out is {entry.d_out}, the SLM's hidden size is {wanted}"
    model: Any = llm
    table = model.get_input_embeddings().embedding_dim
    if entry.d_embedding not in (None, table):
        yield f"projector d_embedding is {entry.d_embedding}, the LLM's embedding size is {table}"


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
    problems = [*_layers_outside(llm, pair_config.layer), *_without_cross_attention(slm, pair_config.fusion)]
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
        sources={"llm": _source(llm_name, llm_model) | weights, "slm": _source(slm_name, slm_model) | weights},
        trained=False,
        stand_in_tokenizer=stand_in,
    )


def _has_tokenizer(name: str) -> bool:
    return (Path(name) / "tokenizer.json").is_file()


def _source(name: str, model: nn.Module) -> dict[str, Any]:
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
