"""Byte-level tokenizers: ByT5's as a tokenizer.json, and a stand-in for models with random weights."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


def byte_tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and the special ids of `config`. It is lossless and needs no training."""
    fields: Any = config
    special = {"<pad>": fields.pad_token_id, "</s>": _first(fields.eos_token_id)}
    special = {token: id for token, id in special.items() if id is not None}
    free = (i for i in range(fields.vocab_size) if i not in special.values())
    vocab = dict(special) | dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), free, strict=False))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if fields.is_encoder_decoder and "</s>" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", special["</s>"])]
        )
    wanted = {"eos_token": "</s>", "pad_token": "<pad>" if "<pad>" in special else "</s>"}
    names = {name: token for name, token in wanted.items() if token in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def fast_byt5(slow: ByT5Tokenizer) -> PreTrainedTokenizerFast:
    """Convert ByT5's tokenizer, which transformers implements in Python only, to a tokenizer.json with the same ids.

    Decoding differs for invalid UTF-8: it becomes replacement characters here; transformers drops it.
    """
    added = slow.added_tokens_decoder
    special = {token.content: id for id, token in added.items()}
    # transformers numbers the bytes after the padding, EOS and unknown tokens.
    vocab = special | {char: byte + slow.offset for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(list(added.values()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    eos = str(slow.eos_token)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, special[eos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, eos_token=eos, pad_token=slow.pad_token,
        unk_token=slow.unk_token,
    )  # fmt: skip


def _first(value: int | list[int] | None) -> int | None:
    return value[0] if isinstance(value, list) else value
