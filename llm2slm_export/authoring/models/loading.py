"""Load models and tokenizers through transformers: aliases, hub ids, local directories, random weights.

All calls of transformers' loaders are here. Custom code of models (`auto_map`) is never run, and nothing prompts on the
terminal. Exceptions of the loaders become `CompositionError`.
"""

import copy
import difflib
import importlib.util
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub.constants import ENDPOINT
from torch import nn
from transformers import (
    CONFIG_MAPPING,
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

from llm2slm_export.authoring.models.aliases import architecture, hub_id
from llm2slm_export.authoring.models.architectures import LLM_ARCHITECTURES
from llm2slm_export.authoring.models.byte_tokenizer import fast_byt5
from llm2slm_export.authoring.models.checkpoint import check_config, check_files, check_tensors
from llm2slm_export.authoring.models.generation_config import check_generation_config
from llm2slm_export.authoring.models.load_errors import explained
from llm2slm_export.errors import CompositionError

SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """A model's configuration, from a local directory, the table of known models, or the hub.

    Raises:
        CompositionError: the configuration is missing or unreadable, or the weights are quantized.
    """
    if not Path(name).is_dir() and (known := architecture(name)) is not None:
        return config_from(known)
    check_files(name)
    with explained(name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(hub_id(name), revision=revision, **_how())
    check_config(name, config)
    return config


def config_from(fields: dict[str, Any]) -> PreTrainedConfig:
    """The transformers configuration of a recipe's `config`.

    Raises:
        CompositionError: the model type does not exist, or a value is invalid.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), [*LLM_ARCHITECTURES], n=1, cutoff=0.5)
        raise CompositionError(
            f"There is no model type {model_type!r}.",
            *([f"did you mean {close[0]!r}?"] if close else []),
            remedy="fix `config.model_type` in the recipe",
        )
    problems = list(_not_positive(fields))
    if problems:
        raise CompositionError("The model configuration is invalid.", *problems, remedy="fix `config` in the recipe")
    with explained(model_type, "configuration", remedy="fix `config` in the recipe"):
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **fields)
    return config


def _not_positive(fields: dict[str, Any]) -> Iterator[str]:
    """The configuration's sizes that are not positive."""
    sizes = re.compile(
        r"d_\w+|n_\w+|num_\w*(layers|heads)|\w+_size|\w+_heads|\w+_layers|\w+_dim|max_position_embeddings"
    )
    for name, value in fields.items():
        if sizes.fullmatch(name) and isinstance(value, int | float) and value < 1:
            yield f"{name}: {value}; expected at least 1"


def load_llm(name: str, revision: str | None = None, *, random: bool = False) -> nn.Module:
    """The LLM without its head, in float32 and evaluation mode: an encoder, or a decoder-only model's layers."""
    config = load_config(name, revision)
    if random:
        return llm_from_config(config)
    return _reading_part(_load(_llm_class(config), name, revision))


def llm_from_config(config: PreTrainedConfig) -> nn.Module:
    """A randomly initialized LLM without its head; the caller sets the seed."""
    return _reading_part(_made(_llm_class(config), config))


def _llm_class(config: PreTrainedConfig) -> Any:
    """The smallest class that contains the encoding part: T5's encoder class does not read the decoder from disk."""
    if config.model_type == "longt5":
        return LongT5EncoderModel
    return AutoModelForTextEncoding if config.model_type in {"t5", "mt5", "umt5"} else AutoModel


def _reading_part(model: Any) -> nn.Module:
    kind = LLM_ARCHITECTURES[model.config.model_type]
    if kind == "decoder-only":
        model.config.use_cache = False  # one forward pass needs no cached keys and values
    llm: nn.Module = model.get_encoder() if kind == "encoder-decoder" else model
    return llm


def load_full(name: str, revision: str | None = None, *, random: bool = False) -> nn.Module:
    """A model with its language-model head, in float32 and evaluation mode: an SLM, or an LLM as a baseline."""
    config = load_config(name, revision)
    if random:
        return _made(_head_class(config), config)
    check_generation_config(hub_id(name), revision, offline=_offline())
    return _load(_head_class(config), name, revision)


def model_from_config(fields: dict[str, Any]) -> nn.Module:
    """A randomly initialized model with its language-model head; the caller sets the seed."""
    config = config_from(fields)
    return _made(_head_class(config), config)


def _head_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


# Eager attention exports to basic operators, and is one implementation for training, the reference and the graph.
_FORM = {"dtype": torch.float32, "attn_implementation": "eager"}


def _how() -> dict[str, Any]:
    """Arguments of every call of transformers' loaders."""
    return {"trust_remote_code": False, "local_files_only": _offline()}


def _made(model_class: Any, config: PreTrainedConfig) -> nn.Module:
    make = getattr(model_class, "from_config", None) or model_class._from_config  # an auto class, or a model's own
    with explained(config.model_type, "configuration", remedy="fix the values of the model's configuration"):
        # transformers modifies the configuration when it creates an encoder.
        model: nn.Module = make(copy.deepcopy(config), **_FORM)
    return model.eval()


def _load(model_class: Any, name: str, revision: str | None) -> nn.Module:
    with explained(name), _quiet():
        # Tensors of another shape are reported below, by name and with both shapes.
        model, report = model_class.from_pretrained(
            hub_id(name), revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **_how(), **_FORM
        )
    check_tensors(name, model, report)
    loaded: nn.Module = model
    return loaded.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' warnings (a T5 encoder skips the decoder's weights) and progress bars."""
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
    """Load a fast tokenizer: one with a tokenizer.json, the format in bundles.

    Raises:
        CompositionError: there is no tokenizer, it cannot be converted to a fast one, its model_max_length is not a number,
            or it fails on its first use.
    """
    if (directory := Path(name)).is_dir() and not any(_is_of_a_tokenizer(path) for path in directory.iterdir()):
        # transformers 5.23 creates an empty tokenizer for a T5 directory without one.
        raise CompositionError(
            f"{name} holds no tokenizer.",
            f"looked for tokenizer.json in {directory.absolute()}",
            remedy="name the directory that holds the model's tokenizer (`llm.tokenizer`, `slm.tokenizer` in a recipe)",
        )
    check_files(name)
    _require_sentencepiece(directory)
    with explained(name, "tokenizer"), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(hub_id(name), revision=revision, **_how())
    if isinstance(tokenizer, ByT5Tokenizer):
        return fast_byt5(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CompositionError(
            f"The tokenizer of {name} is a {type(tokenizer).__name__}, which has no tokenizer.json.",
            "transformers cannot convert this class to a tokenizer.json",
            remedy="give a tokenizer.json with the same vocabulary (`slm.tokenizer` or `llm.tokenizer` in a recipe names "
            "the directory that holds it)",
        )
    longest: Any = tokenizer.model_max_length
    if not isinstance(longest, int | float) or longest != longest:
        raise CompositionError(
            f"The tokenizer of {name} is invalid.",
            f"tokenizer_config.json: model_max_length is {longest!r}, expected a number",
            remedy="fix the tokenizer_config.json, or remove model_max_length from it",
        )
    # transformers reads some settings at the first use only.
    with explained(name, "tokenizer"), _quiet():
        tokenizer(["a", "b c"])
    return tokenizer


def _require_sentencepiece(directory: Path) -> None:
    """Check that a SentencePiece tokenizer can be converted.

    Raises:
        CompositionError: there is no tokenizer.json, and the tokenizer is Marian's, which has no conversion; or
            sentencepiece or protobuf is not installed.
    """
    if not directory.is_dir() or (directory / "tokenizer.json").is_file():
        return
    pieces = sorted(path.name for path in directory.glob("*.spm"))
    if pieces:
        raise CompositionError(
            f"The tokenizer of {directory} has no tokenizer.json.",
            f"found {', '.join(pieces)}: Marian's format, which transformers does not convert",
            remedy="give a tokenizer.json with the same vocabulary (`slm.tokenizer` or `llm.tokenizer` in a recipe names "
            "the directory that holds it)",
        )
    models = [name for name in SENTENCEPIECE_FILES if (directory / name).is_file()]
    missing = [module for module in ("sentencepiece", "google.protobuf") if not _installed(module)]
    if models and missing:
        raise CompositionError(
            f"The tokenizer of {directory} must be converted from the SentencePiece format.",
            f"found {', '.join(models)}, and no tokenizer.json",
            f"not installed: {', '.join(missing)}",
            remedy="pip install 'llm2slm-export[sentencepiece]'",
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the module's package is not installed
        return False


def _is_of_a_tokenizer(path: Path) -> bool:
    return path.name.startswith(("tokenizer", "vocab")) or path.suffix in {".model", ".spm"}


@cache
def _offline() -> bool:
    """Whether the hub's host name cannot be resolved: its cache is then used at once, without retries."""
    if any(name.lower() in {"http_proxy", "https_proxy", "all_proxy"} for name in os.environ):
        return False  # the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return True
    return False
