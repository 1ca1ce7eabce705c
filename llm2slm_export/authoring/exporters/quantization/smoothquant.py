"""SmoothQuant (Xiao et al., arXiv 2211.10438): equalized columns before quantization, free at run time.

A trained T5's norms scale some columns a hundred times as much as others; the small ones are lost in a block's shared
scale. Smoothing divides a norm's weight by a factor per column, and multiplies the weights of the next linear layers
with it. The graph's results are unchanged. The same applies between a feed-forward layer's up projection, through the
product with its gate or a ReLU, and its down projection.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.exporters.onnx.initializers import add_initializer
from llm2slm_export.authoring.exporters.onnx.linear_layers import Linear, linear_of

# Norm operators, with the positions of weight and bias among their inputs.
_NORMS = {
    "RMSNormalization": slice(1, 2), "LayerNormalization": slice(1, 3),
    "SkipSimplifiedLayerNormalization": slice(2, 3), "SkipLayerNormalization": slice(2, 4),
}  # fmt: skip


def smooth(model: ir.Model, moments: Mapping[str, Array]) -> dict[str, Array]:
    """Smooth the columns between norms, or up projections, and the linear layers after them, in place.

    Args:
        model: the exported graph.
        moments: second moments of the layers' inputs by value name, or their diagonals (`calibration.second_moments`).

    Returns:
        the moments after smoothing.
    """
    smoothed = dict(moments)
    for node in list(model.graph):
        consumers = _consumers(node) if node.op_type in _NORMS else []
        linear_layer = linear_of(node)
        branch = _branch(linear_layer) if linear_layer is not None else None
        if branch is not None and linear_layer is not None:
            consumers = [linear_layer]
        name = str(consumers[0].input.name) if consumers else ""
        if name in moments:
            factors = _factors(consumers, moments[name])
            for linear in consumers:
                _multiply(linear.weight, factors if linear.rows else factors[:, None])
            if branch is not None:
                _divide_branch(*branch, factors)
            else:
                _divide_norm(model, node, factors)
            smoothed[name] = moments[name] / (np.outer(factors, factors) if moments[name].ndim == 2 else factors**2)
    return smoothed


def _consumers(norm: ir.Node) -> list[Linear]:
    """The linear layers after a norm, directly or after a scalar factor; empty if the output has any other use."""
    value = norm.outputs[0]
    if any(part is not None and part.const_value is None for part in norm.inputs[_NORMS[norm.op_type]]):
        return []
    users = [user for user, _ in value.uses()]
    if len(users) == 1 and users[0].op_type == "Mul" and not value.is_graph_output():
        factors = [other for other in users[0].inputs if other is not value]
        if len(factors) == 1 and factors[0] is not None and factors[0].const_value is not None:
            if factors[0].const_value.size != 1:
                return []
            value = users[0].outputs[0]
            users = [user for user, _ in value.uses()]
    linears = [linear_of(user) for user in users]
    own = [linear for linear in linears if linear is not None and linear.is_own and linear.input is value]
    return own if own and len(own) == len(users) and not value.is_graph_output() else []


def _factors(consumers: list[Linear], moments: Array) -> Array:
    """Factors [columns] of the layers' weights: the square root of the ratio of inputs to weights, normalized.

    Both are quantized, and both then have the same spread over the columns.
    """
    given = np.sqrt(np.diag(moments) if moments.ndim == 2 else moments)
    weights = np.max([np.abs(_array(linear.weight)).max(axis=0 if linear.rows else 1) for linear in consumers], axis=0)
    known = (given > 0) & (weights > 0)
    factors = np.ones(len(given))
    if known.any():
        factors[known] = np.sqrt(given[known] / weights[known])
        factors[known] /= np.exp(np.log(factors[known]).mean())
    return factors.astype(np.float32)


def _branch(linear_layer: Linear) -> tuple[Linear, int] | None:
    """The linear layer whose outputs a layer's inputs are proportional to, and the index of the first such output.

    They are connected by a product with a gate or by a ReLU. None if an intermediate value has another use.
    """
    source = linear_layer.input.producer()
    if source is None or not linear_layer.is_own or not _read_once(linear_layer.input):
        return None
    if source.op_type not in ("Mul", "Relu"):
        return None
    for value in source.inputs:
        found = _part(value) if value is not None and _read_once(value) else None
        if found is not None and found[0].is_own:
            return found
    return None


def _part(value: ir.Value) -> tuple[Linear, int] | None:
    """The linear layer that computes a value or the Split's part that it is, and the index of its first output."""
    producer = value.producer()
    if producer is None:
        return None
    if producer.op_type != "Split":
        linear = _linear_giving(producer)
        return (linear, 0) if linear is not None and linear.output is value else None
    whole, widths = producer.inputs[0], producer.inputs[1] if len(producer.inputs) > 1 else None
    axis = producer.attributes.get("axis")
    last = axis is not None and axis.as_int() == -1
    if whole is None or widths is None or widths.const_value is None or not last or not _read_once(whole):
        return None
    source = whole.producer()
    linear = _linear_giving(source) if source is not None else None
    if linear is None or linear.output is not whole:
        return None
    return linear, int(widths.const_value.numpy()[: list(producer.outputs).index(value)].sum())


def _linear_giving(node: ir.Node) -> Linear | None:
    """The linear layer whose last node is `node`."""
    products = [node, *(value.producer() for value in node.inputs if node.op_type == "Add" and value is not None)]
    found = (linear_of(product) for product in products if product is not None)
    return next((linear for linear in found if linear is not None and linear.nodes[0] is node), None)


def _read_once(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _divide_branch(linear: Linear, first: int, factors: Array) -> None:
    """Divide a layer's outputs, from index `first` on, by `factors`."""
    divisors = np.ones(linear.width, np.float32)
    divisors[first : first + len(factors)] /= factors
    _multiply(linear.weight, divisors[:, None] if linear.rows else divisors)
    if linear.bias is not None:
        _multiply(linear.bias, divisors)


def _divide_norm(model: ir.Model, norm: ir.Node, factors: Array) -> None:
    """Divide a norm's output by `factors` [columns]."""
    where = _NORMS[norm.op_type]
    for index, old in enumerate(norm.inputs[where], start=where.start):
        if old is not None:
            # Layers with equal norms may share a weight: each gets its own.
            divided = (_array(old) / factors).astype(np.float32)
            tensor = ir.tensor(divided, name=f"{norm.outputs[0].name}.smoothed_{index}")
            norm.replace_input_with(index, add_initializer(model.graph, tensor))


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _multiply(weight: ir.Value, factors: Array) -> None:
    """Multiply an initializer lazily, when its values are read."""
    source = weight.const_value
    assert source is not None
    weight.const_value = ir.LazyTensor(
        lambda: ir.tensor(source.numpy() * factors), dtype=source.dtype, shape=ir.Shape(source.shape.numpy()),
        name=weight.name,
    )  # fmt: skip
