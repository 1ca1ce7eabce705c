"""int8 and int4 weights beside ONNX Runtime's own quantizer, an oracle: round to nearest, and GPTQ."""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import GPTQWeightOnlyQuantConfig, MatMulNBitsQuantizer

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.exporters.quantization.weight_only import quantize
from llm2slm_export.contract import Bits, WeightQuantization

COLUMNS, ROWS = 128, 48
ROUND_TO_NEAREST: dict[Bits, int] = {8: 128, 4: 32}


class Inputs(CalibrationDataReader):
    """One batch of calibration inputs."""

    def __init__(self, inputs: Array) -> None:
        self._batches = iter([{"x": inputs}])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self._batches

    def __deepcopy__(self, memo: object) -> "Inputs":
        return self


def model_of(weight: Array) -> onnx.ModelProto:
    """y [batch, ROWS] = x [batch, COLUMNS] · weightᵀ."""
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info("x", floats, ["batch", COLUMNS])],
        [helper.make_tensor_value_info("y", floats, ["batch", ROWS])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def read_back(model: onnx.ModelProto) -> Array:
    """The weight [ROWS, COLUMNS] that ONNX Runtime multiplies with."""
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.eye(COLUMNS, dtype=np.float32)})
    result: Array = product.T
    return result


def ours(weight: Array, bits: Bits, block: int, moments: Array | None = None) -> Array:
    model = ir.from_proto(model_of(weight))
    quantize(
        model, bits, weight_quantization=WeightQuantization(block, quantize_lm_head=True),
        moments={} if moments is None else {"x": moments},
    )  # fmt: skip
    return read_back(ir.to_proto(model))


def theirs(weight: Array, bits: Bits, block: int, inputs: Array | None = None) -> Array:
    algorithm = None if inputs is None else GPTQWeightOnlyQuantConfig(Inputs(inputs))
    quantizer = MatMulNBitsQuantizer(
        model_of(weight), bits=bits, block_size=block, is_symmetric=True, algo_config=algorithm
    )
    quantizer.process()
    model: onnx.ModelProto = quantizer.model.model
    if all(opset.domain != "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return read_back(model)


@pytest.fixture(scope="module")
def weight() -> Array:
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_are_no_further_from_float32(weight: Array, bits: Bits) -> None:
    block = ROUND_TO_NEAREST[bits]
    errors = [np.square(found(weight, bits, block) - weight).mean() for found in (ours, theirs)]
    # At int8 ours has 255 steps, as far above zero as below; theirs has 256.
    steps = (128 / 127) ** 2 if bits == 8 else 1.0
    assert 0 < errors[0] <= errors[1] * steps * 1.02


def test_calibrated_four_bits_give_no_worse_outputs(weight: Array) -> None:
    random = np.random.default_rng(1)
    few = random.standard_normal((2000, 6)) @ random.standard_normal((6, COLUMNS))
    spread = np.exp(random.standard_normal(COLUMNS))
    inputs = ((few + 0.3 * random.standard_normal((2000, COLUMNS))) * spread).astype(np.float32)
    fitted, held_out = inputs[:1500], inputs[1500:]

    def error(found: Array) -> float:
        return float(np.square(held_out @ (found - weight).T).mean())

    known = (error(theirs(weight, 4, 32)), error(theirs(weight, 4, 32, fitted)))
    assert 0 < error(ours(weight, 4, 32, fitted.T @ fitted)) <= min(known)
