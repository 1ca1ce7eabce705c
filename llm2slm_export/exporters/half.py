"""Weights stored as bfloat16: half the bytes, and eight bits of every value.

The graph widens them to float32 before it multiplies. ONNX Runtime does that once, when it loads the graph, and computes
in float32; OpenVINO computes in bfloat16 where the processor can.
"""

from collections.abc import Callable, Iterable

import ml_dtypes
import onnx_ir as ir

from llm2slm_export.exporters.quantize import MINIMUM_WEIGHTS


def store_bfloat16(model: ir.Model) -> None:
    """Store every large weight matrix and table of a model as bfloat16, in place; small ones cost nothing and matter.

    What is looked up is widened after the lookup, row by row.
    """
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if (
            tensor is None
            or tensor.dtype != ir.DataType.FLOAT
            or len(tensor.shape) < 2
            or tensor.size < MINIMUM_WEIGHTS
        ):
            continue
        uses = list(value.uses())
        value.const_value = ir.LazyTensor(
            lambda tensor=tensor: ir.tensor(tensor.numpy().astype(ml_dtypes.bfloat16)),  # type: ignore[misc]
            dtype=ir.DataType.BFLOAT16, shape=ir.Shape(tensor.shape.numpy()), name=value.name,
        )  # fmt: skip
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
        lookups = [node for node, index in uses if node.op_type == "Gather" and index == 0]
        for node in lookups:
            rows = node.outputs[0]
            rows.type = None
            _widen(rows, list(rows.uses()), lambda cast, node=node: model.graph.insert_after(node, cast))  # type: ignore[misc]
        if others := [(node, index) for node, index in uses if node not in lookups]:
            _widen(value, others, lambda cast: model.graph.insert_before(model.graph[0], cast))


def _widen(value: ir.Value, uses: Iterable[tuple[ir.Node, int]], insert: Callable[[ir.Node], object]) -> None:
    """Have the uses of a value read it as float32."""
    cast = ir.node("Cast", inputs=[value], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{value.name}_float32"
    insert(cast)
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])
