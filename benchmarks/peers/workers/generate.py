"""transformers' `generate`, and its subclasses', told token by token."""

from typing import Any

import torch
from protocol import Task, Tell, Write
from transformers.generation.streamers import BaseStreamer


class _Teller(BaseStreamer):
    """A streamer is given the prompt first (an encoder-decoder: its start token), then each token."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._prompt = tell, True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self._tell(int(value))
        self._prompt = False

    def end(self) -> None:
        pass


def writer(model: Any, task: Task) -> Write:
    """Greedy `generate` of a model."""
    ids = torch.tensor([task.ids])
    mask = torch.ones_like(ids)

    def write(new: int, tell: Tell) -> None:
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=new, min_new_tokens=new,
                pad_token_id=task.eos, streamer=_Teller(tell),
            )  # fmt: skip

    return write
