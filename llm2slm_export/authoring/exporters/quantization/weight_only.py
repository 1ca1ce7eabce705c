"""Weight-only int8 and int4: `MatMulNBits` for matrices, `GatherBlockQuantized` for tables, tensor by tensor.

Quantization is symmetric, with one float32 scale per block of weights along the input axis. int8 rounds to nearest.
int4 uses GPTQ (`gptq.py`) for matrices; tables and, by default, the LM head, where four bits cost most
(docs/notebook/quantization.md), stay at 8 bits. Tied embeddings are stored once and used by both operators. ONNX Runtime
contrib operators: com.microsoft.MatMulNBits and com.microsoft.GatherBlockQuantized.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.exporters.onnx.initializers import add_initializer
from llm2slm_export.authoring.exporters.onnx.linear_layers import linear_of
from llm2slm_export.authoring.exporters.quantization.gptq import quantize_int4
from llm2slm_export.contract import DEFAULT_BLOCK_SIZES, DEFAULT_WEIGHT_QUANTIZATION, Bits, WeightQuantization

SMALLEST_BLOCK = 16  # of GatherBlockQuantized and MatMulNBits
MINIMUM_WEIGHTS = 4096  # smaller matrices (relative position biases) save nothing and need precision
ZERO_POINT = 128  # of unsigned 8-bit weights, the default of both operators
DOMAIN = "com.microsoft"


def quantize_rows(weight: Array, block: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Quantize [rows, columns] floats to 8 bits, rounding to nearest.

    weight ≈ (q - 128) · scale, with an error of at most half a scale per weight. The last block is padded.

    Returns:
        [rows, blocks, block] uint8; [rows, blocks] float32 scales.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    padded = np.zeros((rows, blocks * block), dtype=np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, block)
    scales = (np.abs(grouped).max(axis=2) / 127).astype(np.float32)
    safe = np.where(scales == 0, 1, scales)[:, :, None]
    return (np.rint(grouped / safe) + ZERO_POINT).clip(0, 255).astype(np.uint8), scales


def quantize(
    model: ir.Model,
    bits: Bits,
    *,
    weight_quantization: WeightQuantization = DEFAULT_WEIGHT_QUANTIZATION,
    moments: Mapping[str, Array] | None = None,
) -> None:
    """Quantize every large weight matrix and table of a model, in place.

    Quantized tensors are computed one at a time when the model is saved, so that peak memory is one tensor.

    Args:
        model: the exported graph.
        bits: 8 or 4.
        weight_quantization: block size, and whether the LM head is quantized to 4 bits.
        moments: second moments of the linear layers' inputs (`calibration.second_moments`), for 4 bits.
    """
    rewriter = _Rewriter(model, bits, weight_quantization, moments or {})
    for node in list(model.graph):
        if node.op_type == "Gather":
            rewriter.lookup(node)
    for node in list(model.graph):
        if node.op_type in {"MatMul", "Gemm"}:
            rewriter.multiplication(node)
    _drop_unused(model)
    model.opset_imports[DOMAIN] = 1


@dataclass(frozen=True)
class _Quantized:
    """Quantized initializers of a weight.

    `table` [rows, columns] for lookups and `blocks` [rows, blocks, bytes per block] for products are one stored tensor.
    """

    table: ir.Value
    blocks: ir.Value
    scales: ir.Value
    bits: Bits
    block: int


class _Rewriter:
    """Rewrites lookups before products, so that products use the quantized tensors of tied tables."""

    def __init__(
        self,
        model: ir.Model,
        bits: Bits,
        weight_quantization: WeightQuantization,
        moments: Mapping[str, Array],
    ) -> None:
        self.model, self.bits, self.moments, self.quantize_lm_head = (
            model,
            bits,
            moments,
            weight_quantization.quantize_lm_head,
        )
        # 8-bit weights in a 4-bit graph have the default block size.
        self.block = DEFAULT_BLOCK_SIZES | {bits: weight_quantization.blocks(bits)}
        self._stored: dict[ir.Value, _Quantized] = {}
        linears = (linear_of(node) for node in model.graph)
        self._heads = {linear.weight for linear in linears if linear is not None and is_output(linear.output)}

    def lookup(self, node: ir.Node) -> None:
        """Gather along rows of a large table → GatherBlockQuantized."""
        table, axis = node.inputs[0], node.attributes.get("axis")
        if table is None or (axis is not None and axis.as_int() != 0) or not is_large_matrix(table):
            return
        _, columns = _matrix_shape(table)
        if columns % SMALLEST_BLOCK:
            return  # GatherBlockQuantized needs rows that divide into blocks
        # Not GPTQ-fitted: the fit only considers the LM head's inputs, but an embedding lookup can read any row.
        bits: Bits = self.bits if self.quantize_lm_head and table in self._heads else 8
        q = self._quantized(table, rows=True, looked_up=True, bits=bits, moments=None)
        self._replace(
            node,
            ir.node("GatherBlockQuantized", inputs=[q.table, node.inputs[1], q.scales], domain=DOMAIN,
                    attributes={"block_size": q.block, "bits": q.bits, "gather_axis": 0, "quantize_axis": 1}),
        )  # fmt: skip

    def multiplication(self, node: ir.Node) -> None:
        """A linear layer with a large matrix → MatMulNBits, its bias included."""
        linear = linear_of(node)
        if linear is None or not is_large_matrix(linear.weight):
            return
        shape = _matrix_shape(linear.weight)
        n, k = shape if linear.rows else shape[::-1]
        bits: Bits = 8 if linear.weight in self._heads and not self.quantize_lm_head else self.bits
        moments = self.moments.get(str(linear.input.name))
        q = self._quantized(linear.weight, rows=linear.rows, looked_up=False, bits=bits, moments=moments)
        multiply = ir.node(
            "MatMulNBits", inputs=[linear.input, q.blocks, q.scales, None, None, linear.bias], domain=DOMAIN,
            # accuracy_level 4 quantizes activations to int8 per block, which makes the kernel fast. The parity gate
            # measures the error.
            attributes={"K": k, "N": n, "bits": q.bits, "block_size": q.block, "accuracy_level": 4},
        )  # fmt: skip
        self._replace(linear.nodes[0], multiply)

    def _quantized(
        self, weight: ir.Value, *, rows: bool, looked_up: bool, bits: Bits, moments: Array | None
    ) -> _Quantized:
        """The quantized form of a weight, computed once. `rows`: the weight is stored as [out, in]."""
        if weight in self._stored:
            return self._stored[weight]
        source, name = weight.const_value, weight.name
        assert source is not None
        shape = _matrix_shape(weight)
        n, k = shape if rows else shape[::-1]
        block = block_for(k, self.block[bits])
        blocks = -(-k // block)
        stored_shape = (n, k * bits // 8) if looked_up else (n, blocks, block * bits // 8)

        @lru_cache(maxsize=1)
        def compute() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
            array = source.numpy()
            array = array if rows else array.T
            return quantize_rows(array, block) if bits == 8 else quantize_int4(array, moments, block)

        def weights() -> ir.TensorProtocol:
            return ir.tensor(compute()[0].reshape(stored_shape))

        def scales() -> ir.TensorProtocol:
            values = compute()[1]
            compute.cache_clear()
            return ir.tensor(values)

        tensors = (
            ir.LazyTensor(weights, dtype=ir.DataType.UINT8, shape=ir.Shape(stored_shape), name=f"{name}_q{bits}"),
            ir.LazyTensor(scales, dtype=ir.DataType.FLOAT, shape=ir.Shape((n, blocks)), name=f"{name}_scale"),
        )
        q, s = (add_initializer(self.model.graph, tensor) for tensor in tensors)
        blocked = self._blocked(q, (n, blocks, block * bits // 8)) if looked_up else q
        self._stored[weight] = _Quantized(q, blocked, s, bits, block)
        return self._stored[weight]

    def _blocked(self, table: ir.Value, shape: tuple[int, int, int]) -> ir.Value:
        """Reshape a stored table into blocks; ONNX Runtime folds the Reshape at load time."""
        values = ir.tensor(np.array(shape, dtype=np.int64), name=f"{table.name}_blocks")
        dims = add_initializer(self.model.graph, values)
        reshape = ir.node("Reshape", inputs=[table, dims])
        reshape.outputs[0].name = f"{table.name}_blocked"
        self.model.graph.insert_before(self.model.graph[0], reshape)
        return reshape.outputs[0]

    def _replace(self, old: ir.Node, new: ir.Node) -> None:
        output, replacement = old.outputs[0], new.outputs[0]
        replacement.name, replacement.shape, replacement.type = output.name, output.shape, output.type
        self.model.graph.insert_before(old, new)
        output.replace_all_uses_with(replacement, replace_graph_outputs=True)
        self.model.graph.remove(old, safe=True)


def _matrix_shape(value: ir.Value) -> tuple[int, int]:
    assert value.const_value is not None
    rows, columns = value.const_value.shape.numpy()
    return rows, columns


def is_large_matrix(value: ir.Value) -> bool:
    """Whether a value is a float32 matrix that is worth quantizing."""
    tensor = value.const_value if value.is_initializer() else None
    return (
        tensor is not None
        and len(tensor.shape) == 2
        and tensor.dtype == ir.DataType.FLOAT
        and tensor.size >= MINIMUM_WEIGHTS
    )


def block_for(columns: int, most: int) -> int:
    """The largest power of two up to `most` that divides `columns`; else the smallest block, with padding."""
    block = most
    while block > SMALLEST_BLOCK and columns % block:
        block //= 2
    return block


def is_output(value: ir.Value) -> bool:
    """Whether a value is a graph output, directly or after a scale or a bound (Granite, Gemma)."""
    if value.is_graph_output():
        return True
    users = [user for user, _ in value.uses()]
    return len(users) == 1 and users[0].op_type in {"Mul", "Div", "Tanh"} and is_output(users[0].outputs[0])


def _drop_unused(model: ir.Model) -> None:
    """Remove nodes and weights without uses: products with a fused bias, transposes, blocked tables."""
    for node in reversed(list(model.graph)):
        if node.op_type in {"MatMul", "Transpose", "Reshape"} and _is_unused(node.outputs[0]):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if _is_unused(value):
            del model.graph.initializers[name]


def _is_unused(value: ir.Value) -> bool:
    return not value.is_graph_output() and not any(True for _ in value.uses())
