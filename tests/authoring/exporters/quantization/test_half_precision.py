"""Graphs that multiply in a half type: close to those in float32, finite, and of the types that they promise."""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from llm2slm_export.authoring.exporters.onnx.export import export_graph, transpose_weights
from llm2slm_export.authoring.exporters.quantization.half_precision import convert_to_half, emulate_half, mask_value
from llm2slm_export.authoring.graphs.factory import make_graph
from llm2slm_export.authoring.models.pairing import LoadedPair, load_composition
from llm2slm_export.authoring.parity.reference_outputs import ReferenceBatch, reference_batches, special_ids
from llm2slm_export.authoring.parity.teacher_forcing import conditioning, empty_cache, feeds, in_turn
from llm2slm_export.bundle.manifest import SpecialIds
from llm2slm_export.contract import GRAPHS, GraphName
from tests.support.tiers import tiered

HALVES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
# Root mean square error over root mean square: of one rounding 2^-11 and 2^-8 at most; of a dozen products in turn, more.
TOLERANCE = {"float16": 4e-3, "bfloat16": 3.2e-2}


Exported = Callable[[str, GraphName], ir.Model]


@pytest.fixture(scope="module")
def pairs(save_composition: Callable[..., Path]) -> Callable[[str], LoadedPair]:
    return lru_cache(lambda slm_type: load_composition(save_composition(slm_type)))


@pytest.fixture(scope="module")
def exported(pairs: Callable[[str], LoadedPair]) -> Exported:
    """exported(slm_type, graph) → a model of one's own; each graph is exported once."""

    @lru_cache
    def once(slm_type: str, name: GraphName) -> onnx.ModelProto:
        model = export_graph(make_graph(name, pairs(slm_type).reference), contrib=False)
        transpose_weights(model)
        return ir.to_proto(model)

    return lambda slm_type, name: ir.from_proto(once(slm_type, name))


def half(model: ir.Model, kind: str) -> ir.Model:
    convert_to_half(model, HALVES[kind], keep={"wo"} if kind == "float16" else ())
    return model


def run(model: ir.Model, feed: dict[str, Any]) -> dict[str, Any]:
    """Outputs by name, floating ones as float32."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    given = {value.name: value.type for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(as_type(feed[name], kind)) for name, kind in given.items()}
    return {
        name: value.numpy().astype(np.float32)
        for name, value in zip(outputs, session.run_with_ort_values(outputs, values), strict=True)
    }


def test_what_overflows_float16_is_infinite_on_the_cpu_too() -> None:
    """ONNX Runtime leaves out roundings of its own accord; those of `emulate_half` stay."""
    text = '<ir_version: 10, opset_import: ["" : 23]> g (float[n, 4] x) => (float[n, 4] y) { t = MatMul(x, w) y = Relu(t) }'
    parsed = onnx.parser.parse_model(text)
    parsed.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    model = half(ir.from_proto(parsed), "float16")
    emulate_half(model)
    (got,) = run(model, {"x": [[1e6, 1.0001, 0, 0]]}).values()
    assert not np.isfinite(got).all()
    model = half(ir.from_proto(parsed), "bfloat16")
    emulate_half(model)
    (got,) = run(model, {"x": [[1e6, 1.0001, 0, 0]]}).values()
    assert got[0, :2].tolist() == [999424.0, 1.0]


def as_type(value: Any, kind: str) -> Any:
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    return np.ascontiguousarray(np.asarray(value).astype(types[kind]))


def feeds_of(pair: LoadedPair, ids: SpecialIds, case: ReferenceBatch) -> dict[GraphName, dict[str, Any]]:
    """What each graph is given of a case: padded prompts, and the decoder's first call."""
    given, _ = conditioning(pair.reference, ids, case)
    prompt = {"input_ids": case.input_ids, "attention_mask": case.attention_mask, "hidden_states": case.hidden_states}
    shape = pair.reference.shape
    _, feed = next(feeds(shape, ids, case, given, in_turn(len(case.generated), (case.generated.shape[1],))))
    cache = {name: array / 100 for name, array in empty_cache(shape, case, given).items()}
    return {"encoder": prompt, "projector": prompt, "decoder": feed | cache}


@pytest.mark.parametrize(
    ("slm_type", "kind"),
    tiered(product(["t5", "llama", "gpt2"], HALVES), slow=[("t5", "float16"), ("llama", "bfloat16")]),
)
def test_a_pair_in_half_computes_what_it_does_in_float32(
    slm_type: str, kind: str, pairs: Callable[[str], LoadedPair], exported: Exported
) -> None:
    pair = pairs(slm_type)
    ids = special_ids(pair.reference, pair.llm_tokenizer)
    case = next(case for case in reference_batches(pair, ids) if len(case.input_ids) == 5)
    assert (case.attention_mask == 0).any(), "padding must count for nothing"
    for name, feed in feeds_of(pair, ids, case).items():
        narrow = half(exported(slm_type, name), kind)
        emulate_half(narrow)
        expected, got = run(exported(slm_type, name), feed), run(narrow, feed)
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            assert np.isfinite(got[key]).all(), f"{name}, {key}"
            error = np.sqrt(np.square(got[key] - value).mean()) / np.sqrt(np.square(value).mean())
            assert error <= TOLERANCE[kind], f"{name}, {key}: {error:.1e}"
            assert error > 0, "computed in float32 all the same"


@pytest.mark.parametrize("slm_type", ["t5", "llama"])
def test_the_cache_is_in_half_and_everything_else_that_crosses_a_graph_is_not(
    slm_type: str, exported: Exported
) -> None:
    for name in GRAPHS:
        before, model = exported(slm_type, name), half(exported(slm_type, name), "float16")
        assert [value.name for value in model.graph.outputs] == [value.name for value in before.graph.outputs]
        for value in (*model.graph.inputs, *model.graph.outputs):
            cached = str(value.name).startswith(("past_key_values.", "present."))
            assert value.dtype == (ir.DataType.FLOAT16 if cached else value.dtype)
            assert cached or value.dtype in (ir.DataType.FLOAT, ir.DataType.INT64)


def test_weights_are_stored_once_and_in_half_but_for_those_that_are_kept(exported: Exported) -> None:
    narrow = half(exported("t5", "decoder"), "float16")
    kinds = {name: value.dtype for name, value in narrow.graph.initializers.items()}
    wide = {name for name, dtype in kinds.items() if dtype == ir.DataType.FLOAT and len(name.split(".")) > 2}
    assert {name for name in wide if name.endswith(".wo.weight")}, "T5's wo overflows float16"
    assert all(name.endswith((".wo.weight", "layer_norm.weight", ".lifted_tensor_0")) for name in wide), wide
    # The table is looked up and multiplied with.
    assert [name for name in kinds if "lm_head" in name] == ["slm.lm_head.weight_float16"]
    assert not [name for name, dtype in kinds.items() if name.endswith("wo.weight") and dtype != ir.DataType.FLOAT]


@pytest.mark.parametrize("kind", HALVES)
def test_a_row_whose_keys_are_all_hidden_is_finite_when_a_score_is_added(kind: str) -> None:
    numpy_type: Any = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[kind]
    lowest, hidden = np.finfo(np.float32).min, np.array(mask_value(HALVES[kind]), numpy_type)
    with np.errstate(over="ignore"):
        assert np.isinf(np.array(lowest).astype(numpy_type)), "what float32 hides with would be infinite"
    scores = np.array([-500, 0, 500], numpy_type)
    assert np.isfinite(hidden + scores).all()
    # Beside a key that is seen, a hidden one counts for nothing.
    assert (np.exp((hidden + scores).astype(np.float32) + 500) == 0).all()
