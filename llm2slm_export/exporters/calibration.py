"""What the linear layers of a graph are given on real prompts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from llm2slm_export.exporters.linear import linear_of

Array = npt.NDArray[Any]


def second_moments(
    model: ir.Model, calls: Iterable[tuple[Mapping[str, Array], Mapping[int, Array]]]
) -> dict[str, Array]:
    """The sum of x xᵀ over the inputs x of every linear layer: value name → [width, width].

    Args:
        model: before its weights are quantised; left as it is.
        calls: of each call of the graph its inputs by name, and which positions are real: masks [batch, length] by
            length. Inputs of a length with no mask count whole.
    """
    linears = [linear for node in model.graph if (linear := linear_of(node)) is not None]
    names = sorted({str(linear.input.name) for linear in linears})
    total: dict[str, Array] = {}
    with TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
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
                rows = rows.reshape(-1, rows.shape[-1])
                total[name] = total.get(name, 0) + rows.T @ rows
    return total
