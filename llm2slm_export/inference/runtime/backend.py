"""The protocol between the decode loop and the backend that runs the graphs: ids, masks and logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import EngineLimits
from llm2slm_export.contract import HIDDEN_STATES, EnginePrecision, GraphName, PairShape, Precision, Runtime

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

# Opaque: created and read by the same backend (a tensor on its device, a KV cache).
Hidden = Any
DecoderState = Any


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The conditioning of the decoder: the projector's outputs for a batch of prompts.

    Args:
        tensors: the projector graph's outputs by their contract names, in the backend's own tensor type.
        attention_mask: [batch, context] as in `context_mask`.
    """

    tensors: Mapping[str, Any]
    attention_mask: Ids


def context_mask(shape: PairShape, attention_mask: Ids) -> Ids:
    """The mask [batch, context] of the decoder's context, from the prompts' mask [batch, prompt].

    The padding is on the right.
    """
    context = attention_mask.shape[1] * shape.context_per_token
    real = attention_mask.sum(axis=1, keepdims=True) * shape.context_per_token  # [batch, 1]
    seen: Ids = (np.arange(context) < real).astype(np.int64)
    return seen


def rewound(lengths: Ids, wanted: Ids) -> Ids:
    """The lengths [rows] of rows that are set back.

    Raises:
        ValueError: a row is shorter than wanted.
    """
    wanted = np.array(wanted, np.int64)
    if wanted.shape != lengths.shape or (wanted > lengths).any() or (wanted < 0).any():
        raise ValueError(f"rows of lengths {lengths.tolist()} cannot be set back to {wanted.tolist()}")
    return wanted


class Backend(Protocol):
    """Runs the three graphs of a bundle's head."""

    @property
    def device(self) -> str:
        """The device in use, by its name in `load`: `cpu`, `cuda:0`, `tensorrt:0`."""
        ...

    @property
    def limits(self) -> EngineLimits | None:
        """The largest request that the graphs accept; None: unlimited."""
        ...

    @property
    def runtimes(self) -> Mapping[GraphName, Runtime]:
        """The runtime of each open graph."""
        ...

    @property
    def precisions(self) -> Mapping[GraphName, Precision | EnginePrecision]:
        """The precision of each open graph. An engine's may differ from that of the bundle's ONNX graph."""
        ...

    @property
    def threads(self) -> int | None:
        """The CPU threads per operator in use; None: the runtime's choice, or no graph runs on the CPU."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """Requested settings that are not in effect, with the reason, one sentence each."""
        ...

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """The LLM's hidden states [batch, prompt, encoder_hidden_size] for ids and mask [batch, prompt], padded on the right."""
        ...

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """The decoder's conditioning, from hidden states and their prompts' ids and mask [batch, prompt]."""
        ...

    def arrays(self, conditioning: Conditioning) -> dict[str, Array]:
        """The tensors of a conditioning in host memory, by name."""
        ...

    def conditioning(self, arrays: Mapping[str, Array], attention_mask: Ids) -> Conditioning:
        """The conditioning of tensors in host memory (the inverse of `arrays`) and their mask [batch, context]."""
        ...

    def prefill(self, conditioning: Conditioning) -> tuple[DecoderState, Logits]:
        """The first decoder call, on an empty cache.

        Returns:
            The decoder's state, and logits [batch, vocab_size] of the first new token, valid until the state's next call.
        """
        ...

    def step(self, state: DecoderState, input_ids: Ids) -> Logits:
        """One decoder call on ids [rows, sequence_length]. It extends every row of `state`.

        Returns:
            Logits [rows, sequence_length, vocab_size], valid until the state's next call.
        """
        ...

    def rewind(self, state: DecoderState, lengths: Ids) -> None:
        """Set every row's number of cache positions back to `lengths` [rows]: the positions behind are forgotten.

        Raises:
            ValueError: a row is shorter than its length in `lengths`.
        """
        ...

    def lengths(self, state: DecoderState) -> Ids:
        """Every row's number of occupied cache positions, [rows]."""
        ...

    def step_argmax(self, state: DecoderState, input_ids: Ids) -> tuple[Ids, Logits] | None:
        """A step on ids [batch, 1] that returns only the highest logit of each row.

        Returns:
            The ids [batch] with the highest logit, among those of the SLM's tokenizer, and these logits [batch]. None, without
            a call, if `step` is as fast on this backend.
        """
        ...

    def select(self, state: DecoderState, rows: Ids) -> None:
        """Select rows of `state`, in this order. Rows may repeat; the others are dropped."""
        ...

    def join(self, state: DecoderState, other: DecoderState) -> None:
        """Append the rows of `other`, another state of this backend, behind those of `state`.

        `other` cannot be used afterwards.
        """
        ...

    def head(self, bundle: Bundle) -> "Backend":
        """A backend for another head of the same bundle, sharing the encoder.

        Args:
            bundle: the bundle with that head selected (`Bundle.select`).
        """
        ...

    def close(self) -> None:
        """Release the graphs, except an encoder that another backend shares. The backend is unusable afterwards."""
        ...


def hidden_tensor(backend: Backend, hidden: Array) -> Hidden:
    """Convert hidden states in host memory to a backend's own tensor."""
    return backend.conditioning({HIDDEN_STATES: hidden}, np.zeros((1, 1), np.int64)).tensors[HIDDEN_STATES]


def hidden_array(backend: Backend, hidden: Hidden) -> Array:
    """Copy a backend's hidden states to host memory."""
    return backend.arrays(Conditioning({HIDDEN_STATES: hidden}, np.zeros((1, 1), np.int64)))[HIDDEN_STATES]
