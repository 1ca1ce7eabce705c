"""Checks of a checkpoint: Git LFS pointers, custom code, quantized weights, and tensors that do not match the class."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from llm2slm_export.authoring.models.architectures import LLM_ARCHITECTURES
from llm2slm_export.errors import CompositionError, listed

_LFS_POINTER = b"version https://git-lfs"
# Buffers that earlier releases of transformers saved; current classes compute them.
_COMPUTED = re.compile(
    r"rotary_emb\.inv_freq$|position_ids$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$|embed_positions\.weights?$"
    r"|EncDecAttention\.relative_attention_bias\.weight$"
)


def check_files(name: str) -> None:
    """Check a local directory before transformers loads it.

    Raises:
        CompositionError: files are Git LFS pointers, the model needs custom code, or its weights are quantized.
    """
    directory = Path(name)
    if not directory.is_dir():
        return
    pointers = [path.name for path in sorted(directory.iterdir()) if path.is_file() and _is_pointer(path)]
    if pointers:
        raise CompositionError(
            f"{name} holds Git LFS pointers instead of {len(pointers)} files.",
            *listed(pointers),
            remedy=f"git -C {directory} lfs pull",
        )
    try:
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # transformers reports the error
    if not isinstance(fields, dict):
        return
    if fields.get("auto_map") and fields.get("model_type") not in CONFIG_MAPPING:
        raise CompositionError(
            f"The model {name!r} has custom code, which is never run.",
            f"config.json: transformers {transformers.__version__} has no model_type {fields.get('model_type')!r}; "
            f"auto_map: {fields['auto_map']}",
            remedy="choose a model type that transformers supports without custom code",
        )
    if fields.get("quantization_config"):
        raise _quantised(name, fields["quantization_config"])


def check_config(name: str, config: PreTrainedConfig) -> None:
    """Refuse a hub model with quantized weights, before they are downloaded.

    Raises:
        CompositionError: the weights are quantized.
    """
    method = getattr(config, "quantization_config", None)
    if method:
        raise _quantised(name, method)


def _quantised(name: str, settings: Any) -> CompositionError:
    method = (
        settings.get("quant_method", "an unnamed method") if isinstance(settings, dict) else type(settings).__name__
    )
    return CompositionError(
        f"The checkpoint {name!r} is quantized ({method}).",
        "a build quantizes weights itself (--precision), and the parity gate needs the original weights",
        remedy="give the unquantized checkpoint of the same model",
    )


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > 1024:  # a pointer has about 130 bytes
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def check_tensors(name: str, model: Any, report: dict[str, Any]) -> None:
    """Check that the checkpoint has the model's tensors, with the same shapes.

    Args:
        name: the model, for messages.
        model: the loaded model.
        report: transformers' `output_loading_info`.

    Raises:
        CompositionError: the message lists the tensors that are missing, have another shape, or are unused.
    """
    missing = sorted(key for key in report["missing_keys"] if not _made_here(model, key))
    sizes = [
        f"{key}: shape {list(found)} in the checkpoint, {list(expected)} by config.json"
        for key, found, expected in sorted(report["mismatched_keys"])
    ]
    unread = sorted(_unread(model, report["unexpected_keys"]))
    if missing:
        raise CompositionError(
            f"The model {name!r} lacks {len(missing)} weights; transformers would initialize them at random.",
            *listed(missing),
            remedy="the checkpoint and its config.json must be of the same model; save it again with save_pretrained",
        )
    if sizes or unread:
        raise CompositionError(
            f"The checkpoint {name!r} does not fit its config.json.",
            *listed(sizes),
            *listed([f"{key}: in the checkpoint, not used by {type(model).__name__}" for key in unread]),
            remedy="the checkpoint and its config.json must be of the same model; save it again with save_pretrained",
        )


def _made_here(model: nn.Module, key: str) -> bool:
    """Whether the module computes a missing tensor, or nothing here uses it."""
    if "pooler." in key:  # BERT's pooler is often not published; hidden states do not depend on it
        return True
    owner = model.get_submodule(key.rpartition(".")[0])
    return "Sinusoidal" in type(owner).__name__  # Marian, Pegasus


def _unread(model: Any, keys: Any) -> Iterator[str]:
    """The checkpoint's tensors that belong to the model's part, and that its class does not use.

    A model without a language-model head leaves out heads and, of an encoder-decoder, the decoder.
    """
    whole = model.can_generate()
    parts = {child for child, _ in model.named_children()}
    if not whole and LLM_ARCHITECTURES.get(model.config.model_type) == "encoder-decoder":
        parts.discard("decoder")
    for key in keys:
        inside = key.removeprefix(f"{model.base_model_prefix}.")
        if not _COMPUTED.search(key) and (whole or inside.partition(".")[0] in parts):
            yield key
