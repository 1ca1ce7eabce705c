"""Supported model families, as LLM and as SLM, with the kind of each. A family is one row per table.

Keys are transformers' `model_type`. tests/families tests every row.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from transformers import PreTrainedConfig

from llm2slm_export.contract import SlmKind
from llm2slm_export.errors import CompositionError

LlmKind = Literal["encoder-decoder", "encoder-only", "decoder-only"]

# The part that encodes prompts: the encoder of an encoder-decoder, or the model without its language-model head.
LLM_ARCHITECTURES: dict[str, LlmKind] = {
    "t5": "encoder-decoder",  # T5, T5 1.1, Flan-T5, ByT5
    "mt5": "encoder-decoder",
    "umt5": "encoder-decoder",
    "longt5": "encoder-decoder",
    "bart": "encoder-decoder",
    "mbart": "encoder-decoder",
    "marian": "encoder-decoder",  # opus-mt
    "pegasus": "encoder-decoder",
    "t5gemma": "encoder-decoder",
    "t5gemma2": "encoder-decoder",
    "bert": "encoder-only",  # BERT, MiniLM
    "distilbert": "encoder-only",
    "modernbert": "encoder-only",
    "gpt2": "decoder-only",
    "opt": "decoder-only",
    "gpt_neox": "decoder-only",  # GPT-NeoX, Pythia
    "llama": "decoder-only",  # Llama, SmolLM, TinyLlama
    "mistral": "decoder-only",
    "qwen2": "decoder-only",
    "qwen3": "decoder-only",
    "smollm3": "decoder-only",
    "phi3": "decoder-only",
    "olmo2": "decoder-only",
    "granite": "decoder-only",
    "gemma2": "decoder-only",
    "gemma3_text": "decoder-only",
}

SLM_ARCHITECTURES: dict[str, SlmKind] = {
    "t5": "encoder-decoder",
    "mt5": "encoder-decoder",
    "umt5": "encoder-decoder",
    "bart": "encoder-decoder",
    "mbart": "encoder-decoder",
    "marian": "encoder-decoder",
    "pegasus": "encoder-decoder",
    "t5gemma": "encoder-decoder",
    "gpt2": "decoder-only",
    "opt": "decoder-only",
    "gpt_neox": "decoder-only",
    "llama": "decoder-only",
    "mistral": "decoder-only",
    "qwen2": "decoder-only",
    "qwen3": "decoder-only",
    "smollm3": "decoder-only",
    "phi3": "decoder-only",
    "olmo2": "decoder-only",
    "granite": "decoder-only",
    "gemma2": "decoder-only",
    "gemma3_text": "decoder-only",
}


# RoPE types with constant frequencies. `dynamic` computes them from the length of the call, and `longrope` selects one
# of two sets by the longest row of the batch: a row's hidden states would depend on the other rows.
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


def check_types(llm: PreTrainedConfig, slm: PreTrainedConfig) -> None:
    """Check that both models are of supported families and configurations.

    Raises:
        CompositionError: the message lists the supported types by kind, and every unsupported value of both models.
    """
    problems = []
    if llm.model_type not in LLM_ARCHITECTURES:
        problems.append(f"LLM of type {llm.model_type!r}; supported: {_listed(LLM_ARCHITECTURES)}")
    if slm.model_type not in SLM_ARCHITECTURES:
        problems.append(f"SLM of type {slm.model_type!r}; supported: {_listed(SLM_ARCHITECTURES)}")
    attention = getattr(llm, "encoder_attention_type", "local")
    if llm.model_type == "longt5" and attention != "local":
        # Transient-global attention counts its tokens on the padded length: states would depend on the other rows.
        problems.append(f"LLM of type 'longt5' with {attention} attention; supported: local")
    problems += [f"LLM: {problem}" for problem in _rope_problems(llm)]
    problems += [f"SLM: {problem}" for problem in _rope_problems(slm)]
    if problems:
        raise CompositionError(
            "The pair is not supported.", *problems, remedy="choose models of the supported types and configurations"
        )


def _rope_problems(config: PreTrainedConfig) -> Iterator[str]:
    parts: dict[int, Any] = {
        id(part): part for part in (config, config.get_text_config(), config.get_text_config(decoder=True))
    }
    for part in parts.values():
        rope = getattr(part, "rope_parameters", None) or {}
        # Gemma 3 has one set of parameters per kind of layer.
        sets = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
        for parameters in sets:
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            if kind not in ROPE_TYPES:
                yield f"rope_scaling of type {kind!r} in config.json; supported: {', '.join(sorted(ROPE_TYPES))}"


def _listed(table: Mapping[str, str]) -> str:
    kinds = dict.fromkeys(table.values())
    return "; ".join(f"{kind}: {', '.join(t for t, k in table.items() if k == kind)}" for kind in kinds)
