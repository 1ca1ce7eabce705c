"""Controls: the pair with something else than the prompt's hidden states. If they score like the pair, the LLM and the
projector contribute nothing (the list of research on latent conditioning: none, zero, a constant, another prompt's)."""

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
    """A backend whose encoder gives other hidden states than the prompt's; every other graph is the inner backend's."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    @abstractmethod
    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size] that are not those of ids and mask [batch, prompt]."""

    @property
    def device(self) -> str:
        """The device really in use."""
        return self._inner.device

    @property
    def limits(self) -> EngineLimits | None:
        """The largest request that the inner backend takes."""
        return self._inner.limits

    @property
    def runtimes(self) -> Mapping[GraphName, Runtime]:
        """What runs each of the inner backend's graphs."""
        return self._inner.runtimes

    @property
    def precisions(self) -> Mapping[GraphName, Precision | EnginePrecision]:
        """What each of the inner backend's graphs was built at."""
        return self._inner.precisions

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was asked for and is not in use."""
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
        """A control is of one head.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"A control has no other heads (asked for {bundle.manifest.head!r}).", remedy="select the head before"
        )

    def close(self) -> None:
        """Release the inner backend's graphs; where that is the pair's, closing it twice is harmless."""
        self._inner.close()


class Constant(PerturbedBackend):
    """The same vector [encoder_hidden_size] at every position of every prompt. The encoder is not run."""

    def __init__(self, inner: Backend, vector: Array) -> None:
        super().__init__(inner)
        self._vector = vector.astype(np.float32)

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """[batch, prompt, encoder_hidden_size], the vector everywhere."""
        del attention_mask
        return hidden_tensor(self._inner, np.broadcast_to(self._vector, (*input_ids.shape, len(self._vector))))


class Zero(Constant):
    """Hidden states that are zero."""

    def __init__(self, inner: Backend, manifest: Manifest) -> None:
        super().__init__(inner, np.zeros(manifest.shape.encoder_hidden_size))


class Mismatched(PerturbedBackend):
    """Another prompt's hidden states, of a prompt as long as possible as the own one.

    Where lengths differ the other's are cut, or repeated from the start.

    Args:
        prompts: the ids of every prompt there will be.

    Raises:
        UsageError: there are not two different prompts.
    """

    def __init__(self, inner: Backend, manifest: Manifest, prompts: Sequence[tuple[int, ...]]) -> None:
        super().__init__(inner)
        self._pad = manifest.special_ids.prompt_pad
        # Neighbours by length; among equally long ones in no order that their words have.
        order = sorted(set(prompts), key=lambda ids: (len(ids), hashlib.sha256(str(ids).encode()).digest()))
        if len(order) < 2:
            raise UsageError(
                "The mismatched control needs two different prompts.",
                f"different prompts: {len(order)}",
                remedy="give more data, or leave out --controls",
            )
        self._other = dict(zip(order, [*order[1:], order[-2]], strict=True))

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """[batch, prompt, encoder_hidden_size] of the other prompts."""
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
