"""16-bit floats: bfloat16 storage for CPUs, float16 and bfloat16 computation for GPUs.

`store_bfloat16` stores weights as bfloat16 and casts them to float32 before products. ONNX Runtime casts once, at load
time, and computes in float32; OpenVINO computes in bfloat16 if the processor supports it.

`convert_to_half` computes products in the half type, with explicit types as strongly typed networks require.
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
# Operators that only move values: they keep the type of their input.
_MOVING = ("Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
# Operators that compute in the half type.
_COMPUTING = ("Add", "Attention", "DequantizeLinear", "Gemm", "MatMul", "TensorScatter")
# Name prefixes of graph inputs and outputs in the half type.
_CACHED = ("past_key_values.", "present.")


def store_bfloat16(model: ir.Model) -> None:
    """Store large weight matrices and tables as bfloat16, in place; small ones save nothing and need precision.

    Table lookups cast the selected rows only.
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
    """Cast a value to float32 for the given uses."""
    cast = ir.node("Cast", inputs=[value], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{value.name}_float32"
    insert(cast)
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])


def convert_to_half(model: ir.Model, dtype: ir.DataType, *, keep: Collection[str] = ()) -> None:
    """Convert a float32 model without contrib operators to products in a half type, in place.

    In the half type: products with weights and products of activations (not of positions), their biases, `Attention`
    and its mask, the cache and the cross-attention's keys and values (inputs and outputs included), and lookup tables.
    In float32, through casts: residual sums, norms, softmax, activation functions, and the graph's other inputs and
    outputs.

    Args:
        model: the exported graph.
        dtype: FLOAT16 or BFLOAT16.
        keep: modules whose products stay in float32, by a component of their weights' dotted names (transformers'
            `_keep_in_fp32_modules`): T5's `wo` overflows float16.
    """
    _HalfConverter(model, dtype, frozenset(keep)).run()


def cast_outputs(model: ir.Model, specs: Sequence[TensorSpec]) -> None:
    """Cast a model's float outputs to their contract's types, in place: the next graph may have another precision."""
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
    """Emulate a converted model in float32 with rounding to the half type, in place. Inputs and outputs become float32.

    The results are those of GPUs, which accumulate products in float32. ONNX Runtime's CPU provider has no bfloat16
    products; it computes float16 products in float32 and skips the intermediate roundings, so that float16 overflows
    would go unnoticed.
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
    """A Cast of a value, with its shape."""
    node = ir.node("Cast", [value], {"to": to})
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{value.name}_{id(node)}", value.shape, ir.TensorType(to)
    return node


def mask_value(dtype: ir.DataType) -> float:
    """The value that a half-type mask adds to hidden scores: half of the type's minimum.

    With the minimum itself, the sum with a negative score may be -inf, and a fully masked row NaN. The padding before a
    decoder-only prompt has such rows.
    """
    return float(ml_dtypes.finfo(_NUMPY[dtype]).min) / 2  # type: ignore[no-untyped-call]


class _HalfConverter:
    """Visits nodes in graph order, so that the type of every value is known before its uses."""

    def __init__(self, model: ir.Model, dtype: ir.DataType, keep: frozenset[str]) -> None:
        self.model, self.graph, self.dtype, self.keep = model, model.graph, dtype, keep
        self.half: set[ir.Value] = set()  # values in the half type
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
        """The product nodes in the half type, and the Adds of their biases."""
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
        """Convert a node to the half type; `floats`: indices of the inputs with the output's type."""
        for index in floats:
            value = node.inputs[index]
            if value is not None and value not in self.half:
                node.replace_input_with(index, self._narrow(value, node))
        for out in node.outputs:
            self._mark(out)

    def _mask(self, node: ir.Node) -> None:
        """Convert a mask to the half type, bounded by `mask_value`."""
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
        """Cast graph outputs: the cache's to the half type, others to float32; each keeps its name."""
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
        """Convert a float32 value to the half type.

        Weights are stored in it, transposed weights are converted before the transpose, and other values are cast.
        """
        if value.is_initializer():
            return self._stored(value)
        producer = value.producer()
        if producer is not None and transposed_initializer(producer) is not None and node.op_type == "MatMul":
            self._compute(producer, (0,))
            return value
        return self._narrowed(value)

    def _stored(self, value: ir.Value) -> ir.Value:
        """A copy of an initializer in the half type; `run` removes the float32 one if it has no more uses."""
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
        """Insert a node right after `like`, whose shape its output has."""
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
    """Values that depend on float inputs or looked-up tables.

    Values of ids, masks and lengths alone, such as rotary angles, are not among them and need float32.
    """
    active = {value for value in model.graph.inputs if value.dtype == ir.DataType.FLOAT}
    for node in model.graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        looks_up = _is_float_matrix(table) or _dequantized_from(table) is not None
        if looks_up or (node.op_type != "Shape" and any(value in active for value in node.inputs)):
            active.update(node.outputs)
    return active


def _dequantized_from(value: ir.Value | None) -> ir.Value | None:
    """The stored integers of a dequantized weight, transposed or not; None for any other value."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None


def _is_float_matrix(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2


def _is_table(value: ir.Value | None) -> bool:
    """Whether a value is a lookup table that is worth storing in the half type."""
    if value is None or not _is_float_matrix(value):
        return False
    multiplied = any(node.op_type in ("MatMul", "Gemm", "Transpose") for node, _ in value.uses())
    assert value.const_value is not None
    return multiplied or value.const_value.size >= MINIMUM_WEIGHTS
