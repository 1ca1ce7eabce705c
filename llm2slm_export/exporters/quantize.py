"""Weight-only int8: `MatMulNBits` for matrices, `GatherBlockQuantized` for tables, tensor by tensor.

Symmetric, round to nearest, one float32 scale per block of `BLOCK` weights along the input axis. A table that is both
looked up and multiplied with (tied embeddings) is stored once and read by both operators.
ONNX Runtime contrib operators: com.microsoft.MatMulNBits and com.microsoft.GatherBlockQuantized.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llm2slm_export.exporters.onnx import transposed_initializer

BLOCK = 128
SMALLEST_BLOCK = 16  # what GatherBlockQuantized and MatMulNBits accept
MINIMUM_WEIGHTS = 4096  # smaller matrices (relative position biases) cost nothing and matter
ZERO_POINT = 128  # of unsigned 8-bit weights, both operators' default
DOMAIN = "com.microsoft"


def quantize_rows(weight: npt.NDArray[Any], block: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """[rows, columns] float → ([rows, blocks, block] uint8, [rows, blocks] float32 scales); the last block is padded.

    weight ≈ (q - 128) · scale, with an error of at most half a scale per weight.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    padded = np.zeros((rows, blocks * block), dtype=np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, block)
    scales = (np.abs(grouped).max(axis=2) / 127).astype(np.float32)
    safe = np.where(scales == 0, 1, scales)[:, :, None]
    return (np.rint(grouped / safe) + ZERO_POINT).clip(0, 255).astype(np.uint8), scales


def quantize_int8(model: ir.Model) -> None:
    """Replace every large weight matrix and table of a model by its int8 form, in place.

    The quantised tensors are computed when the model is written, one at a time: peak memory is one tensor's.
    """
    stored: dict[str, tuple[ir.Value, ir.Value, ir.Value, int]] = {}
    for node in list(model.graph):
        if node.op_type == "Gather" and _is_table(node):
            _replace_gather(model, node, stored)
    for node in list(model.graph):
        if node.op_type not in {"MatMul", "Gemm"}:
            continue
        found = _weight_rows(node)
        if found is not None:
            _replace_matmul(model, node, *found, stored)
    _drop_unused(model)
    model.opset_imports[DOMAIN] = 1


def _is_table(node: ir.Node) -> bool:
    table = node.inputs[0]
    axis = node.attributes.get("axis")
    return table is not None and _is_large_matrix(table) and (axis is None or axis.as_int() == 0)


def _is_large_matrix(value: ir.Value) -> bool:
    tensor = value.const_value if value.is_initializer() else None
    return (
        tensor is not None
        and len(tensor.shape) == 2
        and tensor.dtype == ir.DataType.FLOAT
        and tensor.size >= MINIMUM_WEIGHTS
    )


def _weight_rows(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """The weight a node multiplies with, and whether it is stored as [out, in] (a row per output)."""
    weight = node.inputs[1]
    if weight is None:
        return None
    if node.op_type == "Gemm":
        plain = all(
            node.attributes[name].value == value
            for name, value in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
            if name in node.attributes
        )
        if not plain or not _is_large_matrix(weight):
            return None
        trans_b = node.attributes.get("transB")
        return weight, trans_b is not None and trans_b.as_int() == 1
    if _is_large_matrix(weight):
        return weight, False
    producer = weight.producer()
    source = transposed_initializer(producer) if producer is not None else None
    return (source, True) if source is not None and _is_large_matrix(source) else None


def _block_for(columns: int) -> int:
    """The largest power of two up to BLOCK that divides the input axis; the smallest, with padding, where none does."""
    block = BLOCK
    while block > SMALLEST_BLOCK and columns % block:
        block //= 2
    return block


def _quantized(
    model: ir.Model, weight: ir.Value, stored: dict[str, tuple[ir.Value, ir.Value, ir.Value, int]], *, rows: bool
) -> tuple[ir.Value, ir.Value, ir.Value, int]:
    """The initializers of a quantised weight: the table [rows, columns], the same as [rows, blocks, block], scales."""
    assert weight.name is not None
    if weight.name in stored:
        return stored[weight.name]
    source = weight.const_value
    assert source is not None
    n, k = (int(d) for d in (source.shape if rows else reversed(list(source.shape))))
    block = _block_for(k)
    blocks = -(-k // block)

    @lru_cache(maxsize=1)
    def compute() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        array = source.numpy()
        return quantize_rows(array if rows else array.T, block)

    def weights() -> ir.TensorProtocol:
        return ir.tensor(compute()[0].reshape(table_shape))

    def scales() -> ir.TensorProtocol:
        values = compute()[1]
        compute.cache_clear()
        return ir.tensor(values)

    # The table form [rows, columns] is what a lookup reads; a matrix that is only multiplied with keeps its blocks.
    table_shape = (n, k) if weight.name in _looked_up(model) and k % block == 0 else (n, blocks, block)
    q = _initializer(model, f"{weight.name}_q8", ir.DataType.UINT8, table_shape, weights)
    s = _initializer(model, f"{weight.name}_scale", ir.DataType.FLOAT, (n, blocks), scales)
    blocked = q
    if len(table_shape) == 2:
        shape = ir.tensor(np.array([n, blocks, block], dtype=np.int64))
        dims = _initializer(model, f"{weight.name}_blocks", ir.DataType.INT64, (3,), lambda: shape)
        reshape = ir.node("Reshape", inputs=[q, dims])
        reshape.outputs[0].name = f"{weight.name}_blocked"
        model.graph.insert_before(model.graph[0], reshape)
        blocked = reshape.outputs[0]
    stored[weight.name] = q, blocked, s, block
    return stored[weight.name]


def _looked_up(model: ir.Model) -> set[str]:
    """Names of tables read by lookups that have been, or will be, replaced."""
    return {str(node.inputs[0].name) for node in model.graph if node.op_type == "Gather" and node.inputs[0] is not None}


def _initializer(model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Any) -> ir.Value:
    tensor = ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _replace_gather(model: ir.Model, node: ir.Node, stored: dict[str, tuple[ir.Value, ir.Value, ir.Value, int]]) -> None:
    table = node.inputs[0]
    assert table is not None
    if table.const_value is None or int(table.const_value.shape[1]) % SMALLEST_BLOCK:
        return  # rows that do not divide into blocks cannot be looked up quantised
    q, _, scales, block = _quantized(model, table, stored, rows=True)
    _replace(
        model, node,
        ir.node("GatherBlockQuantized", inputs=[q, node.inputs[1], scales], domain=DOMAIN,
                attributes={"block_size": block, "bits": 8, "gather_axis": 0, "quantize_axis": 1}),
    )  # fmt: skip


def _replace_matmul(
    model: ir.Model, node: ir.Node, weight: ir.Value, rows: bool, stored: dict[str, tuple[ir.Value, ir.Value, ir.Value, int]]
) -> None:
    _, blocked, scales, block = _quantized(model, weight, stored, rows=rows)
    shape = weight.const_value.shape if weight.const_value is not None else ()
    n, k = (int(d) for d in (shape if rows else reversed(list(shape))))
    multiply = ir.node(
        "MatMulNBits", inputs=[node.inputs[0], blocked, scales], domain=DOMAIN,
        # accuracy_level 4: activations are rounded to int8 per block too, which is what makes the kernel fast. The
        # parity gate measures what it costs.
        attributes={"K": k, "N": n, "bits": 8, "block_size": block, "accuracy_level": 4},
    )  # fmt: skip
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        model.graph.insert_before(node, multiply)
        multiply.outputs[0].name = f"{node.outputs[0].name}_product"
        _replace(model, node, ir.node("Add", inputs=[multiply.outputs[0], node.inputs[2]]))
        return
    _replace(model, node, multiply)


def _replace(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    output, replacement = old.outputs[0], new.outputs[0]
    replacement.name, replacement.shape, replacement.type = output.name, output.shape, output.type
    model.graph.insert_before(old, new)
    output.replace_all_uses_with(replacement, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)


def _drop_unused(model: ir.Model) -> None:
    """Remove transposes and full-precision weights that nothing reads any more."""
    for node in list(model.graph):
        if node.op_type == "Transpose" and not any(True for _ in node.outputs[0].uses()) and not node.outputs[0].is_graph_output():
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not any(True for _ in value.uses()) and not value.is_graph_output():
            del model.graph.initializers[name]
