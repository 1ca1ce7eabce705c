"""A checkpoint beside the class that reads it: files that are no weights, quantised weights, tensors that do not fit."""

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
# Buffers that earlier releases of transformers saved, and that classes compute themselves.
_COMPUTED = re.compile(
    r"rotary_emb\.inv_freq$|position_ids$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$|embed_positions\.weights?$"
    r"|EncDecAttention\.relative_attention_bias\.weight$"
)


def check_files(name: str) -> None:
    """Check what can be seen of a local directory before transformers loads it.

    Raises:
        CompositionError: files are pointers of Git LFS, the model needs code of its own, or its weights are quantised.
    """
    directory = Path(name)
    if not directory.is_dir():
        return
    pointers = [path.name for path in sorted(directory.iterdir()) if path.is_file() and _is_pointer(path)]
    if pointers:
        raise CompositionError(
            f"{name} holds pointers of Git LFS in place of {len(pointers)} files.",
            *listed(pointers),
            remedy=f"git -C {directory} lfs pull",
        )
    try:
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong with it
    if not isinstance(fields, dict):
        return
    if fields.get("auto_map") and fields.get("model_type") not in CONFIG_MAPPING:
        raise CompositionError(
            f"The model {name!r} has code of its own, which is never run.",
            f"config.json: model_type {fields.get('model_type')!r} is none that transformers {transformers.__version__} knows; "
            f"auto_map: {fields['auto_map']}",
            remedy="choose a model of a type that transformers itself has",
        )
    if fields.get("quantization_config"):
        raise _quantised(name, fields["quantization_config"])


def check_config(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model of the hub whose weights are quantised, before they are fetched.

    Raises:
        CompositionError: they are.
    """
    method = getattr(config, "quantization_config", None)
    if method:
        raise _quantised(name, method)


def _quantised(name: str, settings: Any) -> CompositionError:
    method = (
        settings.get("quant_method", "an unnamed method") if isinstance(settings, dict) else type(settings).__name__
    )
    return CompositionError(
        f"The checkpoint {name!r} is quantised ({method}).",
        "a build rounds weights itself (--precision), and the parity gate needs the weights as they were trained",
        remedy="give the unquantised checkpoint of the same model",
    )


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > 1024:  # a pointer has some 130 bytes
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def check_tensors(name: str, model: Any, report: dict[str, Any]) -> None:
    """Check that the checkpoint and the class that read it hold the same tensors, in the same sizes.

    Args:
        report: transformers' `output_loading_info`.

    Raises:
        CompositionError: with the tensors that are missing, that have another size, and that the class does not read.
    """
    missing = sorted(key for key in report["missing_keys"] if not _made_here(model, key))
    sizes = [
        f"{key}: the checkpoint's is {list(found)}, config.json makes it {list(expected)}"
        for key, found, expected in sorted(report["mismatched_keys"])
    ]
    unread = sorted(_unread(model, report["unexpected_keys"]))
    if missing:
        raise CompositionError(
            f"The model {name!r} lacks {len(missing)} weights; transformers would draw them at random.",
            *listed(missing),
            remedy="the checkpoint and its config.json must be of the same model; save it again with save_pretrained",
        )
    if sizes or unread:
        raise CompositionError(
            f"The checkpoint {name!r} does not fit its config.json.",
            *listed(sizes),
            *listed([f"{key}: in the checkpoint, and not read by {type(model).__name__}" for key in unread]),
            remedy="the checkpoint and its config.json must be of the same model; save it again with save_pretrained",
        )


def _made_here(model: nn.Module, key: str) -> bool:
    """Whether a missing tensor is computed by its module, or not used by anything here."""
    if "pooler." in key:  # a BERT's pooler is often not published, and nothing here reads it
        return True
    owner = model.get_submodule(key.rpartition(".")[0])
    return "Sinusoidal" in type(owner).__name__  # Marian, Pegasus


def _unread(model: Any, keys: Any) -> Iterator[str]:
    """The tensors of a checkpoint that belong to what is read, and that nothing reads.

    A reading part leaves out heads and, of an encoder-decoder, the decoder.
    """
    whole = model.can_generate()
    parts = {child for child, _ in model.named_children()}
    if not whole and LLM_ARCHITECTURES.get(model.config.model_type) == "encoder-decoder":
        parts.discard("decoder")
    for key in keys:
        inside = key.removeprefix(f"{model.base_model_prefix}.")
        if not _COMPUTED.search(key) and (whole or inside.partition(".")[0] in parts):
            yield key
