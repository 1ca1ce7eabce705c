"""The model families: which can read, which can write, and what kind of model each is. A family is a row here.

Keys are transformers' `model_type`. Every row has its test in tests/families.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from transformers import PreTrainedConfig

from llm2slm_export.contract import SlmKind
from llm2slm_export.errors import CompositionError

LlmKind = Literal["encoder-decoder", "encoder-only", "decoder-only"]

# What is read with: an encoder-decoder's encoder, a whole encoder, or a decoder without its language-model head.
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


# Rotary positions whose frequencies are constants. `dynamic` computes them from the length of the call, `longrope` chooses between
# two sets by the longest row of the batch, so that a row's states would depend on the rows beside it.
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


def check_types(llm: PreTrainedConfig, slm: PreTrainedConfig) -> None:
    """Refuse models that are not in the tables, and configurations that cannot be exported, both models at once.

    Raises:
        CompositionError: with the types that are supported, by kind, and every configuration value that is not.
    """
    problems = []
    if llm.model_type not in LLM_ARCHITECTURES:
        problems.append(f"LLM of type {llm.model_type!r}; supported: {_listed(LLM_ARCHITECTURES)}")
    if slm.model_type not in SLM_ARCHITECTURES:
        problems.append(f"SLM of type {slm.model_type!r}; supported: {_listed(SLM_ARCHITECTURES)}")
    attention = getattr(llm, "encoder_attention_type", "local")
    if llm.model_type == "longt5" and attention != "local":
        # Its global tokens are counted on the padded length, so that a row's states depend on its batch mates.
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
        said = getattr(part, "rope_parameters", None) or {}
        # Gemma 3 has a set for each kind of layer.
        sets = said.values() if said and all(isinstance(value, dict) for value in said.values()) else [said]
        for parameters in sets:
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            if kind not in ROPE_TYPES:
                yield f"rope_scaling of type {kind!r} in config.json; supported: {', '.join(sorted(ROPE_TYPES))}"


def _listed(table: Mapping[str, str]) -> str:
    kinds = dict.fromkeys(table.values())
    return "; ".join(f"{kind}: {', '.join(t for t, k in table.items() if k == kind)}" for kind in kinds)
