"""A bundle's encoder and projector on OpenVINO, which reads the same ONNX files; the decoder on another backend.

Decoders are not for OpenVINO 2026.4: it has no TensorScatter, the operator that writes the cache in place.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import GraphEntry
from llm2slm_export.contract import (
    ATTENTION_MASK,
    HIDDEN_STATES,
    INPUT_IDS,
    EnginePrecision,
    GraphName,
    Precision,
    Runtime,
)
from llm2slm_export.environment.cores import usable_threads
from llm2slm_export.environment.hardware import instruction_sets
from llm2slm_export.errors import BundleError, require_extra
from llm2slm_export.inference.runtime.backend import (
    Array,
    Backend,
    Conditioning,
    DecoderState,
    Hidden,
    Ids,
    Logits,
    context_mask,
    hidden_array,
    hidden_tensor,
)
from llm2slm_export.inference.runtime.forks import HomeProcess

# Weights that share a scale where the manifest does not say how many: earlier versions' bundles.
_GROUPS: dict[Precision, int] = {"int8": 128, "int4": 32, "w8a8": 128}


class OpenVinoGraph:
    """One graph on OpenVINO: arrays in, arrays out. Threads may call it at the same time.

    Args:
        threads: inside one operator, at most one per core; None leaves the choice to OpenVINO.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        BundleError: a graph that this OpenVINO cannot load.
        UsageError: fewer threads than one.
    """

    def __init__(self, bundle: Bundle, name: GraphName, *, threads: int | None) -> None:
        require_extra("openvino", "openvino", purpose="The runtime 'openvino'")
        openvino = _openvino()
        entry = bundle.manifest.graphs[name]
        path, self._file = bundle.path(entry.file), entry.file
        settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, **_computed(entry)}
        if (used := usable_threads(threads)) is not None:
            settings["INFERENCE_NUM_THREADS"] = used
        self._home = HomeProcess(self)
        try:
            self._compiled = openvino.Core().compile_model(path, "CPU", settings)
        except RuntimeError as error:
            raise BundleError(
                f"OpenVINO cannot load {entry.file}.", f"file: {path}", f"openvino {openvino.__version__}: {error}",
                remedy="run `llm2slm-export verify` on the bundle, or use the runtime 'onnxruntime'",
            ) from error  # fmt: skip
        # Requests that nobody waits for: a new one takes memory for everything that is computed (docs/performance.md).
        self._idle: list[Any] = []
        self._inputs = {port.any_name for port in self._compiled.inputs}
        self._outputs = [port.any_name for port in self._compiled.outputs]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name; what the graph does not take is left out of the feeds.

        Raises:
            UsageError: this process was forked from the one that loaded the graph.
        """
        self._home.require()
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items() if name in self._inputs}
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            found = request.infer(arrays, share_inputs=True)
        except RuntimeError as error:
            raise BundleError(
                f"OpenVINO cannot run {self._file}.",
                *(f"{name}: {list(array.shape)}" for name, array in arrays.items()), " ".join(str(error).split())[:500],
                remedy="run `llm2slm-export verify` on the bundle, or use the runtime 'onnxruntime'",
            ) from error  # fmt: skip
        # Copies: what is found lies in the request, and the next call writes there.
        outputs = {name: found[name].copy() for name in self._outputs}
        self._idle.append(request)
        return outputs


def _computed(entry: GraphEntry) -> dict[str, Any]:
    """What products are computed in. Left to itself OpenVINO computes fp32 graphs in bf16 where the processor can."""
    if entry.precision not in _GROUPS:
        return {"INFERENCE_PRECISION_HINT": "bf16" if entry.precision == "bf16" else "f32"}
    # What multiplies weights of eight and four bits (docs/performance.md). Where the processor multiplies matrices in bf16
    # (AMX), that took two thirds of the time from 256 tokens on (of 16, 1.4 times), and is more exact. At w8a8 the products are int8's already.
    if entry.precision != "w8a8" and "amx_bf16" in instruction_sets():
        return {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    # Elsewhere activations are rounded to int8 in groups, as MatMulNBits does it in ONNX Runtime: in bf16 they took longer,
    # and in groups larger than the weights' three times as long.
    groups = entry.block_size or _GROUPS[entry.precision]
    return {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": groups}


def _openvino() -> Any:
    """The module, without its telemetry: importing it would send an event, but does without where that package is not."""
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
    return openvino


class OpenVinoBackend:
    """Encoder and projector, or one of them, on OpenVINO behind the `Backend` protocol.

    Args:
        bundle: an opened bundle.
        graphs: those to open on OpenVINO.
        rest: a backend for the CPU that has opened the others.
        encoder: an encoder that is open already; None opens the bundle's, where it is among `graphs`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None,
        graphs: Sequence[GraphName],
        rest: Backend,
        encoder: OpenVinoGraph | None = None,
    ) -> None:
        self._manifest, self._threads, self._rest = bundle.manifest, threads, rest
        self._open = {
            name: encoder if name == "encoder" and encoder else OpenVinoGraph(bundle, name, threads=threads)
            for name in graphs
        }

    @property
    def device(self) -> str:
        """The device really in use."""
        return self._rest.device

    @property
    def limits(self) -> None:
        """None: the graphs take requests of any size."""
        return None

    @property
    def runtimes(self) -> dict[GraphName, Runtime]:
        """What runs each of the graphs that are open."""
        return {**self._rest.runtimes, **dict.fromkeys(self._open, "openvino")}

    @property
    def precisions(self) -> dict[GraphName, Precision | EnginePrecision]:
        """The manifest's, of every graph that is open."""
        return {**self._rest.precisions, **{name: self._manifest.graphs[name].precision for name in self._open}}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was asked for and is not in use."""
        return self._rest.warnings

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size] for ids and mask [batch, prompt]."""
        if "encoder" not in self._open:
            return self._rest.encode(input_ids, attention_mask)
        states = self._open["encoder"]({INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask})[HIDDEN_STATES]
        return hidden_tensor(self._rest, states)

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """The projector's outputs for hidden states [batch, prompt, encoder_hidden_size], ids and mask [batch, prompt]."""
        if "projector" not in self._open:
            return self._rest.project(hidden, input_ids, attention_mask)
        feeds = {HIDDEN_STATES: hidden_array(self._rest, hidden), INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask}
        return self.conditioning(self._open["projector"](feeds), context_mask(self._manifest.shape, attention_mask))

    def arrays(self, conditioning: Conditioning) -> dict[str, Array]:
        """The projector's outputs in host memory, by name."""
        return self._rest.arrays(conditioning)

    def conditioning(self, arrays: Mapping[str, Array], attention_mask: Ids) -> Conditioning:
        """The projector's outputs from host memory, with their mask [batch, context]."""
        return self._rest.conditioning(arrays, attention_mask)

    def prefill(self, conditioning: Conditioning) -> tuple[DecoderState, Logits]:
        """The first decoder call."""
        return self._rest.prefill(conditioning)

    def step(self, state: DecoderState, input_ids: Ids) -> Logits:
        """One decoder call on ids [batch, sequence_length]."""
        return self._rest.step(state, input_ids)

    def step_argmax(self, state: DecoderState, input_ids: Ids) -> tuple[Ids, Logits] | None:
        """See `Backend`."""
        return self._rest.step_argmax(state, input_ids)

    def select(self, state: DecoderState, rows: Ids) -> None:
        """Go on with these rows of the state."""
        self._rest.select(state, rows)

    def head(self, bundle: Bundle) -> "OpenVinoBackend":
        """A backend for another head of the bundle, on the same encoder."""
        return OpenVinoBackend(
            bundle, threads=self._threads, graphs=tuple(self._open), rest=self._rest.head(bundle),
            encoder=self._open.get("encoder"),
        )  # fmt: skip

    def close(self) -> None:
        """Release the graphs; in a forked child they stay, and cannot be used."""
        self._open.clear()
        self._rest.close()
