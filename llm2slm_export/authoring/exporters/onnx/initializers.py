"""A graph's constants."""

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A new value of a tensor's name, type and shape that is the tensor."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The value of an array by its name: the one that is there, or a new one."""
    return graph.initializers.get(name) or add_initializer(graph, ir.tensor(array, name=name))
