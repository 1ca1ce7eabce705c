"""Calibration: statistics of the linear layers' inputs on real prompts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.exporters.onnx.linear_layers import linear_of
from llm2slm_export.files.workplace import scratch

Call = tuple[Mapping[str, Array], Mapping[int, Array]]


@dataclass
class ActivationRange:
    """Statistics of a linear layer's inputs: minimum and maximum (0 included), and the sum of squares."""

    lowest: float = 0.0
    highest: float = 0.0
    squares: float = 0.0
    count: int = 0

    @property
    def rms(self) -> float:
        """The root mean square."""
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0


def second_moments(model: ir.Model, calls: Iterable[Call], *, diagonal: bool = False) -> dict[str, Array]:
    """The sum of x xᵀ over the inputs x of every linear layer, by value name: [width, width].

    Args:
        model: the model before quantization; it is not changed.
        calls: for each call of the graph, its inputs by name and masks [batch, length] of real positions by length.
            Inputs whose length has no mask count completely.
        diagonal: return only the diagonals [width], the sums of squares.
    """
    total: dict[str, Array] = {}
    for name, rows in _given(model, calls):
        total[name] = total.get(name, 0) + (np.square(rows).sum(axis=0) if diagonal else rows.T @ rows)
    return total


def input_ranges(model: ir.Model, calls: Iterable[Call]) -> dict[str, ActivationRange]:
    """The input range of every linear layer, by value name. `model`, `calls`: see `second_moments`."""
    ranges: dict[str, ActivationRange] = {}
    for name, rows in _given(model, calls):
        known = ranges.setdefault(name, ActivationRange())
        known.lowest, known.highest = min(known.lowest, float(rows.min())), max(known.highest, float(rows.max()))
        known.squares += float(np.square(rows, dtype=np.float64).sum())
        known.count += rows.size
    return ranges


def _given(model: ir.Model, calls: Iterable[Call]) -> Iterator[tuple[str, Array]]:
    """The inputs of linear layers, call by call: value name, and the real rows [rows, width]."""
    linears = [linear for node in model.graph if (linear := linear_of(node)) is not None]
    names = sorted({str(linear.input.name) for linear in linears})
    with scratch() as directory:
        path = directory / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        proto = onnx.load(path, load_external_data=False)
        given = {value.name for value in (*proto.graph.output, *proto.graph.input)}
        proto.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in names
            if name not in given
        )
        onnx.save(proto, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        fed = {tensor.name for tensor in session.get_inputs()}
        read = [name for name in names if name not in fed]
        for feed, real in calls:
            arrays = {name: np.ascontiguousarray(value) for name, value in feed.items() if name in fed}
            for name, value in zip(read, session.run(read, arrays), strict=True):
                rows = value[real[value.shape[1]]] if value.ndim == 3 and value.shape[1] in real else value
                yield name, rows.reshape(-1, rows.shape[-1])
