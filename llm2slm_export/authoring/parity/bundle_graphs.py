"""A bundle's graphs as the parity check runs them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.exporters.quantization.half_precision import emulate_half
from llm2slm_export.authoring.parity.teacher_forcing import Feed
from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.contract import GraphName, PairShape, Precision
from llm2slm_export.inference.runtime.openvino import OpenVinoGraph
from llm2slm_export.inference.runtime.selection import chosen_runtimes

Run = Callable[[Feed], dict[str, Array]]


class BundleGraphs:
    """The graphs of one bundle.

    Args:
        bundle: the graphs' files and manifest.
        runtime: the graphs' runtime (`inference.runtime.selection.parse_runtime`).
        engines: the graphs are those of engines, which multiply in float16 at every precision but fp32.
    """

    def __init__(self, bundle: Bundle, runtime: str, *, engines: bool = False) -> None:
        self.bundle, self.runtime, self.engines = bundle, runtime, engines
        self.runtimes = chosen_runtimes(bundle, runtime)
        self.manifest = bundle.manifest
        self.shape: PairShape = bundle.manifest.shape
        self.precision = {name: graph.precision for name, graph in self.manifest.graphs.items()}
        self.float32 = all(precision == "fp32" for precision in self.precision.values())

    @property
    def slm_size(self) -> int:
        """The number of ids that the SLM's tokenizer can decode."""
        return self.manifest.tokenizer.slm_size

    def open(self, name: GraphName) -> Run:
        """A graph as a function from inputs to float32 outputs, by name; the session lives as long as the function."""
        if self.runtimes[name] == "openvino":
            return OpenVinoGraph(self.bundle, name, threads=None)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.precision[name] == "fp32":
            # Without prepacking, weights stay in the mapped file: slower, at half the memory. At a reduced precision,
            # prepacking stays on, because the kernels of `run` need it.
            options.add_session_config_entry("session.disable_prepacking", "1")
        # For engines' graphs: ONNX Runtime would quantize activations to int8 before products with dequantized weights.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        path = self.bundle.path(self.manifest.graphs[name].file)
        graph: Path | bytes = path
        if self.precision[name] == "fp16" or (self.engines and self.precision[name] != "fp32"):
            graph = _with_emulated_half(path)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return partial(_run, onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]))

    def compared_at(self, name: GraphName) -> Precision:
        """The precision whose tolerance a graph's outputs have.

        A float16 decoder requires float16 outputs of the other graphs at any precision.
        """
        precision = self.precision[name]
        half = any(tensor.dtype == "float16" for tensor in self.manifest.graphs[name].outputs)
        return "fp16" if precision == "fp32" and half else precision


def _with_emulated_half(path: Path) -> bytes:
    """A float16 graph with its roundings emulated, because the CPU would skip them: see `emulate_half`."""
    model = ir.load(path)
    emulate_half(model)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _run(session: Any, feed: Feed) -> dict[str, Array]:
    """Outputs by name, in float32; inputs that the graph does not have are dropped from the feed."""
    wanted = {i.name for i in session.get_inputs()}
    arrays = {name: np.ascontiguousarray(value) for name, value in feed.items() if name in wanted}
    outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, arrays), strict=True))
    return {name: value.astype(np.float32, copy=False) for name, value in outputs.items()}
