"""Weights and arithmetic of half the width: bfloat16 storage for processors, float16 and bfloat16 computation for GPUs.

`store_bfloat16`: the graph widens weights to float32 before it multiplies. ONNX Runtime does that once, when it loads the
graph, and computes in float32; OpenVINO computes in bfloat16 where the processor can.

`convert_to_half`: the graph multiplies in the half type, with every type written in it, as a strongly typed network needs.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llm2slm_export.authoring.exporters.onnx.initializers import add_initializer, constant
from llm2slm_export.authoring.exporters.onnx.linear_layers import linear_of, transposed_initializer
from llm2slm_export.authoring.exporters.quantization.weight_only import MINIMUM_WEIGHTS
from llm2slm_export.contract import TensorSpec

_NUMPY: dict[ir.DataType, Any] = {ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16}
# What only moves values: in whichever type they are.
_MOVING = ("Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
# What computes in it.
_COMPUTING = ("Add", "Attention", "DequantizeLinear", "Gemm", "MatMul", "TensorScatter")
# Graph inputs and outputs that are in the half type too, as their names begin.
_CACHED = ("past_key_values.", "present.")


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


def convert_to_half(model: ir.Model, dtype: ir.DataType, *, keep: Collection[str] = ()) -> None:
    """Have a float32 model without contrib operators multiply in a half type, in place.

    In the half type: products with weights and of activations (positions are none), their biases, `Attention` and its
    mask, the cache and the keys and values of the cross-attention, inputs and outputs included; the tables that are
    looked up in, as they are stored. In float32, through casts: everything else, which is residual sums, norms, softmax and
    activation functions, and the graph's other inputs and outputs.

    Args:
        dtype: FLOAT16 or BFLOAT16.
        keep: modules whose products stay float32, by one part of the dotted names of their weights (transformers'
            `_keep_in_fp32_modules`): T5's `wo` overflows float16.
    """
    _HalfConverter(model, dtype, frozenset(keep)).run()


def cast_outputs(model: ir.Model, specs: Sequence[TensorSpec]) -> None:
    """Have a model's floating outputs be of their contract's types, in place: another graph of the pair may be at another
    precision."""
    wanted = {spec.name: ir.DataType.FLOAT16 if spec.dtype == "float16" else ir.DataType.FLOAT for spec in specs}
    for index, value in enumerate(list(model.graph.outputs)):
        name = str(value.name)
        if value.dtype == wanted[name]:
            continue
        cast = _float_cast(value, wanted[name])
        model.graph.append(cast)
        value.name, cast.outputs[0].name = f"{name}_before", name
        model.graph.outputs[index] = cast.outputs[0]


def emulate_half(model: ir.Model) -> None:
    """Have what `convert_to_half` made multiply in float32 and round to the half type, in place: the same numbers where products
    are added up in float32, as GPUs do. Inputs and outputs become float32.

    For ONNX Runtime's CPU, which has no products in bfloat16, and which computes those in float16 in float32 and leaves out
    the roundings between them: what overflows float16 would be finite there.
    """
    for value in [value for value in model.graph.inputs if value.dtype in _NUMPY]:
        narrow = _float_cast(value, value.dtype)  # type: ignore[arg-type]
        value.replace_all_uses_with(narrow.outputs[0])
        narrow.replace_input_with(0, value)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.insert_before(model.graph[0], narrow)
    for index, value in enumerate(list(model.graph.outputs)):
        if value.dtype in _NUMPY:
            name, value.name = value.name, f"{value.name}_narrow"
            wide = _float_cast(value, ir.DataType.FLOAT)
            wide.outputs[0].name = name
            model.graph.append(wide)
            model.graph.outputs[index] = wide.outputs[0]
    for node in list(model.graph):
        if node.op_type not in _COMPUTING:
            continue
        for index, read in enumerate(node.inputs):
            if read is not None and read.dtype in _NUMPY:
                cast = _float_cast(read, ir.DataType.FLOAT)
                model.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for out in node.outputs:
            half = out.dtype
            if half not in _NUMPY:
                continue
            name, out.name, out.type = out.name, f"{out.name}_wide", ir.TensorType(ir.DataType.FLOAT)
            narrow = _float_cast(out, half)
            model.graph.insert_after(node, narrow)
            narrow.outputs[0].name = name
            out.replace_all_uses_with(narrow.outputs[0], replace_graph_outputs=True)
            narrow.replace_input_with(0, out)


def _float_cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    """A Cast of a value, of its shape."""
    node = ir.node("Cast", [value], {"to": to})
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{value.name}_{id(node)}", value.shape, ir.TensorType(to)
    return node


def mask_value(dtype: ir.DataType) -> float:
    """What a mask of a half type adds to a score to hide it: half of the type's most negative number.

    Of the number itself and a negative score the sum may be -inf, and a row of nothing else NaN: the padding before a
    decoder-only prompt has such rows.
    """
    return float(ml_dtypes.finfo(_NUMPY[dtype]).min) / 2  # type: ignore[no-untyped-call]


class _HalfConverter:
    """Nodes are visited in the graph's order: whether a value is in the half type is known before it is read."""

    def __init__(self, model: ir.Model, dtype: ir.DataType, keep: frozenset[str]) -> None:
        self.model, self.graph, self.dtype, self.keep = model, model.graph, dtype, keep
        self.half: set[ir.Value] = set()  # values that are in the half type
        self._casts: dict[tuple[ir.Value, str], ir.Value] = {}
        self._active = _activations(model)

    def run(self) -> None:
        products, biases = self._products()
        for value in self.graph.inputs:
            if str(value.name).startswith(_CACHED):
                self._mark(value)
        for node in list(self.graph):
            if node in products or node in biases:
                self._compute(node, range(len(node.inputs)))
            elif node.op_type == "DequantizeLinear":
                if not self._keeps(node.inputs[0]):
                    self._compute(node, (1,))
            elif node.op_type == "TensorScatter":
                self._compute(node, (0, 1))
            elif node.op_type == "Attention":
                self._compute(node, (0, 1, 2))
                self._mask(node)
            elif node.op_type == "Gather" and _is_table(node.inputs[0]):
                self._compute(node, (0,))
            elif node.op_type in _MOVING and node.inputs[0] in self.half:
                for out in node.outputs:
                    self._mark(out)
            elif node.op_type == "Concat" and all(value in self.half for value in node.inputs):
                self._mark(node.outputs[0])
            elif node.op_type != "Shape":
                self._read_wide(node)
        for index, value in enumerate(list(self.graph.outputs)):
            self._output(index, value)
        for name, value in list(self.graph.initializers.items()):
            if not list(value.uses()):
                del self.graph.initializers[name]

    def _products(self) -> tuple[set[ir.Node], set[ir.Node]]:
        """The nodes that multiply in the half type, and the sums with their biases."""
        products, biases = set[ir.Node](), set[ir.Node]()
        for node in self.graph:
            if node.op_type not in ("MatMul", "Gemm") or node.inputs[0] not in self._active:
                continue
            linear = linear_of(node)
            if linear is None:
                weight = node.inputs[1]
                stored = _dequantized_from(weight)
                if weight in self._active or (stored is not None and not self._keeps(stored)):
                    products.add(node)
            elif not self._keeps(linear.weight):
                products.add(node)
                biases.update(other for other in linear.nodes if other.op_type == "Add")
        return products, biases

    def _keeps(self, weight: ir.Value | None) -> bool:
        return weight is not None and not self.keep.isdisjoint(str(weight.name).split("."))

    def _compute(self, node: ir.Node, floats: Sequence[int]) -> None:
        """A node that computes in the half type; `floats`: which of its inputs have the type of its output."""
        for index in floats:
            value = node.inputs[index]
            if value is not None and value not in self.half:
                node.replace_input_with(index, self._narrow(value, node))
        for out in node.outputs:
            self._mark(out)

    def _mask(self, node: ir.Node) -> None:
        """What hides keys is in the half type as what it is added to, and not -inf in it."""
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None or mask in self.half or mask.dtype == ir.DataType.BOOL:
            return
        if (mask, "mask") not in self._casts:
            floor = constant(self.graph, "mask_value", np.array(mask_value(self.dtype), np.float32))
            bounded = self._insert("Max", [mask, floor], mask, "bounded", ir.DataType.FLOAT)
            self._casts[mask, "mask"] = self._cast(bounded, self.dtype)
        node.replace_input_with(3, self._casts[mask, "mask"])

    def _read_wide(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value in self.half:
                node.replace_input_with(index, self._widened(value))

    def _output(self, index: int, value: ir.Value) -> None:
        """Graph outputs of the cache are in the half type, all others float32; each keeps its name."""
        wanted = str(value.name).startswith(_CACHED)
        if wanted == (value in self.half):
            return
        name = str(value.name)
        value.name = f"{name}_before"
        cast = self._narrowed(value) if wanted else self._widened(value)
        cast.name = name
        self.graph.outputs[index] = cast

    def _mark(self, value: ir.Value) -> None:
        self.half.add(value)
        value.type = ir.TensorType(self.dtype)

    def _narrow(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """A float32 value in the half type: weights are stored so, what is dequantised or transposed comes so, and
        everything else is cast."""
        if value.is_initializer():
            return self._stored(value)
        producer = value.producer()
        if producer is not None and transposed_initializer(producer) is not None and node.op_type == "MatMul":
            self._compute(producer, (0,))
            return value
        return self._narrowed(value)

    def _stored(self, value: ir.Value) -> ir.Value:
        """An initializer's copy in the half type; the one in float32 goes with its last use."""
        if (value, "stored") not in self._casts:
            tensor, kind = value.const_value, _NUMPY[self.dtype]
            assert tensor is not None
            stored = ir.LazyTensor(
                lambda: ir.tensor(tensor.numpy().astype(kind)),
                dtype=self.dtype, shape=ir.Shape(tensor.shape.numpy()), name=f"{value.name}_{self._suffix}",
            )  # fmt: skip
            self._casts[value, "stored"] = half = add_initializer(self.graph, stored)
            self.half.add(half)
        return self._casts[value, "stored"]

    @property
    def _suffix(self) -> str:
        return "float16" if self.dtype == ir.DataType.FLOAT16 else "bfloat16"

    def _narrowed(self, value: ir.Value) -> ir.Value:
        if (value, "half") not in self._casts:
            self._casts[value, "half"] = self._cast(value, self.dtype)
        return self._casts[value, "half"]

    def _widened(self, value: ir.Value) -> ir.Value:
        if (value, "float32") not in self._casts:
            self._casts[value, "float32"] = self._cast(value, ir.DataType.FLOAT)
        return self._casts[value, "float32"]

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        suffix = "float32" if to == ir.DataType.FLOAT else self._suffix
        return self._insert("Cast", [value], value, suffix, to, attributes={"to": to})

    def _insert(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        like: ir.Value,
        suffix: str,
        dtype: ir.DataType,
        *,
        attributes: dict[str, Any] | None = None,
    ) -> ir.Value:
        """A new node's output of `like`'s shape, as soon as `like` is known."""
        node = ir.node(op_type, list(inputs), attributes)
        out = node.outputs[0]
        out.name, out.shape, out.type = f"{like.name}_{suffix}", like.shape, ir.TensorType(dtype)
        producer = like.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return out


def _activations(model: ir.Model) -> set[ir.Value]:
    """Values that come of float inputs or of looked-up tables; not those that come of ids, masks and lengths alone, such as
    the angles of rotary embeddings, which need float32."""
    active = {value for value in model.graph.inputs if value.dtype == ir.DataType.FLOAT}
    for node in model.graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        looks_up = _is_float_matrix(table) or _dequantized_from(table) is not None
        if looks_up or (node.op_type != "Shape" and any(value in active for value in node.inputs)):
            active.update(node.outputs)
    return active


def _dequantized_from(value: ir.Value | None) -> ir.Value | None:
    """What a weight that a graph stores as whole numbers is stored as, if it is one, transposed or not."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None


def _is_float_matrix(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2


def _is_table(value: ir.Value | None) -> bool:
    """Whether a value is an initializer to look up in that is worth storing in half."""
    if value is None or not _is_float_matrix(value):
        return False
    multiplied = any(node.op_type in ("MatMul", "Gemm", "Transpose") for node, _ in value.uses())
    assert value.const_value is not None
    return multiplied or value.const_value.size >= MINIMUM_WEIGHTS
