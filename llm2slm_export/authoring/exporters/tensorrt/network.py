"""The graph that TensorRT compiles: the bundle's own export in standard ONNX operators, with explicit types.

Its form follows from TensorRT's support of ONNX and from its silent errors (docs/gpu.md). The cache is a
`TensorScatter` on a network input of fixed capacity. `Attention` has an explicit mask of the query's type, and never
`is_causal` or `nonpad_kv_seqlen`. Quantized weights are `DequantizeLinear`.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.exporters.onnx.initializers import add_initializer
from llm2slm_export.authoring.exporters.onnx.linear_layers import linear_of
from llm2slm_export.authoring.exporters.quantization import gptq, weight_only
from llm2slm_export.contract import (
    ARGMAX_IDS,
    LOGITS,
    MAX_LOGITS,
    Axis,
    Bits,
    TensorSpec,
    WeightQuantization,
)

_TYPES = {
    ir.DataType.INT64: "int64", ir.DataType.INT32: "int32", ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
}  # fmt: skip


def dequantize_weights(
    model: ir.Model, bits: Bits, *, weight_quantization: WeightQuantization, moments: Mapping[str, Array]
) -> None:
    """Quantize the large matrices of linear layers, with blockwise `DequantizeLinear`, in place.

    The integers are those of the bundle's own int8 and int4 (`weight_only.py`, `gptq.py`). Lookup-only tables stay as
    they are, because a lookup would dequantize the whole table. So do matrices that no block size divides.
    """
    stored: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        linear = linear_of(node)
        if linear is None or not weight_only.is_large_matrix(linear.weight):
            continue
        weight = linear.weight
        if weight not in stored:
            head = weight_only.is_output(linear.output)
            own: Bits = 8 if head and not weight_quantization.quantize_lm_head else bits
            block = weight_quantization.blocks(own) if own == bits else WeightQuantization().blocks(own)
            value = _dequantized(model, weight, own, block, moments.get(str(linear.input.name)), rows=linear.rows)
            if value is None:
                continue
            stored[weight] = value
            weight.replace_all_uses_with(value)
            del model.graph.initializers[str(weight.name)]


def _dequantized(
    model: ir.Model, weight: ir.Value, bits: Bits, most: int, moments: Array | None, *, rows: bool
) -> ir.Value | None:
    """The `DequantizeLinear` output of a weight. `rows`: the weight is stored as [out, in], else as [in, out]."""
    tensor = weight.const_value
    assert tensor is not None
    shape = tuple(int(size) for size in tensor.shape.numpy())
    n, k = shape if rows else shape[::-1]
    block = weight_only.block_for(k, most)
    if k % block:
        return None
    axis = 1 if rows else 0

    @lru_cache(maxsize=1)
    def compute() -> tuple[Array, npt.NDArray[np.float32]]:
        array = tensor.numpy() if rows else tensor.numpy().T
        if bits == 8:
            numbers, scales = weight_only.quantize_rows(array, block)
            signed = (numbers.reshape(n, k).astype(np.int16) - weight_only.ZERO_POINT).astype(np.int8)
        else:
            packed, scales = gptq.quantize_int4(array, moments, block)
            both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(n, k)
            signed = (both.astype(np.int8) - gptq.ZERO_POINT).astype(ml_dtypes.int4)
        return (signed, scales) if rows else (signed.T, scales.T)

    def numbers() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(compute()[0]))

    def scales() -> ir.TensorProtocol:
        values = np.ascontiguousarray(compute()[1])
        compute.cache_clear()
        return ir.tensor(values)

    kind = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    by_block = (n, k // block) if rows else (k // block, n)
    tensors = (
        ir.LazyTensor(numbers, dtype=kind, shape=ir.Shape(shape), name=f"{weight.name}.q{bits}"),
        ir.LazyTensor(scales, dtype=ir.DataType.FLOAT, shape=ir.Shape(by_block), name=f"{weight.name}.scale"),
    )
    inputs = [add_initializer(model.graph, tensor) for tensor in tensors]
    node = ir.node("DequantizeLinear", inputs, {"axis": axis, "block_size": block})
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{weight.name}.dequantized", weight.shape, ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(model.graph[0], node)
    return out


def fix_axes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Set named axes of inputs and outputs to fixed sizes, in place."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(
            [sizes.get(str(axis), axis) if isinstance(axis, str) else axis for axis in axes_of(value)]
        )


def add_argmax(model: ir.Model, num_tokens: int) -> tuple[TensorSpec, ...]:
    """Add the argmax of the logits as decoder outputs, in place: a greedy step then copies no logits.

    The outputs are `argmax_ids` and `max_logits`, [batch, num_logits], over the ids below `num_tokens`. Ties are
    resolved arbitrarily, because TensorRT's `TopK` does not guarantee ONNX's order.

    Returns:
        the specs of the added outputs.
    """
    logits = next(value for value in model.graph.outputs if value.name == LOGITS)
    *leading, vocab = axes_of(logits)
    assert isinstance(vocab, int)

    def constant(name: str, number: int) -> ir.Value:
        return add_initializer(model.graph, ir.tensor(np.array([number], np.int64), name=f"best.{name}"))

    last, scores = constant("axis", 2), logits
    if num_tokens < vocab:
        given = [logits, constant("first", 0), constant("num_tokens", num_tokens), last]
        model.graph.append(cut := ir.node("Slice", given))
        scores = cut.outputs[0]
    model.graph.append(top := ir.node("TopK", [scores, constant("count", 1)], {"axis": 2}, num_outputs=2))
    for found, name, dtype in zip(
        top.outputs, (MAX_LOGITS, ARGMAX_IDS), (ir.DataType.FLOAT, ir.DataType.INT64), strict=True
    ):
        model.graph.append(node := ir.node("Squeeze", [found, last]))
        out = node.outputs[0]
        out.name, out.shape, out.type = name, ir.Shape(leading), ir.TensorType(dtype)
        model.graph.outputs.append(out)
    axes = tuple(leading)
    return TensorSpec(MAX_LOGITS, "float32", axes), TensorSpec(ARGMAX_IDS, "int64", axes)


def axes_of(value: ir.Value) -> list[Axis]:
    """The axes of an input or output, in the contract's notation."""
    assert value.shape is not None
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape.dims]


def tensor_specs(
    specs: Sequence[TensorSpec], values: Sequence[ir.Value], sizes: Mapping[str, int]
) -> tuple[TensorSpec, ...]:
    """A contract's inputs or outputs with the graph's types and the given axis sizes."""
    kinds = {value.name: value.dtype for value in values}
    return tuple(
        TensorSpec(
            spec.name,
            _TYPES[kinds[spec.name]],  # type: ignore[index, arg-type]
            tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.axes),
        )
        for spec in specs
    )
