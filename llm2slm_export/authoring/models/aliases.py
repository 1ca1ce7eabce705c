"""Names for well-known models: alias → hub id and architecture, so that `plan` and `--random-weights` need no hub."""

from typing import Any

# Fields of transformers' configurations, as published in each model's config.json.
_T5_RELATIVE = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64, "relative_attention_num_buckets": 32}


def _t5(d_model: int, d_ff: int, layers: int, heads: int, *, gated: bool, **more: Any) -> dict[str, Any]:
    return {
        **_T5_RELATIVE,
        "d_model": d_model,
        "d_ff": d_ff,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": not gated,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        **more,
    }


def _gpt2(n_embd: int, n_layer: int, n_head: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": n_embd, "n_layer": n_layer,
        "n_head": n_head, "bos_token_id": 50256, "eos_token_id": 50256,
    }  # fmt: skip


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more,
    }  # fmt: skip


def _bart(d_model: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "bart", "vocab_size": 50265, "d_model": d_model, "encoder_layers": layers, "decoder_layers": layers,
        "encoder_attention_heads": heads, "decoder_attention_heads": heads, "encoder_ffn_dim": 4 * d_model,
        "decoder_ffn_dim": 4 * d_model, "max_position_embeddings": 1024, **more,
    }  # fmt: skip


def _pythia(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": hidden, "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 2048, "rotary_pct": 0.25,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


def _gemma2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 256000, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip


_GEMMA2_2B, _GEMMA2_9B = _gemma2(2304, 9216, 26, 8, 4), _gemma2(3584, 14336, 42, 16, 8)

CATALOG: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-small": ("google-t5/t5-small", _t5(512, 2048, 6, 8, gated=False)),
    "t5-base": ("google-t5/t5-base", _t5(768, 3072, 12, 12, gated=False)),
    "t5-large": ("google/t5-v1_1-large", _t5(1024, 2816, 24, 16, gated=True)),
    "t5-xl": ("google/t5-v1_1-xl", _t5(2048, 5120, 24, 32, gated=True)),
    "t5-xxl": ("google/t5-v1_1-xxl", _t5(4096, 10240, 24, 64, gated=True)),
    "t5-v1_1-small": ("google/t5-v1_1-small", _t5(512, 1024, 8, 6, gated=True)),
    "t5-v1_1-base": ("google/t5-v1_1-base", _t5(768, 2048, 12, 12, gated=True)),
    "flan-t5-small": ("google/flan-t5-small", _t5(512, 1024, 8, 6, gated=True)),
    "flan-t5-base": ("google/flan-t5-base", _t5(768, 2048, 12, 12, gated=True)),
    "flan-t5-large": ("google/flan-t5-large", _t5(1024, 2816, 24, 16, gated=True)),
    "flan-t5-xl": ("google/flan-t5-xl", _t5(2048, 5120, 24, 32, gated=True)),
    "flan-t5-xxl": ("google/flan-t5-xxl", _t5(4096, 10240, 24, 64, gated=True)),
    "mt5-small": ("google/mt5-small", _t5(512, 1024, 8, 6, gated=True, model_type="mt5", vocab_size=250112)),
    "mt5-base": ("google/mt5-base", _t5(768, 2048, 12, 12, gated=True, model_type="mt5", vocab_size=250112)),
    "mt5-large": ("google/mt5-large", _t5(1024, 2816, 24, 16, gated=True, model_type="mt5", vocab_size=250112)),
    "mt5-xl": ("google/mt5-xl", _t5(2048, 5120, 24, 32, gated=True, model_type="mt5", vocab_size=250112)),
    "gpt2": ("openai-community/gpt2", _gpt2(768, 12, 12)),
    "gpt2-medium": ("openai-community/gpt2-medium", _gpt2(1024, 24, 16)),
    "distilgpt2": ("distilbert/distilgpt2", _gpt2(768, 6, 12)),
    "bert-base": (
        "google-bert/bert-base-uncased",
        {"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
         "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512, "pad_token_id": 0},
    ),
    "bart-base": ("facebook/bart-base", _bart(768, 6, 12)),
    "bart-large": ("facebook/bart-large", _bart(1024, 12, 16)),
    "pythia-70m": ("EleutherAI/pythia-70m", _pythia(512, 6, 8)),
    "pythia-160m": ("EleutherAI/pythia-160m", _pythia(768, 12, 12)),
    "qwen3-0.6b": (
        "Qwen/Qwen3-0.6B",
        {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
         "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
         "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": True, "bos_token_id": 151643,
         "eos_token_id": 151645},
    ),
    "gemma-2-2b": ("google/gemma-2-2b", {"model_type": "gemma2", **_GEMMA2_2B}),
    "gemma-2-9b": ("google/gemma-2-9b", {"model_type": "gemma2", **_GEMMA2_9B}),
    "t5gemma-9b-2b": (
        "google/t5gemma-9b-2b-ul2",
        {"model_type": "t5gemma", "encoder": _GEMMA2_9B,
         "decoder": {**_GEMMA2_2B, "cross_attention_hidden_size": 3584}, "vocab_size": 256000, "pad_token_id": 0,
         "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2},
    ),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M",
        _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True, rope_theta=100000.0, max_position_embeddings=8192,
               bos_token_id=0, eos_token_id=0),
    ),
}  # fmt: skip


def hub_id(name: str) -> str:
    """The hub id behind an alias; any other name is one already."""
    return CATALOG[name][0] if name in CATALOG else name


def architecture(name: str) -> dict[str, Any] | None:
    """The configuration of a model in the table, by alias or hub id; None for any other."""
    if name in CATALOG:
        return dict(CATALOG[name][1])
    return next((dict(config) for known, config in CATALOG.values() if known == name), None)
