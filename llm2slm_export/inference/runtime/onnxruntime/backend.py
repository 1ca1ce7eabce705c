"""A bundle's graphs on ONNX Runtime."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.contract import (
    ATTENTION_MASK,
    GRAPHS,
    HIDDEN_STATES,
    INPUT_IDS,
    EnginePrecision,
    GraphName,
    Precision,
    Runtime,
)
from llm2slm_export.errors import EncodingError
from llm2slm_export.inference.runtime.backend import Conditioning, Hidden, Ids, Logits, context_mask
from llm2slm_export.inference.runtime.forks import keep_in_children
from llm2slm_export.inference.runtime.onnxruntime.decoder import OrtDecoder, OrtState
from llm2slm_export.inference.runtime.onnxruntime.device_tensors import HostMemory, Memory
from llm2slm_export.inference.runtime.onnxruntime.devices import find_device
from llm2slm_export.inference.runtime.onnxruntime.sessions import GraphSessions


class Decoder(Protocol):
    """The decoder calls of a `SessionBackend`, as in `Backend`."""

    def prefill(self, conditioning: Conditioning) -> tuple[OrtState, Logits]:
        """The first decoder call."""
        ...

    def step(self, state: OrtState, input_ids: Ids) -> Logits:
        """One decoder call on ids [batch, sequence_length]."""
        ...

    def select(self, state: OrtState, rows: Ids) -> None:
        """Select rows of the state."""
        ...

    def rewind(self, state: OrtState, lengths: Ids) -> None:
        """Set the rows' lengths [rows] back."""
        ...

    def join(self, state: OrtState, other: OrtState) -> None:
        """Append the rows of another state."""
        ...


class SessionBackend:
    """The `Backend` on ONNX Runtime sessions. Its subclasses open them on a device.

    Args:
        sessions: the open graphs.
        memory: the operations on tensors of the sessions' device.
        decoder: the calls of the decoder's session.
    """

    def __init__(self, sessions: GraphSessions, memory: Memory, decoder: Decoder) -> None:
        self.sessions, self.memory, self.decoder = sessions, memory, decoder
        self._manifest = sessions.manifest
        keep_in_children(self)

    @property
    def device(self) -> str:
        """The device in use."""
        return str(self.sessions.device)

    @property
    def threads(self) -> int | None:
        """The CPU threads per operator in use; None: ONNX Runtime's choice."""
        return self.sessions.threads

    @property
    def warnings(self) -> tuple[str, ...]:
        """Requested settings of the sessions that are not in effect."""
        return self.sessions.warnings

    @property
    def runtimes(self) -> dict[GraphName, Runtime]:
        """ONNX Runtime, for each open graph."""
        return dict.fromkeys(self.sessions.names, "onnxruntime")

    @property
    def precisions(self) -> dict[GraphName, Precision | EnginePrecision]:
        """The precision of each open graph, from the manifest."""
        return {name: self._manifest.graphs[name].precision for name in self.sessions.names}

    @property
    def limits(self) -> None:
        """None: the graphs accept requests of any size."""
        return None

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size], an OrtValue, for ids and mask [batch, prompt]."""
        feeds = {INPUT_IDS: self._value(input_ids), ATTENTION_MASK: self._value(attention_mask)}
        return self.sessions.run("encoder", feeds)[HIDDEN_STATES]

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """The projector's outputs for hidden states [batch, prompt, encoder_hidden_size], ids and mask [batch, prompt]."""
        feeds = {HIDDEN_STATES: hidden, ATTENTION_MASK: self._value(attention_mask)}
        if self._manifest.shape.projector_reads_ids:
            feeds[INPUT_IDS] = self._value(input_ids)
        return Conditioning(self.sessions.run("projector", feeds), context_mask(self._manifest.shape, attention_mask))

    def arrays(self, conditioning: Conditioning) -> dict[str, Array]:
        """The projector's outputs in host memory.

        They are [batch, num_key_value_heads, context, head_dim] or (decoder-only) [batch, context, hidden_size].
        """
        self.sessions.require_home()
        # Copies: `numpy` returns a view that does not keep the value's memory alive.
        return {name: value.numpy().copy() for name, value in conditioning.tensors.items()}

    def conditioning(self, arrays: Mapping[str, Array], attention_mask: Ids) -> Conditioning:
        """The conditioning of tensors in host memory, in the decoder's types, and their mask [batch, context].

        Raises:
            EncodingError: values overflow the decoder's type.
        """
        self.sessions.require_home()
        tensors = {name: self._value(self._converted(name, array)) for name, array in arrays.items()}
        return Conditioning(tensors, attention_mask)

    def prefill(self, conditioning: Conditioning) -> tuple[OrtState, Logits]:
        """The first decoder call: the start token (encoder-decoder) or the prompt embeddings (decoder-only)."""
        return self.decoder.prefill(conditioning)

    def step(self, state: OrtState, input_ids: Ids) -> Logits:
        """One decoder call on ids [rows, sequence_length].

        Returns:
            Logits [rows, sequence_length, vocab_size], valid until the state's next call.
        """
        return self.decoder.step(state, input_ids)

    def rewind(self, state: OrtState, lengths: Ids) -> None:
        """Set every row's number of cache positions back to `lengths` [rows].

        Raises:
            ValueError: a row is shorter than its length in `lengths`.
        """
        self.decoder.rewind(state, lengths)

    def lengths(self, state: OrtState) -> Ids:
        """Every row's number of occupied cache positions, [rows]."""
        return state.lengths.copy()

    def step_argmax(self, state: OrtState, input_ids: Ids) -> None:
        """None: logits are in host memory anyway."""

    def select(self, state: OrtState, rows: Ids) -> None:
        """Select rows of the state. Unchanged tensors are not copied: when beams are reordered, only the cache changes."""
        self.decoder.select(state, rows)

    def join(self, state: OrtState, other: OrtState) -> None:
        """Append the rows of `other` behind those of `state`. `other` cannot be used afterwards."""
        self.decoder.join(state, other)

    def close(self) -> None:
        """Release the sessions. In a forked child they are kept, but cannot be used."""
        self.sessions.close()

    def _converted(self, name: str, array: Array) -> Array:
        """A tensor in the type of the decoder's input of this name. TensorRT's conditioning is float32 for every decoder."""
        dtype = next((spec.dtype for spec in self._manifest.graphs["decoder"].inputs if spec.name == name), array.dtype)
        if dtype == "float16" and array.dtype == np.float32 and (np.abs(array) > np.finfo(np.float16).max).any():
            raise EncodingError(
                f"{name} holds values that overflow float16, the decoder's type.",
                f"largest: {np.abs(array).max():.4g}; at most {np.finfo(np.float16).max:.0f}",
                remedy="use a bundle built with --precision bf16 or fp32",
            )
        return array.astype(dtype, copy=False) if dtype in ("float16", "float32") else array

    def _value(self, array: Array) -> Any:
        return self.memory.put(array)


class OrtBackend(SessionBackend):
    """The `Backend` on ONNX Runtime's CPU provider.

    Args:
        bundle: an opened bundle.
        device: the device's name. There is no fallback to another device.
        threads: threads per operator, at most one per core (see `warnings`); None: ONNX Runtime's choice.
        graphs: the graphs to open. Calls that need another one are refused.
        encoder: an open encoder session to share; None: the bundle's is opened.

    Raises:
        UsageError: an invalid device name or number of threads.
        DeviceError: the device is not available.
        BundleError: ONNX Runtime cannot load a graph.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str,
        threads: int | None,
        graphs: Sequence[GraphName] = GRAPHS,
        encoder: Any = None,
    ) -> None:
        sessions = GraphSessions(bundle, find_device(device), threads=threads, graphs=graphs, encoder=encoder)
        memory = HostMemory()
        super().__init__(sessions, memory, OrtDecoder(sessions, memory))

    def head(self, bundle: Bundle) -> "OrtBackend":
        """A backend for another head of the bundle, sharing the encoder. Its session lives until the last backend is closed."""
        return OrtBackend(
            bundle,
            device=self.device,
            threads=self.sessions.requested_threads,
            graphs=self.sessions.graphs,
            encoder=self.sessions.encoder_to_share(),
        )
