"""Linear layers in a graph: MatMul or Gemm with a constant matrix, in either layout, and a bias."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Args:
        nodes: in reverse graph order: the Add of a bias, the product, the Transpose of a weight; Add and Transpose may
            be missing.
        product: the MatMul or Gemm.
        weight: an initializer, [out, in] if `rows`, else [in, out].
        rows: whether the weight has one row per output.
        bias: an initializer [out].
        output: [..., out], after the bias.
    """

    nodes: Sequence[ir.Node]
    product: ir.Node
    weight: ir.Value
    rows: bool
    bias: ir.Value | None
    output: ir.Value

    @property
    def input(self) -> ir.Value:
        """The product's current input [..., in]; a pass may have replaced it."""
        source = self.product.inputs[0]
        assert source is not None
        return source

    @property
    def first_node(self) -> ir.Node:
        """The first node in graph order."""
        return self.nodes[-1]

    @property
    def width(self) -> int:
        """The number of outputs."""
        assert self.weight.shape is not None
        return int(self.weight.shape.numpy()[0 if self.rows else 1])

    @property
    def is_own(self) -> bool:
        """Whether no other node uses the weight or an intermediate value."""
        read_once = [self.weight, *(node.outputs[0] for node in self.nodes[1:])]
        return all(len(list(value.uses())) == 1 and not value.is_graph_output() for value in read_once)


def linear_of(node: ir.Node) -> Linear | None:
    """The linear layer of a product node; None for any other node."""
    if node.op_type == "Gemm":
        return _of_gemm(node)
    if node.op_type != "MatMul":
        return None
    weight = node.inputs[1]
    assert weight is not None
    nodes, rows = [node], False
    transpose = weight.producer()
    if transpose is not None and (transposed := transposed_initializer(transpose)) is not None:
        nodes, weight, rows = [node, transpose], transposed, True
    if not _is_matrix(weight):
        return None
    output, bias = node.outputs[0], None
    users = [user for user, _ in output.uses()]
    if len(users) == 1 and users[0].op_type == "Add" and not output.is_graph_output():
        others = [value for value in users[0].inputs if value is not output]
        if len(others) == 1 and _is_bias(others[0], weight, rows=rows):
            nodes, bias, output = [users[0], *nodes], others[0], users[0].outputs[0]
    return Linear(nodes, node, weight, rows, bias, output)


def _of_gemm(node: ir.Node) -> Linear | None:
    plain = all(
        node.attributes[name].value == value
        for name, value in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
        if name in node.attributes
    )
    weight = node.inputs[1]
    assert weight is not None
    if not plain or not _is_matrix(weight):
        return None
    trans_b = node.attributes.get("transB")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return Linear([node], node, weight, trans_b is not None and trans_b.as_int() == 1, bias, node.outputs[0])


def transposed_initializer(node: ir.Node) -> ir.Value | None:
    """The initializer that the node transposes as a matrix; None for any other node."""
    if node.op_type != "Transpose" or (source := node.inputs[0]) is None or not _is_matrix(source):
        return None
    perm = node.attributes.get("perm")
    return source if perm is None or list(perm.as_ints()) == [1, 0] else None


def _is_matrix(value: ir.Value) -> bool:
    return value.is_initializer() and value.shape is not None and len(value.shape) == 2


def _is_bias(value: ir.Value | None, weight: ir.Value, *, rows: bool) -> bool:
    if value is None or not value.is_initializer() or value.shape is None or weight.shape is None:
        return False
    return list(value.shape.numpy()) == [weight.shape.numpy()[0 if rows else 1]]
