"""The interface between the generation loop and whatever runs the graphs.

It knows ids, masks and logits. It knows no text, no tokenizer, no file and no sampling.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import EngineLimits
from llm2slm_export.contract import HIDDEN_STATES, EnginePrecision, GraphName, PairShape, Precision, Runtime

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

# Opaque: made by a backend and read by the same backend only (a tensor on its device, a cache).
Hidden = Any
DecoderState = Any


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the decoder is conditioned on: the projector's outputs for a batch of prompts.

    Args:
        tensors: the projector graph's outputs by their contract names, in the backend's own tensor type.
        attention_mask: [batch, context] as the decoder takes it; see `context_mask`.
    """

    tensors: Mapping[str, Any]
    attention_mask: Ids


def context_mask(shape: PairShape, attention_mask: Ids) -> Ids:
    """Which positions [batch, context] condition the decoder, for prompts with the mask [batch, prompt].

    An encoder-decoder SLM has the padding on the right, a decoder-only SLM, which goes on from them, on the left.
    """
    context = attention_mask.shape[1] * shape.context_per_token
    real = attention_mask.sum(axis=1, keepdims=True) * shape.context_per_token  # [batch, 1]
    positions = np.arange(context)
    seen: Array = positions < real if shape.slm_kind == "encoder-decoder" else positions >= context - real
    return seen.astype(np.int64)


class Backend(Protocol):
    """Runs the three graphs. The loop never asks which backend it has."""

    @property
    def device(self) -> str:
        """The device really in use, as it would be asked for: `cpu`, `cuda:0`, `tensorrt:0`."""
        ...

    @property
    def limits(self) -> EngineLimits | None:
        """The largest request that the graphs take; None: they take any."""
        ...

    @property
    def runtimes(self) -> Mapping[GraphName, Runtime]:
        """What runs each of the graphs that are open."""
        ...

    @property
    def precisions(self) -> Mapping[GraphName, Precision | EnginePrecision]:
        """What each of the graphs that are open was built at: an engine at another precision than the bundle's ONNX graph."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was asked for and is not in use, and why, a sentence each: CUDA graphs where a step cannot be captured."""
        ...

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """The LLM's hidden states for ids and mask [batch, prompt], padded on the right."""
        ...

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """What conditions the decoder, from hidden states and the ids and mask [batch, prompt] they came from."""
        ...

    def arrays(self, conditioning: Conditioning) -> dict[str, Array]:
        """The tensors of `conditioning` in host memory, by name."""
        ...

    def conditioning(self, arrays: Mapping[str, Array], attention_mask: Ids) -> Conditioning:
        """The other way round: what `arrays` gave, and the mask [batch, context] that belongs to it."""
        ...

    def prefill(self, conditioning: Conditioning) -> tuple[DecoderState, Logits]:
        """The first decoder call, on an empty cache: its state, and logits [batch, vocab] for the first new token.

        The logits are the caller's until the state's next call.
        """
        ...

    def step(self, state: DecoderState, input_ids: Ids) -> Logits:
        """One decoder call on ids [batch, sequence_length], which grows `state`: logits [batch, vocab] of the last position, the
        caller's until the next call."""
        ...

    def step_argmax(self, state: DecoderState, input_ids: Ids) -> tuple[Ids, Logits] | None:
        """`step` on ids [batch, 1], of which no more is asked than the highest logit: [batch] its id, of those that the
        tokenizer can produce, and [batch] itself. None, and nothing done, where logits cost this backend no more."""
        ...

    def select(self, state: DecoderState, rows: Ids) -> None:
        """Go on with these rows of `state`, in this order; rows may repeat, and those left out are gone."""
        ...

    def head(self, bundle: Bundle) -> "Backend":
        """A backend for another head of the same bundle, which shares this one's encoder.

        Args:
            bundle: the bundle as that head (`Bundle.select`).
        """
        ...

    def close(self) -> None:
        """Release the graphs, but for an encoder that another backend shares. The backend cannot be used afterwards."""
        ...


def hidden_tensor(backend: Backend, hidden: Array) -> Hidden:
    """Hidden states from host memory, as a backend's own tensor."""
    return backend.conditioning({HIDDEN_STATES: hidden}, np.zeros((1, 1), np.int64)).tensors[HIDDEN_STATES]


def hidden_array(backend: Backend, hidden: Hidden) -> Array:
    """The other way round."""
    return backend.arrays(Conditioning({HIDDEN_STATES: hidden}, np.zeros((1, 1), np.int64)))[HIDDEN_STATES]
