"""Loading models and tokenizers through transformers: aliases, hub ids, local directories, random weights."""

import json
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from llm2slm_export.composition import TRAINING_FILE, CompositionFile, LlmEntry, read_composition
from llm2slm_export.errors import CompositionError
from llm2slm_export.models.byte_tokenizer import byte_tokenizer
from llm2slm_export.models.catalog import architecture, hub_id
from llm2slm_export.models.projector import Projector, load_projector
from llm2slm_export.models.reference import Reference
from llm2slm_export.recipe import ModelSource

LLM_TYPES = ("t5", "mt5", "umt5")
SLM_TYPES = {
    "t5": "encoder-decoder",
    "mt5": "encoder-decoder",
    "umt5": "encoder-decoder",
    "gpt2": "decoder-only",
    "llama": "decoder-only",
}

# Sentences whose ids decide whether two tokenizers split a prompt alike: plain words, case, punctuation, digits,
# accents, scripts, spacing, symbols.
PROBES = (
    "The quick brown fox jumps over the lazy dog.", "Where is the station?", "It's 3:45 p.m. — 1,234.50 €!",
    "translate English to French: I don't know.", "Où est la gare ? Ça va être très difficile.", "ÄÖÜß ñ ç œ Ł",
    "Привет, мир", "日本語のテキスト", "العربية", "😀👍🏽", "  two  spaces\tand a tab\n", "CamelCase snake_case x+y=z {a: [1]}", "a",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedPair:
    """A reference with its tokenizers and where they came from. `prompts`: real ones of its task, where it kept some."""

    reference: Reference
    file: CompositionFile
    llm_tokenizer: PreTrainedTokenizerFast
    slm_tokenizer: PreTrainedTokenizerFast
    sources: dict[str, dict[str, Any]]
    trained: bool
    prompts: tuple[str, ...] = ()
    stand_in_tokenizer: bool = False


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model: from a local directory, the table of known models, or the hub."""
    if not Path(name).is_dir() and (known := architecture(name)) is not None:
        return config_from(known)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            hub_id(name), revision=revision, local_files_only=_offline()
        )
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error) from error
    return config


def config_from(fields: dict[str, Any]) -> PreTrainedConfig:
    fields = dict(fields)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (ValueError, TypeError) as error:
        raise CompositionError(
            "The model configuration cannot be used.", str(error), remedy="mend `config` in the recipe"
        ) from error
    return config


def check_types(llm: PreTrainedConfig, slm: PreTrainedConfig) -> None:
    """Refuse model types that are not supported, both at once."""
    problems = []
    if llm.model_type not in LLM_TYPES:
        problems.append(f"LLM of type {llm.model_type!r}; supported: {', '.join(LLM_TYPES)}")
    if slm.model_type not in SLM_TYPES:
        problems.append(f"SLM of type {slm.model_type!r}; supported: {', '.join(SLM_TYPES)}")
    if problems:
        raise CompositionError("The pair is not supported.", *problems, remedy="choose models of the supported types")


def load_encoder(name: str, revision: str | None = None, *, random: bool = False) -> nn.Module:
    """The LLM's encoder alone, float32, in evaluation mode."""
    return _load(AutoModelForTextEncoding, name, revision, random=random)


def load_full(name: str, revision: str | None = None, *, random: bool = False) -> nn.Module:
    """A model with its language-model head, float32, in evaluation mode: an SLM, or an LLM by itself."""
    config = load_config(name, revision)
    return _load(_head_class(config), name, revision, random=random)


def _head_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def model_from_config(fields: dict[str, Any]) -> nn.Module:
    """A randomly initialised model with its language-model head; the caller sets the seed."""
    config = config_from(fields)
    model: nn.Module = _head_class(config).from_config(config, dtype=torch.float32)
    return model


def _load(auto: Any, name: str, revision: str | None, *, random: bool) -> nn.Module:
    # Eager attention: the one form whose graph is plain operators, and the same function in training, in the
    # reference and in the exported graph.
    if random:
        config = load_config(name, revision)
        model: nn.Module = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
        return model.eval()
    try:
        model = auto.from_pretrained(
            hub_id(name),
            revision=revision,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=_offline(),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loadable(name, error) from error
    return model.eval()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer (one with a tokenizer.json, which is what a bundle carries)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(hub_id(name), revision=revision, local_files_only=_offline())
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error, "tokenizer") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CompositionError(
            f"The tokenizer of {name} is a {type(tokenizer).__name__}, which has no tokenizer.json.",
            remedy="convert it with transformers' `AutoTokenizer.from_pretrained(..., use_fast=True)` and save it",
        )
    return tokenizer


@cache
def _offline() -> bool:
    """Whether the hub's name cannot be resolved: then its cache answers at once, instead of after half a minute of retries."""
    if any(name.lower() in {"http_proxy", "https_proxy", "all_proxy"} for name in os.environ):
        return False  # the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _not_loadable(name: str, error: Exception, what: str = "model") -> CompositionError:
    known = hub_id(name)
    return CompositionError(
        f"The {what} {name!r} cannot be loaded" + (f" (hub id {known})." if known != name else "."),
        f"not a local directory: {Path(name).absolute()}"
        if not Path(name).is_dir()
        else f"looked in {Path(name).absolute()}",
        str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
        remedy="check the name and the network, give a local directory, or try --random-weights for a dry run of an architecture",
    )


def require_same_tokenization(llm: PreTrainedTokenizerFast, slm: PreTrainedTokenizerFast) -> None:
    """Refuse a `shared` tokenizer that is not: position-wise fusion of two different splits would mix up tokens.

    Raises:
        CompositionError: with the probe sentences that differ.
    """
    differing = [text for text in PROBES if llm(text).input_ids != slm(text).input_ids]
    if differing:
        text = differing[0]
        raise CompositionError(
            f"The LLM and the SLM split prompts differently ({len(differing)} of {len(PROBES)} probe sentences), "
            "so position i of one is not position i of the other.",
            f"{text!r}: LLM ids {llm(text).input_ids[:12]}, SLM ids {slm(text).input_ids[:12]}",
            remedy="pair models that share a tokenizer; fusing two different tokenizations position by position is refused",
        )


def load_composition(directory: Path) -> LoadedPair:
    """Load a composition and check that its parts fit.

    Raises:
        CompositionError: a part is missing or damaged, or widths, layers or tokenizers do not fit; all misfits at once.
    """
    file = read_composition(directory)
    llm_name, slm_name = _resolve(directory, file.llm.model), _resolve(directory, file.slm.model)
    check_types(load_config(llm_name, file.llm.revision), load_config(slm_name))
    slm = load_full(slm_name)
    llm = load_encoder(llm_name, file.llm.revision)
    projector = load_projector(directory, file.projector)
    slm_tokenizer = load_tokenizer(slm_name)
    llm_tokenizer = load_tokenizer(
        _resolve(directory, file.llm.tokenizer) if file.llm.tokenizer else llm_name, file.llm.revision
    )
    require_same_tokenization(llm_tokenizer, slm_tokenizer)
    reference = compose(llm, projector, slm, file)
    training = directory / TRAINING_FILE
    return LoadedPair(
        reference,
        file,
        llm_tokenizer,
        slm_tokenizer,
        sources={"llm": _source(file.llm.model, llm), "slm": _source(file.slm.model, slm)},
        trained=training.is_file(),
        prompts=tuple(json.loads(training.read_text(encoding="utf-8")).get("prompts", ()))
        if training.is_file()
        else (),
    )


def compose(llm: nn.Module, projector: Projector, slm: nn.Module, file: CompositionFile) -> Reference:
    """Put the parts together after checking that they fit."""
    llm_config: Any = llm.config
    slm_config: Any = slm.config
    problems = []
    if projector.fc_in.in_features != llm_config.hidden_size:
        problems.append(f"projector d_in is {projector.fc_in.in_features}, the LLM's width is {llm_config.hidden_size}")
    if projector.fc_out.out_features != slm_config.hidden_size:
        problems.append(
            f"projector d_out is {projector.fc_out.out_features}, the SLM's width is {slm_config.hidden_size}"
        )
    layers = llm_config.num_hidden_layers
    if not -layers - 1 <= file.llm.layer <= layers:
        problems.append(f"LLM layer {file.llm.layer} of {layers} layers; choose {-layers - 1} to {layers}")
    if problems:
        raise CompositionError(
            "The parts do not fit together.", *problems, remedy="train the pair again with these models"
        )
    return Reference(llm, projector, slm, file.fusion, file.llm.layer).eval()


def compose_untrained(
    llm: ModelSource,
    slm: ModelSource,
    *,
    layer: int = -1,
    d_hidden: int | None = None,
    random_weights: bool = False,
    seed: int = 0,
    name: str | None = None,
) -> LoadedPair:
    """A pair of two models with a fresh projector, which with `add` writes what the SLM alone would.

    Args:
        llm, slm: sources that name a `model`.
        layer: which of the LLM's hidden states; -1 is its output.
        d_hidden: the projector's inner width; the SLM's width where it is not given.
        random_weights: draw the weights from `seed` instead of loading them; a configuration is then enough, and where
            the models' tokenizers cannot be had a byte-level stand-in takes their place (and is labelled).
    """
    llm_name, slm_name = str(llm.model), str(slm.model)
    llm_config, slm_config = load_config(llm_name, llm.revision), load_config(slm_name, slm.revision)
    check_types(llm_config, slm_config)
    torch.manual_seed(seed)
    writer = load_full(slm_name, slm.revision, random=random_weights)
    reader = load_encoder(llm_name, llm.revision, random=random_weights)
    projector = Projector(llm_config.hidden_size, d_hidden or slm_config.hidden_size, slm_config.hidden_size)
    stand_in = random_weights and not (_has_tokenizer(llm_name) and _has_tokenizer(slm_name))
    if stand_in:
        llm_tokenizer = slm_tokenizer = byte_tokenizer(slm_config)
    else:
        llm_tokenizer = load_tokenizer(llm.tokenizer or llm_name, llm.revision)
        slm_tokenizer = load_tokenizer(slm.tokenizer or slm_name, slm.revision)
        require_same_tokenization(llm_tokenizer, slm_tokenizer)
    file = CompositionFile(
        name=name or f"{Path(llm_name).name}_{Path(slm_name).name}",
        llm=LlmEntry(model=hub_id(llm_name), revision=llm.revision, layer=layer),
        projector=projector.entry,
    )
    weights = {"weights": "random", "seed": seed} if random_weights else {"weights": "pretrained"}
    return LoadedPair(
        compose(reader, projector, writer, file),
        file,
        llm_tokenizer,
        slm_tokenizer,
        sources={"llm": _source(llm_name, reader) | weights, "slm": _source(slm_name, writer) | weights},
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
    """A path relative to the composition, or a hub id."""
    local = directory / model
    return str(local) if local.is_dir() else model
