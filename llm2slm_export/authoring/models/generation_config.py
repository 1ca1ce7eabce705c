"""An SLM's generation_config.json: exported options, options without effect, and refused options.

Every option of transformers is in one of these groups. An option of a later transformers release is in neither of the
first two, and is therefore refused if it is set.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.utils import cached_file

from llm2slm_export.bundle.manifest import GenerationDefaults
from llm2slm_export.errors import CompositionError

GENERATION_CONFIG_FILE = "generation_config.json"
EXPORTED = frozenset(GenerationDefaults.model_fields) - {"max_new_tokens"}
# Handled elsewhere: special ids in special_tokens.py; `min_length` is exported as min_new_tokens.
_IDS = frozenset({"bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"})
_LENGTHS = frozenset({"max_length", "max_new_tokens", "min_length"})
# Options of computation and return format, which do not change the text, and options of assistant models.
WITHOUT_EFFECT = frozenset({
    "assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind", "cache_config",
    "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile", "is_assistant", "low_memory",
    "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "output_attentions",
    "output_hidden_states", "output_logits", "output_scores", "prefill_chunk_size", "return_dict_in_generate",
    "speculation_type", "target_lookbehind", "transformers_version", "use_cache", "use_mtp",
})  # fmt: skip
# Values that disable an option.
_OFF = {"encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "num_beam_groups": 1}


def check_generation_config(name: str, revision: str | None, *, offline: bool) -> None:
    """Check that a model's generation_config.json, if it has one, is readable.

    transformers falls back to its defaults for an unreadable file, without a warning.

    Args:
        name: a hub id or a local directory.
        revision: branch, tag or commit of a hub id.
        offline: use the hub's local cache only.

    Raises:
        CompositionError: the file is truncated, or not a JSON object.
    """
    path = cached_file(
        name, GENERATION_CONFIG_FILE, revision=revision, local_files_only=offline,
        _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if path is None:
        return
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        reason = None if isinstance(found, dict) else f"expected an object, got {type(found).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    if reason is not None:
        raise CompositionError(
            f"The {GENERATION_CONFIG_FILE} of {name!r} cannot be read.",
            str(path),
            reason,
            remedy="copy the file again, or remove it if the model needs no generation options",
        )


def require_exportable(slm: nn.Module) -> None:
    """Check that a bundle supports the SLM's generation_config.

    Raises:
        CompositionError: the message lists every unsupported option.
    """
    refused = list(_refused(slm))
    if refused:
        raise CompositionError(
            "The SLM's generation_config has options that bundles do not support.",
            *(f"{name}: {value}" for name, value in refused),
            remedy=f"remove them from the SLM's {GENERATION_CONFIG_FILE}, or choose another SLM",
        )


def _refused(slm: nn.Module) -> Iterator[tuple[str, Any]]:
    chosen: GenerationConfig = slm.generation_config
    for name in GenerationConfig().to_dict():
        value = getattr(chosen, name, None)
        known = name in EXPORTED | _IDS | _LENGTHS | WITHOUT_EFFECT or name.startswith("_")
        if value and not known and value != _OFF.get(name):
            yield name, value


def own_options(slm: nn.Module) -> GenerationConfig:
    """The SLM's exported options and special ids, for transformers' `generate`.

    Options without effect on the text are left out: `return_dict_in_generate` would change the return type,
    `cache_implementation` the cache.
    """
    chosen: Any = slm.generation_config
    kept = {name: getattr(chosen, name, None) for name in sorted(EXPORTED | _IDS)}
    return GenerationConfig(**{name: value for name, value in kept.items() if value is not None})
