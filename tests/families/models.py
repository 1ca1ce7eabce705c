"""Tiny configurations of every family, awkward on purpose.

Odd vocabularies, heads × head_dim ≠ d_model, unequal encoder and decoder layers (both ways), grouped-query attention 3:1,
sliding windows shorter than the prompts, tied and untied heads, gated and plain feed-forward layers. Every layer is traced: the families
that CI builds have two.
"""

from typing import Any

IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
START = {"decoder_start_token_id": 0, **IDS}

_T5 = {
    "vocab_size": 307, "d_model": 48, "d_kv": 7, "d_ff": 50, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 5,
    **START,
}  # fmt: skip
_BART = {
    "vocab_size": 311, "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 50, "decoder_ffn_dim": 42, "max_position_embeddings": 260,
    **START, "forced_eos_token_id": None,
}  # fmt: skip
# 6 query heads over 2 key/value heads, whose widths do not add up to the model's.
_ROTARY = {
    "vocab_size": 313, "hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 14, "max_position_embeddings": 512, **IDS,
}  # fmt: skip
_SLIDING = {"sliding_window": 5}
_GEMMA = {
    **_ROTARY,
    "query_pre_attn_scalar": 14,
    **_SLIDING,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GEMMA["num_hidden_layers"] = 4
_T5GEMMA_PART = {
    **_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "attention_bias": False,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", **_T5},
    "t5-gated": {"model_type": "t5", **_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5-deep-decoder": {"model_type": "t5", **_T5, "num_layers": 2, "num_decoder_layers": 3},
    "mt5": {"model_type": "mt5", **_T5, "feed_forward_proj": "gated-gelu"},
    "umt5": {"model_type": "umt5", **_T5, "feed_forward_proj": "gated-gelu"},
    "longt5-local": {"model_type": "longt5", **_T5, "local_radius": 4, "encoder_attention_type": "local"},
    "bart": {"model_type": "bart", **_BART, "encoder_layers": 2, "scale_embedding": True},
    "mbart": {"model_type": "mbart", **_BART, "scale_embedding": True},
    "marian": {
        "model_type": "marian", **_BART, "scale_embedding": True, "decoder_start_token_id": 0, "activation_function": "swish",
    },
    "pegasus": {"model_type": "pegasus", **_BART, "scale_embedding": True},
    "distilbert": {
        "model_type": "distilbert", "vocab_size": 311, "dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 50,
        "max_position_embeddings": 260, "pad_token_id": 0,
    },
    "bert": {
        "model_type": "bert", "vocab_size": 311, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 50, "max_position_embeddings": 260, "pad_token_id": 0,
    },
    "modernbert": {
        "model_type": "modernbert", "vocab_size": 311, "hidden_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 50, "max_position_embeddings": 512, "local_attention": 6,
        "global_attn_every_n_layers": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "cls_token_id": 2,
        "sep_token_id": 1,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 313, "n_embd": 48, "n_layer": 3, "n_head": 3, "n_positions": 600, **IDS,
    },
    "opt": {
        "model_type": "opt", "vocab_size": 313, "hidden_size": 48, "num_hidden_layers": 3, "ffn_dim": 50,
        "num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": 40, "do_layer_norm_before": True, **IDS,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "vocab_size": 313, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 50, "max_position_embeddings": 512, "rotary_pct": 0.5, **IDS,
    },
    "llama": {"model_type": "llama", **_ROTARY, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_ROTARY, **_SLIDING, "num_hidden_layers": 2},
    "qwen2": {
        "model_type": "qwen2", **_ROTARY, **_SLIDING, "use_sliding_window": True, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **_ROTARY, **_SLIDING, "use_sliding_window": True, "max_window_layers": 2},
    "smollm3": {"model_type": "smollm3", **_ROTARY, "no_rope_layers": [1, 0, 1]},
    "phi3": {"model_type": "phi3", **_ROTARY, **_SLIDING},
    "olmo2": {"model_type": "olmo2", **_ROTARY},
    "granite": {
        "model_type": "granite", **_ROTARY, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
        "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "gemma2": {"model_type": "gemma2", **_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {"model_type": "gemma3_text", **_GEMMA},
    "t5gemma": {
        "model_type": "t5gemma",
        "encoder": {**_T5GEMMA_PART}, "decoder": {**_T5GEMMA_PART}, **IDS, "decoder_start_token_id": 2,
    },
    # The 9B-2B shape: a wide, deep encoder under a narrow decoder.
    "t5gemma-unbalanced": {
        "model_type": "t5gemma",
        "encoder": {**_T5GEMMA_PART, "hidden_size": 48},
        "decoder": {**_T5GEMMA_PART, "hidden_size": 30, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
                    "cross_attention_hidden_size": 48},
        **IDS, "decoder_start_token_id": 2,
    },
    "t5gemma2": {
        "model_type": "t5gemma2",
        "encoder": {
            "text_config": {**_GEMMA},
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
            "mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 298, "eoi_token_index": 299,
        },
        "decoder": {**_GEMMA}, **IDS, "image_token_index": 300,
    },
}  # fmt: skip
