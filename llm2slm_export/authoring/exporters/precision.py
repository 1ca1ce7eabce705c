"""Precisions of graphs: the passes that convert an exported float32 model to each of them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.exporters.onnx.export import transpose_weights
from llm2slm_export.authoring.exporters.quantization.calibration import Call, input_ranges, second_moments
from llm2slm_export.authoring.exporters.quantization.half_precision import convert_to_half, store_bfloat16
from llm2slm_export.authoring.exporters.quantization.smoothquant import smooth
from llm2slm_export.authoring.exporters.quantization.static_int8 import quantize_static_int8
from llm2slm_export.authoring.exporters.quantization.weight_only import quantize
from llm2slm_export.authoring.exporters.tensorrt.network import dequantize_weights
from llm2slm_export.contract import (
    DEFAULT_WEIGHT_QUANTIZATION,
    WEIGHT_BITS,
    Bits,
    EnginePrecision,
    Precision,
    WeightQuantization,
)


@dataclass(frozen=True)
class PassInputs:
    """What the passes need besides the model.

    Args:
        keep: modules that stay in float32 with float16 products (`graphs.graph.kept_in_float32`).
        weight_quantization: of int8 and int4 weights.
        responses: calls of the graph that int8 and int4 weights are calibrated on; None: they are not calibrated.
        prompts: calls of the graph that w8a8 is calibrated on.
    """

    keep: Collection[str]
    weight_quantization: WeightQuantization
    responses: Callable[[], Iterable[Call]] | None
    prompts: Callable[[], Sequence[Call]]

    def moments(self, model: ir.Model) -> Mapping[str, Array]:
        """Smooth a model that is calibrated on responses, in place; return the second moments of the linear
        layers' inputs."""
        return {} if self.responses is None else smooth(model, second_moments(model, self.responses()))


_Pass = Callable[[ir.Model, PassInputs], None]


def _transpose(model: ir.Model, _: PassInputs) -> None:
    transpose_weights(model)


def _to_half(model: ir.Model, inputs: PassInputs) -> None:
    convert_to_half(model, ir.DataType.FLOAT16, keep=inputs.keep)


def _to_bfloat16(model: ir.Model, _: PassInputs) -> None:
    convert_to_half(model, ir.DataType.BFLOAT16)


def _store_bfloat16(model: ir.Model, _: PassInputs) -> None:
    store_bfloat16(model)


def _quantize_weights(model: ir.Model, inputs: PassInputs, *, bits: Bits) -> None:
    moments = inputs.moments(model)
    quantize(model, bits, weight_quantization=inputs.weight_quantization, moments=moments)


def _quantize_static(model: ir.Model, inputs: PassInputs) -> None:
    prompts = inputs.prompts()
    smooth(model, second_moments(model, prompts, diagonal=True))
    quantize_static_int8(model, input_ranges(model, prompts))
    quantize(model, 8)  # tables, and layers whose inputs lose too much in static int8


def _dequantize_weights(model: ir.Model, inputs: PassInputs, *, bits: Bits) -> None:
    moments = inputs.moments(model)
    transpose_weights(model)
    dequantize_weights(model, bits, weight_quantization=inputs.weight_quantization, moments=moments)


_PASSES: dict[Precision, tuple[_Pass, ...]] = {
    "fp32": (_transpose,),
    "fp16": (_transpose, _to_half),
    "bf16": (_transpose, _store_bfloat16),
    "int8": (partial(_quantize_weights, bits=8), _transpose),
    "int4": (partial(_quantize_weights, bits=4), _transpose),
    # A Transpose between weight and product would prevent the runtimes' int8 fusion.
    "w8a8": (_transpose, _quantize_static, _transpose),
}
# int8 and int4 weights are dequantized to float16, because Turing has no bfloat16.
_ENGINE_PASSES: dict[EnginePrecision, tuple[_Pass, ...]] = {
    "fp32": (_transpose,),
    "fp16": (_transpose, _to_half),
    "bf16": (_transpose, _to_bfloat16),
    "int8": (partial(_dequantize_weights, bits=8), _to_half),
    "int4": (partial(_dequantize_weights, bits=4), _to_half),
}


def lower_precision(model: ir.Model, precision: Precision, inputs: PassInputs) -> None:
    """Convert an exported float32 model to a graph's precision, in place."""
    for convert in _PASSES[precision]:
        convert(model, inputs)


def lower_engine_precision(model: ir.Model, precision: EnginePrecision, inputs: PassInputs) -> None:
    """Convert a float32 model without contrib operators to an engine's precision, in place."""
    for convert in _ENGINE_PASSES[precision]:
        convert(model, inputs)


def uses_contrib_operators(precision: Precision) -> bool:
    """Whether a graph of this precision may have contrib operators; at fp16 it has standard ones, with explicit types."""
    return precision != "fp16"


def block_size(precision: Precision, weight_quantization: WeightQuantization) -> int | None:
    """The number of weights per scale; None: the precision has no scales."""
    if precision == "w8a8":
        return DEFAULT_WEIGHT_QUANTIZATION.blocks(8)
    return weight_quantization.blocks(WEIGHT_BITS[precision]) if precision in WEIGHT_BITS else None
