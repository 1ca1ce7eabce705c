"""The interface between the generation loop and whatever runs the graphs.

It knows ids, masks and logits. It knows no text, no tokenizer, no file and no sampling.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

# Opaque: made by a backend and read by the same backend only (a tensor on its device, a cache).
Hidden = Any
DecoderState = Any


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the decoder is conditioned on: the projector's outputs for a batch of prompts.

    Args:
        tensors: the projector graph's outputs by their contract names, in the backend's own tensor type.
        attention_mask: [batch, prompt], 1 on tokens and 0 on the padding to their right.
    """

    tensors: Mapping[str, Any]
    attention_mask: Ids


@dataclass(frozen=True, eq=False)
class Encoding:
    """Encoder and projector results for a batch of prompts. Reusable: decoding from it leaves it as it was.

    Args:
        conditioning: what the decoder reads.
        input_ids: [batch, prompt] prompt ids, padded on the right.
        prompt_tokens: tokens the LLM read, per row.
        dropped_tokens: tokens cut from over-long prompts, per row.
        timings_ms: what the batch took: `tokenize`, `encode`, `project`.
    """

    conditioning: Conditioning
    input_ids: Ids
    prompt_tokens: tuple[int, ...]
    dropped_tokens: tuple[int, ...]
    timings_ms: Mapping[str, float]

    @property
    def attention_mask(self) -> Ids:
        """[batch, prompt], 1 on tokens and 0 on the padding to their right."""
        return self.conditioning.attention_mask

    def __len__(self) -> int:
        return len(self.prompt_tokens)


class Backend(Protocol):
    """Runs the three graphs. The loop never asks which backend it has."""

    @property
    def device(self) -> str:
        """The device really in use, as it would be asked for: `cpu`, `cuda:0`."""
        ...

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """The LLM's hidden states for ids and mask [batch, prompt], padded on the right."""
        ...

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """What conditions the decoder, from hidden states and the ids and mask [batch, prompt] they came from."""
        ...

    def prefill(self, conditioning: Conditioning) -> tuple[DecoderState, Logits]:
        """The first decoder call, on an empty cache: its state, and logits [batch, vocab] for the first new token."""
        ...

    def step(self, state: DecoderState, input_ids: Ids) -> Logits:
        """One decoder call on ids [batch, new], which grows `state`: logits [batch, vocab] of the last position."""
        ...

    def close(self) -> None:
        """Release the graphs. The backend cannot be used afterwards."""
        ...
