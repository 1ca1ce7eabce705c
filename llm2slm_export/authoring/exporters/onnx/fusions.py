"""Fusion passes: fewer nodes, same results.

A step of a small decoder spends more time on operator overhead than on its weights: ONNX Runtime needs about a
microsecond per node, and every matrix product wakes all threads.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from llm2slm_export.authoring.exporters.onnx.initializers import add_initializer, constant
from llm2slm_export.authoring.exporters.onnx.linear_layers import Linear, linear_of
from llm2slm_export.contract import GraphName, PairShape
from llm2slm_export.errors import CompositionError

DOMAIN = "com.microsoft"
_HEADS_FIRST = [0, 2, 1, 3]
# At most Q, K and V, or gate and up. The cross-attention's projections of all layers share an input too: fused, they
# would be no faster, and their outputs would be copied once more.
_MOST_MERGED = 3
_SKIP_NORMS = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


def fuse(model: ir.Model, name: GraphName, *, contrib: bool = True) -> None:
    """Run all passes, in place.

    Projections are fused in the decoder only: with a prompt's many rows fusion gains nothing, and OpenVINO fuses an
    activation into the preceding product only if no Split is between them. Contrib operators are used in the decoder
    only, because only ONNX Runtime has them.

    Args:
        model: the exported graph.
        name: which of the three graphs.
        contrib: allow contrib operators.
    """
    gemm_to_matmul(model)
    CommonSubexpressionEliminationPass()(model)
    if name == "decoder":
        merge_projections(model)
        split_by_heads(model)
        if contrib:
            skip_norms(model)
            model.opset_imports[DOMAIN] = 1
    RemoveUnusedNodesPass()(model)


def require_fused_attention(model: ir.Model, shape: PairShape, *, softcapped: bool = False) -> None:
    """Check that a decoder's attention is one node per layer.

    Args:
        model: the decoder.
        shape: the pair's sizes.
        softcapped: scores are bounded, which has no fused node: one Softmax per layer is expected.

    Raises:
        CompositionError: another number of nodes.
    """
    per_layer = 2 if shape.slm_kind == "encoder-decoder" else 1
    layers = per_layer * shape.num_hidden_layers
    expected = {"Attention": 0, "Softmax": layers} if softcapped else {"Attention": layers, "Softmax": 0}
    found = {op: sum(node.op_type == op for node in model.graph) for op in expected}
    if found != expected:
        raise CompositionError(
            "The SLM's attention was not exported as one operator per layer.",
            *(f"{op}: expected {expected[op]}, found {found[op]}" for op in expected if found[op] != expected[op]),
            f"transformers {version('transformers')}",
            remedy="use a transformers release that this one was tested with, or report this SLM",
        )


def gemm_to_matmul(model: ir.Model) -> None:
    """Replace Reshape to a matrix → Gemm → Reshape back by MatMul and Add, which accept any rank.

    Attention's output [batch, sequence_length, heads, head_dim] is reshaped to
    [batch, sequence_length, heads · head_dim].
    """
    for gemm in [node for node in model.graph if node.op_type == "Gemm"]:
        before, after = _producer(gemm.inputs[0]), _only_user(gemm.outputs[0])
        linear = linear_of(gemm)
        if linear is None or before is None or after is None or {before.op_type, after.op_type} != {"Reshape"}:
            continue
        rows, out = before.inputs[0], after.outputs[0]
        by_heads = len(_shape(rows)) == 4 and len(_shape(out)) == 3
        if not _same(_shape(rows)[: -2 if by_heads else -1], _shape(out)[:-1]):
            continue
        if by_heads:
            joined = constant(model.graph, "joined_heads", np.array([0, 0, -1], np.int64))
            rows = _insert(model, gemm, "Reshape", [rows, joined], name=f"{gemm.outputs[0].name}_rows",
                           shape=ir.Shape([*_shape(out)[:-1], _shape(before.outputs[0])[-1]]))  # fmt: skip
        weight = linear.weight
        if linear.rows:
            weight = _insert(model, gemm, "Transpose", [weight], name=f"{weight.name}_t", attributes={"perm": [1, 0]})
        product = _insert(model, gemm, "MatMul", [rows, weight], name=f"{gemm.outputs[0].name}_product", like=out)
        if linear.bias is not None:
            product = _insert(model, gemm, "Add", [product, linear.bias], name=f"{gemm.outputs[0].name}_sum", like=out)
        _replace(model, after, product)
        _remove_unused(model, [gemm, before])


def merge_projections(model: ir.Model) -> None:
    """Fuse up to three linear layers with the same input into one product and a Split."""
    groups: dict[tuple[ir.Value, bool, bool], list[Linear]] = {}  # in graph order, so that builds are deterministic
    for node in model.graph:
        if node.op_type == "MatMul" and (linear := linear_of(node)) is not None:
            groups.setdefault((linear.input, linear.rows, linear.bias is not None), []).append(linear)
    for members in groups.values():
        if 1 < len(members) <= _MOST_MERGED and all(linear.is_own for linear in members):
            _merge(model, members)


def split_by_heads(model: ir.Model) -> None:
    """Reshape and transpose fused projections before the Split instead of after it.

    Applies if every output of a Split is reshaped to [batch, sequence_length, heads, head_dim] and transposed to
    [batch, heads, sequence_length, head_dim]. The Split is then along heads.
    """
    for split in [node for node in model.graph if node.op_type == "Split"]:
        source = split.inputs[0]
        reshapes = [_only_user(part) for part in split.outputs]
        transposes = [
            _only_user(node.outputs[0]) for node in reshapes if node is not None and node.op_type == "Reshape"
        ]
        ends = [node for node in transposes if node is not None and _is_heads_first(node)]
        shapes = [_shape(node.outputs[0]) for node in ends]
        if source is None or len(ends) != len(split.outputs) or any(len(shape) != 4 for shape in shapes):
            continue
        heads, widths = [shape[1] for shape in shapes], {shape[3] for shape in shapes}
        if len(widths) > 1 or not all(isinstance(size, int) for size in (*heads, *widths)):
            continue
        batch, _, new, head_dim = shapes[0]
        # Named by its content, so that layers share the constant.
        shape = constant(model.graph, f"heads_of_{head_dim}", np.array([0, 0, -1, int(head_dim)], np.int64))  # type: ignore[arg-type]
        counts = [int(count) for count in heads]  # type: ignore[arg-type]
        total = sum(counts)
        reshaped = _insert(model, split, "Reshape", [source, shape], name=f"{source.name}_heads",
                        shape=ir.Shape([batch, new, total, head_dim]))  # fmt: skip
        first = _insert(model, split, "Transpose", [reshaped], name=f"{source.name}_heads_first",
                        attributes={"perm": _HEADS_FIRST}, shape=ir.Shape([batch, total, new, head_dim]))  # fmt: skip
        by_kind = constant(model.graph, f"heads_{'_'.join(map(str, counts))}", np.array(counts, np.int64))
        parts = ir.node("Split", [first, by_kind], {"axis": 1}, num_outputs=len(ends))
        model.graph.insert_before(split, parts)
        for part, end in zip(parts.outputs, ends, strict=True):
            old = end.outputs[0]
            part.name, part.shape, part.type = f"{old.name}_part", old.shape, old.type
            _take_over(old, part)
        _remove_unused(model, [*ends, *(node for node in reshapes if node is not None), split])


def _merge(model: ir.Model, members: Sequence[Linear]) -> None:
    first = members[0]
    widths = [linear.width for linear in members]
    name = f"{first.weight.name}_and_{len(members) - 1}_more"
    weight = _joined(model, [linear.weight for linear in members], name, axis=0 if first.rows else 1)
    at = first.first_node
    if first.rows:
        weight = _insert(model, at, "Transpose", [weight], name=f"{name}_t", attributes={"perm": [1, 0]})
    shape = ir.Shape([*_shape(first.output)[:-1], sum(widths)])
    product = _insert(model, at, "MatMul", [first.input, weight], name=f"{name}_product", shape=shape)
    if first.bias is not None:
        biases = [linear.bias for linear in members if linear.bias is not None]
        bias = _joined(model, biases, f"{name}_bias", axis=0)
        product = _insert(model, at, "Add", [product, bias], name=f"{name}_sum", shape=shape)
    parts = constant(model.graph, f"{name}_widths", np.array(widths, np.int64))
    split = ir.node("Split", [product, parts], {"axis": -1}, num_outputs=len(members))
    model.graph.insert_before(at, split)
    for linear, part in zip(members, split.outputs, strict=True):
        part.name, part.shape, part.type = f"{linear.output.name}_part", linear.output.shape, linear.output.type
        _take_over(linear.output, part)
    for linear in members:
        _remove_unused(model, linear.nodes)
    for value in [value for linear in members for value in (linear.weight, linear.bias)]:
        if value is not None and not list(value.uses()):
            model.graph.initializers.pop(str(value.name), None)


def skip_norms(model: ir.Model) -> None:
    """Fuse a residual Add and the following norm into one node with both outputs."""
    for norm in [node for node in model.graph if node.op_type in _SKIP_NORMS]:
        total = _producer(norm.inputs[0])
        if total is None or total.op_type != "Add" or not _same(*(_shape(value) for value in total.inputs)):
            continue
        if total.outputs[0].is_graph_output() or len(_shape(total.outputs[0])) != 3:
            continue
        skip = ir.node(
            _SKIP_NORMS[norm.op_type], [*total.inputs, *norm.inputs[1:]], domain=DOMAIN, num_outputs=4,
            attributes={"epsilon": norm.attributes["epsilon"].as_float()},
        )  # fmt: skip
        normed, _, _, summed = skip.outputs
        for value in skip.outputs[1:3]:
            value.name = ""
        for value, old in ((normed, norm.outputs[0]), (summed, total.outputs[0])):
            value.name, value.shape, value.type = f"{old.name}_skip", old.shape, old.type
        # Inserted at the Add, because other nodes may use the sum before the norm.
        model.graph.insert_after(total, skip)
        _take_over(norm.outputs[0], normed)
        total.outputs[0].replace_all_uses_with(summed)
        model.graph.remove([norm, total], safe=True)


def _joined(model: ir.Model, values: Sequence[ir.Value], name: str, *, axis: int) -> ir.Value:
    """Concatenate initializers; their arrays are read when the model is saved."""
    tensors = [_tensor(value) for value in values]
    shape = list(tensors[0].shape.numpy())
    shape[axis] = sum(tensor.shape.numpy()[axis] for tensor in tensors)
    joined = ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis)),
        dtype=tensors[0].dtype, shape=ir.Shape(shape), name=name,
    )  # fmt: skip
    return add_initializer(model.graph, joined)


def _insert(
    model: ir.Model,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    name: str,
    attributes: dict[str, Any] | None = None,
    like: ir.Value | None = None,
    shape: ir.Shape | None = None,
) -> ir.Value:
    """Insert a node with one float output, and return the output; `like`: a value with the output's shape."""
    node = ir.node(op_type, list(inputs), attributes)
    out = node.outputs[0]
    out.name, out.shape, out.type = name, like.shape if like is not None else shape, ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(before, node)
    return out


def _replace(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """Replace all uses of a node's output by `value`, and remove the node."""
    _take_over(node.outputs[0], value)
    model.graph.remove(node, safe=True)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Replace all uses of `old` by `new`. A graph output's name, which the contract defines, is kept."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}_before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _remove_unused(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    """Remove those nodes without uses, in the given order."""
    for node in nodes:
        if not any(list(out.uses()) or out.is_graph_output() for out in node.outputs):
            model.graph.remove(node, safe=True)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _only_user(value: ir.Value) -> ir.Node | None:
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _is_heads_first(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == _HEADS_FIRST


def _shape(value: ir.Value | None) -> list[int | ir.SymbolicDim]:
    """A value's dimensions; empty if unknown."""
    return list(value.shape.dims) if value is not None and value.shape is not None else []


def _same(one: Sequence[int | ir.SymbolicDim], other: Sequence[int | ir.SymbolicDim]) -> bool:
    """Whether two shapes are known and equal."""
    known = bool(one) and all(isinstance(dim, int) or dim.value is not None for dim in one)
    return known and list(one) == list(other)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value
