"""Special ids: an SLM's, resolved as in transformers' `generate`, and the padding of prompts."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class SlmIds:
    """An SLM's special ids: EOS, padding, and the decoder start of an encoder-decoder."""

    eos: tuple[int, ...]
    pad: int | None
    decoder_start: int | None


def slm_special_ids(slm: nn.Module) -> SlmIds:
    """The special ids that transformers' `generate` would use."""
    model: Any = slm
    generation, config = model.generation_config, model.config
    eos = generation.eos_token_id
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    start = None
    if config.is_encoder_decoder:
        known = (
            generation.decoder_start_token_id,
            getattr(config, "decoder_start_token_id", None),
            generation.bos_token_id,
        )
        start = next((id for id in known if id is not None), None)
    pad = generation.pad_token_id
    return SlmIds(eos_ids, pad if pad is not None else next(iter(eos_ids), None), start)


def prompt_pad(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that pads prompts: the padding token's or, because padding is masked, EOS."""
    pad: int | None = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pad
