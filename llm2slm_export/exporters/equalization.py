"""Columns that are alike, before weights and inputs are rounded: SmoothQuant (Xiao et al., arXiv 2211.10438), free of cost.

A trained T5's norms give some columns a hundred times what they give others. Rounded together, in blocks, the small ones
are lost. What a norm's weight is divided by, the weights of the linear layers that read it are multiplied with: the graph
computes the same, of columns that are closer together.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llm2slm_export.exporters.linear import Linear, linear_of

Array = npt.NDArray[Any]

# The norms, and where among their inputs weight and bias are.
_NORMS = {
    "RMSNormalization": slice(1, 2), "LayerNormalization": slice(1, 3),
    "SkipSimplifiedLayerNormalization": slice(2, 3), "SkipLayerNormalization": slice(2, 4),
}  # fmt: skip


def equalize(model: ir.Model, moments: Mapping[str, Array]) -> dict[str, Array]:
    """Even out the columns between every norm and the linear layers that read it, in place.

    Args:
        moments: of what the layers are given, by value name (`calibration.second_moments`).

    Returns:
        the moments of what they are given now.
    """
    evened = dict(moments)
    for node in list(model.graph):
        readers = _readers(node) if node.op_type in _NORMS else []
        name = str(readers[0].input.name) if readers else ""
        if name in moments:
            factors = _factors(readers, moments[name])
            _even_out(model, node, readers, factors)
            evened[name] = moments[name] / np.outer(factors, factors)
    return evened


def _readers(norm: ir.Node) -> list[Linear]:
    """The linear layers that read a norm's output, or its product with a number, where nothing else does."""
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


def _factors(readers: list[Linear], moments: Array) -> Array:
    """[columns] what the layers' weights are multiplied with.

    The root of inputs over weights: what is rounded, both of them, is then spread as evenly over the columns.
    """
    given = np.sqrt(np.diag(moments))
    weights = np.max([np.abs(_array(linear.weight)).max(axis=0 if linear.rows else 1) for linear in readers], axis=0)
    known = (given > 0) & (weights > 0)
    factors = np.ones(len(given))
    if known.any():
        factors[known] = np.sqrt(given[known] / weights[known])
        factors[known] /= np.exp(np.log(factors[known]).mean())
    return factors.astype(np.float32)


def _even_out(model: ir.Model, norm: ir.Node, readers: list[Linear], factors: Array) -> None:
    """Divide what a norm gives by `factors` [columns], and multiply the weights that read it."""
    for linear in readers:
        _multiply(linear.weight, factors if linear.rows else factors[:, None])
    where = _NORMS[norm.op_type]
    for index, old in enumerate(norm.inputs[where], start=where.start):
        if old is not None:
            # Layers may share a norm's weight where theirs are alike: each gets its own.
            norm.replace_input_with(index, _divided(model, old, factors, f"{norm.outputs[0].name}_{index}"))


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _multiply(weight: ir.Value, factors: Array) -> None:
    """Multiply an initializer, once its values are asked for."""
    source = weight.const_value
    assert source is not None
    weight.const_value = ir.LazyTensor(
        lambda: ir.tensor(source.numpy() * factors), dtype=source.dtype, shape=ir.Shape(source.shape.numpy()),
        name=weight.name,
    )  # fmt: skip


def _divided(model: ir.Model, value: ir.Value, factors: Array, name: str) -> ir.Value:
    tensor = ir.tensor((_array(value) / factors).astype(np.float32), name=name)
    divided = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(divided)
    return divided
