"""Controls: the pair with other hidden states than the prompt's (zero, a constant, another prompt's).

If a control scores like the pair, the LLM and the projector contribute nothing.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import EngineLimits, Manifest
from llm2slm_export.contract import EnginePrecision, GraphName, Precision, Runtime
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.runtime.backend import (
    Array,
    Backend,
    Conditioning,
    DecoderState,
    Hidden,
    Ids,
    Logits,
    hidden_array,
    hidden_tensor,
)


class PerturbedBackend(ABC):
    """A backend whose encoder returns other hidden states than the prompt's; everything else is the inner backend's."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    @abstractmethod
    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size], not those of the ids and mask [batch, prompt]."""

    @property
    def device(self) -> str:
        """The device in use."""
        return self._inner.device

    @property
    def limits(self) -> EngineLimits | None:
        """The inner backend's limits of a request."""
        return self._inner.limits

    @property
    def runtimes(self) -> Mapping[GraphName, Runtime]:
        """The runtime of each graph of the inner backend."""
        return self._inner.runtimes

    @property
    def precisions(self) -> Mapping[GraphName, Precision | EnginePrecision]:
        """The precision of each graph of the inner backend."""
        return self._inner.precisions

    @property
    def warnings(self) -> tuple[str, ...]:
        """Requested features that are not in use."""
        return self._inner.warnings

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """See `Backend`."""
        return self._inner.project(hidden, input_ids, attention_mask)

    def arrays(self, conditioning: Conditioning) -> dict[str, Array]:
        """See `Backend`."""
        return self._inner.arrays(conditioning)

    def conditioning(self, arrays: Mapping[str, Array], attention_mask: Ids) -> Conditioning:
        """See `Backend`."""
        return self._inner.conditioning(arrays, attention_mask)

    def prefill(self, conditioning: Conditioning) -> tuple[DecoderState, Logits]:
        """See `Backend`."""
        return self._inner.prefill(conditioning)

    def step(self, state: DecoderState, input_ids: Ids) -> Logits:
        """See `Backend`."""
        return self._inner.step(state, input_ids)

    def step_argmax(self, state: DecoderState, input_ids: Ids) -> tuple[Ids, Logits] | None:
        """See `Backend`."""
        return self._inner.step_argmax(state, input_ids)

    def select(self, state: DecoderState, rows: Ids) -> None:
        """See `Backend`."""
        self._inner.select(state, rows)

    def head(self, bundle: Bundle) -> Backend:
        """Not supported: a control has one head.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"A control has no other heads (requested: {bundle.manifest.head!r}).", remedy="select the head before"
        )

    def close(self) -> None:
        """Close the inner backend. The pair's may be closed twice."""
        self._inner.close()


class Constant(PerturbedBackend):
    """One vector [encoder_hidden_size] at every position of every prompt. The encoder is not run."""

    def __init__(self, inner: Backend, vector: Array) -> None:
        super().__init__(inner)
        self._vector = vector.astype(np.float32)

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size] of the constant vector."""
        del attention_mask
        return hidden_tensor(self._inner, np.broadcast_to(self._vector, (*input_ids.shape, len(self._vector))))


class Zero(Constant):
    """Hidden states of zeros."""

    def __init__(self, inner: Backend, manifest: Manifest) -> None:
        super().__init__(inner, np.zeros(manifest.shape.encoder_hidden_size))


class Mismatched(PerturbedBackend):
    """Hidden states of another prompt of similar length.

    If lengths differ, the other prompt's states are truncated, or repeated from the start.

    Args:
        inner: runs the graphs.
        manifest: of the pair.
        prompts: the ids of all prompts.

    Raises:
        UsageError: there are fewer than two different prompts.
    """

    def __init__(self, inner: Backend, manifest: Manifest, prompts: Sequence[tuple[int, ...]]) -> None:
        super().__init__(inner)
        self._pad = manifest.special_ids.prompt_pad
        # Neighbors by length; a hash orders prompts of equal length independently of their words.
        order = sorted(set(prompts), key=lambda ids: (len(ids), hashlib.sha256(str(ids).encode()).digest()))
        if len(order) < 2:
            raise UsageError(
                "The mismatched control needs two different prompts.",
                f"different prompts: {len(order)}",
                remedy="give more data, or remove --controls",
            )
        self._other = dict(zip(order, [*order[1:], order[-2]], strict=True))

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size] of the other prompts."""
        own = [tuple(row[real.astype(bool)].tolist()) for row, real in zip(input_ids, attention_mask, strict=True)]
        others = [self._other[row] for row in own]
        longest = max(map(len, others))
        ids = np.full((len(others), longest), self._pad)
        mask = np.zeros((len(others), longest), np.int64)
        for index, row in enumerate(others):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        theirs = hidden_array(self._inner, self._inner.encode(ids, mask))
        hidden = np.zeros((*input_ids.shape, theirs.shape[2]), np.float32)
        for index, (row, other) in enumerate(zip(own, others, strict=True)):
            hidden[index, : len(row)] = theirs[index, np.arange(len(row)) % len(other)]
        return hidden_tensor(self._inner, hidden)
