"""Loading models and tokenizers through transformers: aliases, hub ids, local directories, random weights."""

import copy
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
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
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    ByT5Tokenizer,
    LongT5EncoderModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from llm2slm_export.errors import CompositionError
from llm2slm_export.models.byte_tokenizer import fast_byt5
from llm2slm_export.models.catalog import architecture, hub_id
from llm2slm_export.models.families import READERS


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


def load_reader(name: str, revision: str | None = None, *, random: bool = False) -> nn.Module:
    """The LLM's reading part, float32, in evaluation mode: an encoder, or a decoder without its language-model head."""
    config = load_config(name, revision)
    if random:
        return reader_from_config(config)
    return _reading_part(_load(_reader_class(config), name, revision))


def reader_from_config(config: PreTrainedConfig) -> nn.Module:
    """A randomly initialised reading part; the caller sets the seed."""
    return _reading_part(_made(_reader_class(config), config))


def _reader_class(config: PreTrainedConfig) -> Any:
    """The smallest class that holds the reading part: a T5-XL's decoder is not even read from disk."""
    if config.model_type == "longt5":
        return LongT5EncoderModel
    return AutoModelForTextEncoding if config.model_type in {"t5", "mt5", "umt5"} else AutoModel


def _reading_part(model: Any) -> nn.Module:
    kind = READERS[model.config.model_type]
    if kind == "decoder-only":
        model.config.use_cache = False  # it reads once: keys and values would be computed for nothing
    reader: nn.Module = model.get_encoder() if kind == "encoder-decoder" else model
    return reader


def load_full(name: str, revision: str | None = None, *, random: bool = False) -> nn.Module:
    """A model with its language-model head, float32, in evaluation mode: an SLM, or an LLM by itself."""
    config = load_config(name, revision)
    return _made(_head_class(config), config) if random else _load(_head_class(config), name, revision)


def model_from_config(fields: dict[str, Any]) -> nn.Module:
    """A randomly initialised model with its language-model head; the caller sets the seed."""
    config = config_from(fields)
    return _made(_head_class(config), config)


def _head_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


# Eager attention: the one form whose graph is plain operators, and the same function in training, in the reference and
# in the exported graph.
_FORM = {"dtype": torch.float32, "attn_implementation": "eager"}


def _made(model_class: Any, config: PreTrainedConfig) -> nn.Module:
    make = getattr(model_class, "from_config", None) or model_class._from_config  # an auto class, or a model's own
    # transformers changes the configuration that an encoder is made from.
    model: nn.Module = make(copy.deepcopy(config), **_FORM)
    return model.eval()


def _load(model_class: Any, name: str, revision: str | None) -> nn.Module:
    try:
        with _quiet():
            model, report = model_class.from_pretrained(
                hub_id(name), revision=revision, local_files_only=_offline(), output_loading_info=True, **_FORM
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loadable(name, error) from error
    # A BERT's pooler is often not published, and nothing here reads it.
    missing = sorted(key for key in report["missing_keys"] if "pooler." not in key)
    if missing:
        more = [f"and {len(missing) - 5} more"] if len(missing) > 5 else []
        raise CompositionError(
            f"The model {name!r} lacks {len(missing)} weights; transformers would draw them at random.",
            *missing[:5],
            *more,
            remedy="the checkpoint and its config.json must be of the same model; save it again with save_pretrained",
        )
    loaded: nn.Module = model
    return loaded.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No report of the decoder's weights that a T5's encoder does not load, and no bar for what takes a moment; what
    fails still raises."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer (one with a tokenizer.json, which is what a bundle carries).

    Raises:
        CompositionError: there is none, or it cannot be made a fast one.
    """
    if (directory := Path(name)).is_dir() and not any(_is_of_a_tokenizer(path) for path in directory.iterdir()):
        # transformers 5.23 makes an empty tokenizer of a T5 without one, which knows no word.
        raise CompositionError(
            f"{name} holds no tokenizer.",
            f"looked for tokenizer.json in {directory.absolute()}",
            remedy="name the directory that holds the model's tokenizer (`llm.tokenizer`, `slm.tokenizer` in a recipe)",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(hub_id(name), revision=revision, local_files_only=_offline())
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error, "tokenizer") from error
    if isinstance(tokenizer, ByT5Tokenizer):
        return fast_byt5(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CompositionError(
            f"The tokenizer of {name} is a {type(tokenizer).__name__}, which has no tokenizer.json.",
            remedy="convert it with transformers' `AutoTokenizer.from_pretrained(..., use_fast=True)` and save it",
        )
    return tokenizer


def _is_of_a_tokenizer(path: Path) -> bool:
    return path.name.startswith(("tokenizer", "vocab")) or path.suffix in {".model", ".spm"}


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
