"""The logits processors and warpers that transformers' `generate` itself makes of options."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

EOS = (1, 7)


def made_by_generate(*, start: int, eos: Sequence[int] = EOS, **asked: Any) -> list[Any]:
    """The processors that transformers' `generate` itself makes, after `start` ids given."""
    import torch
    from transformers import GenerationConfig, GenerationMixin

    words = [list(word) for word in asked.pop("bad_words_ids", ())]
    config = GenerationConfig(**asked, bad_words_ids=words or None)
    config.max_length = asked["max_new_tokens"] + start
    config._eos_token_tensor = torch.tensor(eos)
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=True), _merge_criteria_processor_list=lambda own, _: own
    )
    return list(GenerationMixin._get_logits_processor(model, config, input_ids_seq_length=start, device="cpu"))
