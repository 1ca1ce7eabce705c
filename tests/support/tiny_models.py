"""Configurations of tiny models, of awkward sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

# heads × head_dim ≠ d_model, grouped-query attention 3:1, an odd vocabulary. Two layers, because every layer is traced;
# the demo's SLM has fewer encoder than decoder layers.
LLM_CONFIG = {
    "model_type": "t5", "vocab_size": 307, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 5,
    "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SLM_CONFIGS: dict[str, dict[str, Any]] = {
    "t5": {
        "model_type": "t5", "vocab_size": 307, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2,
        "num_decoder_layers": 2, "num_heads": 3, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 307, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 307, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 600,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    },
}  # fmt: skip

SaveModel = Callable[..., Path]
