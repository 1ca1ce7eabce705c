"""Passes that leave a graph with fewer nodes, each named after what it does. None changes what the graph computes.

A step of a small decoder takes longer over its operators than over its weights: a node costs about a microsecond of ONNX
Runtime's time, and one that multiplies wakes every thread.
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
# Query, key and value, or two projections of a gated feed-forward layer. The keys and values of all layers'
# cross-attention have one input too: as one product they would be no faster, and be copied once more.
_MOST_MERGED = 3
_SKIP_NORMS = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


def fuse(model: ir.Model, name: GraphName, *, contrib: bool = True) -> None:
    """All passes, in place. Products are merged in the decoder alone: a prompt's rows are many, and OpenVINO activates in the
    operator that multiplies, where no Split comes between. So are contrib operators, which only ONNX Runtime has.

    Args:
        contrib: use them.
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
    """Refuse a decoder whose attention is not one node per layer.

    Args:
        softcapped: its scores are bounded, for which there is no such node: it has a Softmax per layer.

    Raises:
        CompositionError: with what was counted.
    """
    per_layer = 2 if shape.slm_kind == "encoder-decoder" else 1
    layers = per_layer * shape.num_hidden_layers
    expected = {"Attention": 0, "Softmax": layers} if softcapped else {"Attention": layers, "Softmax": 0}
    found = {op: sum(node.op_type == op for node in model.graph) for op in expected}
    if found != expected:
        raise CompositionError(
            "The SLM's attention did not become one operator per layer.",
            *(f"{op}: expected {expected[op]}, found {found[op]}" for op in expected if found[op] != expected[op]),
            f"transformers {version('transformers')}",
            remedy="use a transformers release that this one is tested with, or report this SLM",
        )


def gemm_to_matmul(model: ir.Model) -> None:
    """Reshape to a matrix → Gemm → Reshape back: MatMul and Add, which take any rank. What was given by heads
    [batch, sequence_length, heads, head_dim], as attention gives it, is reshaped to [batch, sequence_length, heads · head_dim]."""
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
    """Up to three linear layers of one input: one product, and a Split."""
    groups: dict[tuple[ir.Value, bool, bool], list[Linear]] = {}  # in the graph's order, whatever the values' ids are
    for node in model.graph:
        if node.op_type == "MatMul" and (linear := linear_of(node)) is not None:
            groups.setdefault((linear.input, linear.rows, linear.bias is not None), []).append(linear)
    for members in groups.values():
        if 1 < len(members) <= _MOST_MERGED and all(linear.is_own for linear in members):
            _merge(model, members)


def split_by_heads(model: ir.Model) -> None:
    """A Split whose parts are all reshaped to [batch, sequence_length, heads, head_dim] and transposed to [batch, heads, sequence_length, head_dim]:
    the whole is, and then split by heads."""
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
        # By a name that says the widths: layers share it.
        shape = constant(model.graph, f"heads_of_{head_dim}", np.array([0, 0, -1, int(head_dim)], np.int64))  # type: ignore[arg-type]
        counts = [int(count) for count in heads]  # type: ignore[arg-type]
        total = sum(counts)
        apart = _insert(model, split, "Reshape", [source, shape], name=f"{source.name}_heads",
                        shape=ir.Shape([batch, new, total, head_dim]))  # fmt: skip
        first = _insert(model, split, "Transpose", [apart], name=f"{source.name}_heads_first",
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
    """A residual sum and the norm that reads it: one node with both results."""
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
        # Where the sum was: other nodes may read it before the norm does.
        model.graph.insert_after(total, skip)
        _take_over(norm.outputs[0], normed)
        total.outputs[0].replace_all_uses_with(summed)
        model.graph.remove([norm, total], safe=True)


def _joined(model: ir.Model, values: Sequence[ir.Value], name: str, *, axis: int) -> ir.Value:
    """Initializers side by side, as one; their arrays are read when the model is written."""
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
    """A new node of one float output, named `name`; `like`: a value of the output's shape."""
    node = ir.node(op_type, list(inputs), attributes)
    out = node.outputs[0]
    out.name, out.shape, out.type = name, like.shape if like is not None else shape, ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(before, node)
    return out


def _replace(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """Everything that reads a node's output reads `value`; the node goes."""
    _take_over(node.outputs[0], value)
    model.graph.remove(node, safe=True)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Everything that reads `old` reads `new`, which takes its name too where that is the contract's: a graph output's."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}_before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _remove_unused(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    """Remove those that nothing reads, the last first."""
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
    """A value's dimensions; none where they are not known."""
    return list(value.shape.dims) if value is not None and value.shape is not None else []


def _same(one: Sequence[int | ir.SymbolicDim], other: Sequence[int | ir.SymbolicDim]) -> bool:
    """Whether two shapes are known, and the same."""
    known = bool(one) and all(isinstance(dim, int) or dim.value is not None for dim in one)
    return known and list(one) == list(other)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value
