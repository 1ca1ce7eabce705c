"""Controls: the pair with other hidden states than the prompt's (zero, a constant, another prompt's).

If a control scores like the pair, the LLM and the projector contribute nothing.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.runtime.backend import Backend, Hidden, Ids, hidden_array, hidden_tensor
from llm2slm_export.inference.runtime.delegating_backend import DelegatingBackend


class PerturbedBackend(DelegatingBackend):
    """A backend whose encoder returns other hidden states than the prompt's; everything else is the inner backend's."""

    @abstractmethod
    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size], not those of the ids and mask [batch, prompt]."""

    def head(self, bundle: Bundle) -> Backend:
        """Not supported: a control has one head.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"A control has no other heads (requested: {bundle.manifest.head!r}).", remedy="select the head before"
        )


class Constant(PerturbedBackend):
    """One vector [encoder_hidden_size] at every position of every prompt. The encoder is not run."""

    def __init__(self, inner: Backend, vector: Array) -> None:
        super().__init__(inner)
        self._vector = vector.astype(np.float32)

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size] of the constant vector."""
        del attention_mask
        return hidden_tensor(self.inner, np.broadcast_to(self._vector, (*input_ids.shape, len(self._vector))))


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
        theirs = hidden_array(self.inner, self.inner.encode(ids, mask))
        hidden = np.zeros((*input_ids.shape, theirs.shape[2]), np.float32)
        for index, (row, other) in enumerate(zip(own, others, strict=True)):
            hidden[index, : len(row)] = theirs[index, np.arange(len(row)) % len(other)]
        return hidden_tensor(self.inner, hidden)
