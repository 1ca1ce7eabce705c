"""A byte-level tokenizer for models with random weights, where the real one cannot be had."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedConfig, PreTrainedTokenizerFast


def byte_tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """One token per byte, around the special ids of `config`: any text round-trips, and no training is needed."""
    fields: Any = config
    special = {"<pad>": fields.pad_token_id, "</s>": _first(fields.eos_token_id)}
    special = {token: id for token, id in special.items() if id is not None}
    free = (i for i in range(fields.vocab_size) if i not in special.values())
    vocab = dict(special) | dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), free, strict=False))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if fields.is_encoder_decoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", special["</s>"])]
        )
    names = {"eos_token": "</s>", "pad_token": "<pad>" if "<pad>" in special else "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def _first(value: int | list[int] | None) -> int | None:
    return value[0] if isinstance(value, list) else value
