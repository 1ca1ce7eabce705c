"""A graph's constants."""

import onnx_ir as ir

from llm2slm_export.arrays import Array


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a tensor to a graph as an initializer of its name, type and shape."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """The initializer of a name; a new one for the array if there is none."""
    return graph.initializers.get(name) or add_initializer(graph, ir.tensor(array, name=name))
