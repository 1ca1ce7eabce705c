"""Encoder and projector on OpenVINO, from the bundle's ONNX files. Another backend runs the decoder.

OpenVINO 2026.4 cannot run decoders: it lacks TensorScatter, the operator that updates the KV cache in place.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm2slm_export.arrays import Array
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
    Backend,
    Conditioning,
    Hidden,
    Ids,
    context_mask,
    hidden_array,
    hidden_tensor,
)
from llm2slm_export.inference.runtime.delegating_backend import DelegatingBackend
from llm2slm_export.inference.runtime.forks import HomeProcess

# Block sizes of bundles of earlier versions, whose manifest has none.
_GROUPS: dict[Precision, int] = {"int8": 128, "int4": 32, "w8a8": 128}


class OpenVinoGraph:
    """A graph on OpenVINO, with NumPy arrays as inputs and outputs. Threads may call it concurrently.

    Args:
        threads: threads per operator, at most one per core; None: OpenVINO's choice.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        BundleError: OpenVINO cannot load the graph.
        UsageError: `threads` is below 1.
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
        # Idle requests are reused: each one allocates memory for all intermediate tensors
        # (docs/notebook/encoder-runtimes.md).
        self._idle: list[Any] = []
        self._inputs = {port.any_name for port in self._compiled.inputs}
        self._outputs = [port.any_name for port in self._compiled.outputs]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph. Returns its outputs by name; feeds that are no inputs of the graph are ignored.

        Raises:
            UsageError: this process was forked from the one that loaded the graph.
            BundleError: OpenVINO fails on the graph.
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
        # Copies, because the request's next call overwrites its outputs.
        outputs = {name: found[name].copy() for name in self._outputs}
        self._idle.append(request)
        return outputs


def _computed(entry: GraphEntry) -> dict[str, Any]:
    """The precision hints of a graph. By default OpenVINO computes fp32 graphs in bf16 if the processor supports it."""
    if entry.precision not in _GROUPS:
        return {"INFERENCE_PRECISION_HINT": "bf16" if entry.precision == "bf16" else "f32"}
    # Matrix products with int8 and int4 weights (docs/notebook/encoder-runtimes.md). On processors with bf16 matrix units
    # (AMX), bf16 took two thirds of the time from 256 tokens on (1.4 times as long with 16), and is more exact. w8a8 already
    # multiplies int8.
    if entry.precision != "w8a8" and "amx_bf16" in instruction_sets():
        return {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    # On other processors activations are quantized to int8 in groups, like in ONNX Runtime's MatMulNBits. bf16 took longer,
    # and groups larger than the weights' blocks three times as long.
    groups = entry.block_size or _GROUPS[entry.precision]
    return {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": groups}


def _openvino() -> Any:
    """Import OpenVINO without its telemetry, which would send an event: the import works without that package."""
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
    return openvino


class OpenVinoBackend(DelegatingBackend):
    """The `Backend` with the encoder, the projector or both on OpenVINO.

    Args:
        bundle: an opened bundle.
        threads: as `OpenVinoGraph`.
        graphs: the graphs to open on OpenVINO.
        rest: a CPU backend that has opened the other graphs.
        encoder: an open encoder to share; None: the bundle's is opened, if it is one of `graphs`.
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
        super().__init__(rest)
        self._manifest, self._threads = bundle.manifest, threads
        self._open = {
            name: encoder if name == "encoder" and encoder else OpenVinoGraph(bundle, name, threads=threads)
            for name in graphs
        }

    @property
    def runtimes(self) -> dict[GraphName, Runtime]:
        """The runtime of each open graph."""
        return {**self.inner.runtimes, **dict.fromkeys(self._open, "openvino")}

    @property
    def precisions(self) -> dict[GraphName, Precision | EnginePrecision]:
        """The precision of each open graph, from the manifest."""
        return {**self.inner.precisions, **{name: self._manifest.graphs[name].precision for name in self._open}}

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size] for ids and mask [batch, prompt]."""
        if "encoder" not in self._open:
            return super().encode(input_ids, attention_mask)
        states = self._open["encoder"]({INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask})[HIDDEN_STATES]
        return hidden_tensor(self.inner, states)

    def project(self, hidden: Hidden, input_ids: Ids, attention_mask: Ids) -> Conditioning:
        """The projector's outputs for hidden states [batch, prompt, encoder_hidden_size], ids and mask [batch, prompt]."""
        if "projector" not in self._open:
            return super().project(hidden, input_ids, attention_mask)
        feeds = {HIDDEN_STATES: hidden_array(self.inner, hidden), INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask}
        return self.conditioning(self._open["projector"](feeds), context_mask(self._manifest.shape, attention_mask))

    def head(self, bundle: Bundle) -> "OpenVinoBackend":
        """A backend for another head of the bundle, sharing the encoder."""
        return OpenVinoBackend(
            bundle, threads=self._threads, graphs=tuple(self._open), rest=self.inner.head(bundle),
            encoder=self._open.get("encoder"),
        )  # fmt: skip

    def close(self) -> None:
        """Release the graphs. In a forked child they are kept, but cannot be used."""
        self._open.clear()
        super().close()
