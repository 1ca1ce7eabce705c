"""Static int8 quantization (w8a8): int8 weights and activations, with calibrated activation scales.

An int8 product takes a third of the time of a float32 product if it has many rows. An encoder's have; a decoder's step
has one row (docs/notebook/encoder-runtimes.md). In ONNX it is QuantizeLinear and DequantizeLinear around a MatMul, which
ONNX Runtime and OpenVINO fuse into one operator.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llm2slm_export.authoring.exporters.onnx.initializers import add_initializer
from llm2slm_export.authoring.exporters.onnx.linear_layers import Linear, linear_of
from llm2slm_export.authoring.exporters.quantization.calibration import ActivationRange
from llm2slm_export.authoring.exporters.quantization.weight_only import is_large_matrix

# Maximum relative error of a layer's quantized input. In a trained T5, feed-forward products have single values a
# hundred times the others, and would have 9 to 25 %; inputs from norms and attention have 1 to 2 %. Ranges are not
# clipped: scales of minimum mean error doubled the error of one-token prompts.
_MOST = 0.03
_LEVELS = 255


def quantize_static_int8(model: ir.Model, ranges: Mapping[str, ActivationRange]) -> None:
    """Quantize weights and inputs of linear layers to int8, in place.

    Layers stay as they are if their inputs would lose too much, or have no known range. Weights are symmetric, with a
    scale per output. An input has one scale and one zero point. Both runtimes have int8 kernels for this form.

    Args:
        model: the exported graph.
        ranges: input ranges by value name (`calibration.input_ranges`).
    """
    rounded: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        linear = linear_of(node)
        if linear is None or not is_large_matrix(linear.weight) or not linear.is_own:
            continue
        source = linear.input
        known = ranges.get(str(source.name))
        if known is None or rounding_error(known) > _MOST:
            continue
        if source not in rounded:
            rounded[source] = _rounded_input(model, linear, known)
        linear.product.replace_input_with(0, rounded[source])
        _round_weight(model, linear)


def rounding_error(known: ActivationRange) -> float:
    """The relative error (rms) of quantizing a range to 256 values."""
    return (known.highest - known.lowest) / _LEVELS / np.sqrt(12) / known.rms if known.rms else 0.0


def _rounded_input(model: ir.Model, linear: Linear, known: ActivationRange) -> ir.Value:
    source, scale = linear.input, np.float32((known.highest - known.lowest) / _LEVELS or 1.0)
    zero = np.uint8(np.clip(np.rint(-known.lowest / scale), 0, _LEVELS))
    given = [
        add_initializer(model.graph, ir.tensor(scale, name=f"{source.name}.scale")),
        add_initializer(model.graph, ir.tensor(zero, name=f"{source.name}.zero")),
    ]
    narrow = ir.node("QuantizeLinear", [source, *given])
    wide = ir.node("DequantizeLinear", [narrow.outputs[0], *given])
    for node, kind, name in ((narrow, ir.DataType.UINT8, "q"), (wide, ir.DataType.FLOAT, "dequantized")):
        out = node.outputs[0]
        out.name, out.shape, out.type = f"{source.name}.{name}", source.shape, ir.TensorType(kind)
    # Inserted before the first layer that uses the input.
    model.graph.insert_before(linear.product, [narrow, wide])
    return wide.outputs[0]


def _round_weight(model: ir.Model, linear: Linear) -> None:
    weight, axis = linear.weight, 0 if linear.rows else 1
    tensor = weight.const_value
    assert tensor is not None

    def scales() -> npt.NDArray[np.float32]:
        most = np.abs(tensor.numpy()).max(axis=1 - axis) / 127
        return np.where(most == 0, 1, most).astype(np.float32)

    def numbers() -> ir.TensorProtocol:
        return ir.tensor(np.rint(tensor.numpy() / np.expand_dims(scales(), 1 - axis)).clip(-127, 127).astype(np.int8))

    shape = ir.Shape(weight.shape)  # type: ignore[arg-type]
    tensors = (
        ir.LazyTensor(numbers, dtype=ir.DataType.INT8, shape=shape, name=f"{weight.name}.q8"),
        ir.tensor(scales(), name=f"{weight.name}.scale"),
        ir.tensor(np.zeros(linear.width, np.int8), name=f"{weight.name}.zero"),
    )
    given = [add_initializer(model.graph, tensor) for tensor in tensors]
    node = ir.node("DequantizeLinear", given, {"axis": axis})
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{weight.name}.dequantized", weight.shape, ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(linear.first_node, node)
    weight.replace_all_uses_with(out)
    del model.graph.initializers[str(weight.name)]
