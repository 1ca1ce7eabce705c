"""The base of backends that run some calls themselves and leave the others to another backend."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import EngineLimits
from llm2slm_export.contract import EnginePrecision, GraphName, Precision, Runtime
from llm2slm_export.inference.runtime.backend import Backend, Conditioning, DecoderState, Hidden, Ids, Logits


class DelegatingBackend(ABC):
    """A `Backend` that forwards every call to another one. Subclasses override those that differ, and `head`.

    Args:
        inner: the backend that runs the calls.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    @property
    def device(self) -> str:
        """The device in use."""
        return self.inner.device

    @property
    def limits(self) -> EngineLimits | None:
        """The largest request that the graphs accept; None: unlimited."""
        return self.inner.limits

    @property
    def runtimes(self) -> Mapping[GraphName, Runtime]:
        """The runtime of each open graph."""
        return self.inner.runtimes

    @property
    def precisions(self) -> Mapping[GraphName, Precision | EnginePrecision]:
        """The precision of each open graph."""
        return self.inner.precisions

    @property
    def threads(self) -> int | None:
        """The CPU threads per operator in use."""
        return self.inner.threads

    @property
    def warnings(self) -> tuple[str, ...]:
        """Requested settings that are not in effect."""
        return self.inner.warnings

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size] for ids and mask [batch, prompt]."""
        return self.inner.encode(input_ids, attention_mask)

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """The projector's outputs for hidden states [batch, prompt, encoder_hidden_size], ids and mask [batch, prompt]."""
        return self.inner.project(hidden, input_ids, attention_mask)

    def arrays(self, conditioning: Conditioning) -> dict[str, Array]:
        """The tensors of a conditioning in host memory, by name."""
        return self.inner.arrays(conditioning)

    def conditioning(self, arrays: Mapping[str, Array], attention_mask: Ids) -> Conditioning:
        """The conditioning of tensors in host memory and their mask [batch, context]."""
        return self.inner.conditioning(arrays, attention_mask)

    def prefill(self, conditioning: Conditioning) -> tuple[DecoderState, Logits]:
        """The first decoder call."""
        return self.inner.prefill(conditioning)

    def step(self, state: DecoderState, input_ids: Ids) -> Logits:
        """One decoder call on ids [rows, sequence_length]: logits [rows, sequence_length, vocab_size]."""
        return self.inner.step(state, input_ids)

    def rewind(self, state: DecoderState, lengths: Ids) -> None:
        """Set every row's number of cache positions back to `lengths` [rows]."""
        self.inner.rewind(state, lengths)

    def lengths(self, state: DecoderState) -> Ids:
        """Every row's number of occupied cache positions, [rows]."""
        return self.inner.lengths(state)

    def step_argmax(self, state: DecoderState, input_ids: Ids) -> tuple[Ids, Logits] | None:
        """A step that returns only the highest logit of each row, as in `Backend`."""
        return self.inner.step_argmax(state, input_ids)

    def select(self, state: DecoderState, rows: Ids) -> None:
        """Select rows of the state."""
        self.inner.select(state, rows)

    def join(self, state: DecoderState, other: DecoderState) -> None:
        """Append the rows of `other` behind those of `state`."""
        self.inner.join(state, other)

    @abstractmethod
    def head(self, bundle: Bundle) -> Backend:
        """A backend for another head of the bundle. Not forwarded: the result would be the inner backend's alone."""

    def close(self) -> None:
        """Close the inner backend."""
        self.inner.close()
