"""Four-bit weights: what is rounded to what, that ONNX Runtime reads it so, and that calibration makes outputs better."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper

from llm2slm_export.authoring.build import build
from llm2slm_export.authoring.build_options import BuildOptions
from llm2slm_export.authoring.exporters.onnx.export import export_graph
from llm2slm_export.authoring.exporters.quantization.calibration import second_moments
from llm2slm_export.authoring.exporters.quantization.gptq import quantize_int4
from llm2slm_export.authoring.exporters.quantization.weight_only import quantize
from llm2slm_export.authoring.graphs.factory import make_graph
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.authoring.parity.gate import Gate
from llm2slm_export.authoring.parity.reference_outputs import gate_batches, reference_batches, special_ids
from llm2slm_export.authoring.parity.teacher_forcing import whole_responses
from llm2slm_export.authoring.parity.verify import verify
from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.bundle.parity_report import ParityError
from llm2slm_export.contract import GRAPHS, WeightQuantization
from llm2slm_export.errors import CompositionError, UsageError
from tests.support.tiers import tiered

BLOCK = 32
GATE = tuple(f"Is it {hour} o'clock in {town}?" for hour in range(1, 6) for town in ("Rome", "Oslo", "Lima"))


def restored(q: Any, scales: Any, columns: int) -> Any:
    """[rows, columns] of what `quantize_int4` gave."""
    halves = np.stack([q & 15, q >> 4], axis=-1).reshape(*q.shape[:2], -1).astype(np.float32)
    return ((halves - 8) * scales[:, :, None]).reshape(len(q), -1)[:, :columns]


def inputs_that_go_together(columns: int, count: int = 2000) -> Any:
    """[count, columns]: a few directions and a little of everything, some columns far larger than others."""
    random = np.random.default_rng(1)
    few = random.standard_normal((count, 6)) @ random.standard_normal((6, columns))
    return (few + 0.3 * random.standard_normal((count, columns))) * np.exp(random.standard_normal(columns))


@pytest.mark.parametrize("columns", [32, 96, 40])
def test_without_calibration_no_weight_moves_further_than_its_scale(columns: int) -> None:
    weight = np.random.default_rng(0).standard_normal((7, columns)).astype(np.float32)
    weight[3] = 0
    q, scales = quantize_int4(weight, None, BLOCK)
    assert (q.dtype, q.shape, scales.shape) == (np.uint8, (7, -(-columns // BLOCK), 16), (7, -(-columns // BLOCK)))
    got = restored(q, scales, columns)
    step = np.abs(np.repeat(scales, BLOCK, axis=1)[:, :columns])
    # Half a step, but for the few that are cut so that the others' steps are smaller.
    error = np.abs(got - weight)
    assert (error <= step / 2 + 1e-6).mean() > 0.9
    assert (got[3] == 0).all()
    assert np.square(error).mean() < 0.02


@pytest.mark.parametrize("columns", [96, 40])
def test_calibrated_weights_give_better_outputs(columns: int) -> None:
    weight = np.random.default_rng(0).standard_normal((50, columns)).astype(np.float32)
    inputs = inputs_that_go_together(columns)
    fitted, held_out = inputs[:1500], inputs[1500:]

    def error(moments: Any) -> float:
        got = restored(*quantize_int4(weight, moments, BLOCK), columns)
        return float(np.square(held_out @ (got - weight).T).mean())

    assert error(fitted.T @ fitted) < 0.35 * error(None)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    inputs = inputs_that_go_together(64)
    inputs[:, 10:20] = 0
    q, scales = quantize_int4(weight, inputs.T @ inputs, BLOCK)
    assert np.isfinite(scales).all()
    error = inputs @ (restored(q, scales, 64) - weight).T
    assert np.square(error).mean() < 0.01 * np.square(inputs @ weight.T).mean()


@pytest.mark.parametrize("columns", [64, 40])
def test_onnx_runtime_reads_four_bits_as_they_are_meant(columns: int) -> None:
    block = 32 if columns == 64 else 16
    weight = np.random.default_rng(0).standard_normal((6, columns)).astype(np.float32)
    q, scales = quantize_int4(weight, None, block)
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", K=columns, N=6, bits=4, block_size=block,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, columns])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 6])],
        [onnx.numpy_helper.from_array(q, "q"), onnx.numpy_helper.from_array(scales, "s")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    x = np.random.default_rng(1).standard_normal((3, columns)).astype(np.float32)
    (got,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(got, x @ restored(q, scales, columns).T, atol=1e-4)


@pytest.mark.parametrize("slm_type", ["t5", "llama"])
def test_moments_are_of_what_the_layers_are_given_where_it_is_no_padding(
    slm_type: str, save_composition: Callable[..., Path]
) -> None:
    """The first linear layer of the decoder, as a hook on the unpatched SLM sees it, response by response."""
    pair = load_composition(save_composition(slm_type))
    reference, ids = pair.reference, special_ids(pair.reference, pair.llm_tokenizer)
    cases = gate_batches(pair, ids, ["How are you?", "Where is the station, please?", "Yes"])
    seen: list[torch.Tensor] = []
    slm: Any = reference.slm
    layer = slm.decoder.block[0].layer[0].SelfAttention.q if slm_type == "t5" else slm.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    expected = np.zeros((layer.in_features, layer.in_features))
    for case in cases:
        for row in range(len(case.prompts)):
            prompt, response = int(case.attention_mask[row].sum()), int(case.written[row].sum())
            with torch.no_grad():
                seen.clear()
                reference(
                    case.input_ids[row : row + 1, :prompt], case.attention_mask[row : row + 1, :prompt],
                    case.generated[row : row + 1, :response], case.hidden_states[row : row + 1, :prompt],
                )  # fmt: skip
            rows = seen[-1][0].numpy().astype(np.float64)
            expected += rows.T @ rows
    handle.remove()
    model = export_graph(make_graph("decoder", reference))
    merged = next(node for node in model.graph if node.op_type == "MatMul")
    moments = second_moments(model, whole_responses(reference, ids, cases))
    np.testing.assert_allclose(moments[str(merged.inputs[0].name)], expected, rtol=1e-3, atol=1e-3 * expected.max())


def test_the_output_head_and_tables_have_eight_bits(save_composition: Callable[..., Path]) -> None:
    for slm_type, fours in (("t5", 12), ("llama", 8)):
        pair = load_composition(save_composition(slm_type))
        model = export_graph(make_graph("decoder", pair.reference))
        quantize(model, 4)
        bits = [node.attributes["bits"].as_int() for node in model.graph if node.op_type == "MatMulNBits"]
        large = sum(node.op_type == "MatMul" for node in model.graph)  # those that are too small stay
        assert bits.count(8) == 1
        assert bits.count(4) == fours - large
        assert model.graph.outputs[0].producer().attributes["bits"].as_int() == 8


@pytest.mark.parametrize(
    ("slm_type", "block", "quantize_lm_head"),
    tiered(
        [(slm_type, *blocks) for slm_type in ("t5", "llama") for blocks in ((16, False), (None, True), (64, True))],
        slow=[("t5", 16, False)],
    ),
)
def test_blocks_and_the_output_layer_as_they_are_asked_for(
    save_composition: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slm_type: str,
    block: int | None,
    quantize_lm_head: bool,
) -> None:
    monkeypatch.setattr(
        "llm2slm_export.authoring.exporters.quantization.weight_only.MINIMUM_WEIGHTS", 256
    )  # the model is tiny
    out = tmp_path / "bundle"
    manifest = build(
        load_composition(save_composition(slm_type)), out,
        BuildOptions({"decoder": "int4"}, WeightQuantization(block, quantize_lm_head)),
    )  # fmt: skip
    entries = {name: (entry.block_size, entry.quantize_lm_head) for name, entry in read_manifest(out).graphs.items()}
    assert entries == {
        "encoder": (None, False), "projector": (None, False), "decoder": (block or 32, quantize_lm_head),
    }  # fmt: skip
    assert manifest.parity.passed
    nodes = onnx.load(out / "decoder.onnx", load_external_data=False).graph.node
    layers = [
        [get(node, name) for name in ("bits", "block_size", "K")] for node in nodes if node.op_type == "MatMulNBits"
    ]
    assert {bits for bits, _, _ in layers} == ({4} if quantize_lm_head else {4, 8})
    assert [size for bits, size, _ in layers if bits == 4] == [
        max(16, min(block or 32, columns & -columns)) for bits, _, columns in layers if bits == 4
    ]


def get(node: Any, name: str) -> int:
    return int(next(attribute.i for attribute in node.attribute if attribute.name == name))


def test_a_tied_table_of_four_bits_is_stored_once_and_close_to_what_it_was(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    inputs = inputs_that_go_together(64).astype(np.float32)
    text = """<ir_version: 10, opset_import: ["" : 23]> g (int64[1,n] ids, float[1,n,64] h) => (float[1,n,96] y, float[1,n,64] e)
        { e = Gather(w, ids)  t = Transpose<perm=[1, 0]>(w)  y = MatMul(h, t) }"""
    parsed = onnx.parser.parse_model(text)
    parsed.graph.initializer.append(onnx.numpy_helper.from_array(table, "w"))
    model = ir.from_proto(parsed)
    quantize(
        model, 4, weight_quantization=WeightQuantization(32, quantize_lm_head=True), moments={"h": inputs.T @ inputs}
    )
    stored = [value.const_value for value in model.graph.initializers.values() if value.dtype == ir.DataType.UINT8]
    assert [tensor.shape for tensor in stored if tensor is not None] == [(96, 32)]
    ir.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    got, rows = session.run(None, {"ids": np.arange(96)[None], "h": inputs[None, :96]})
    # Fitting it to the head's inputs moved weights by up to 1.6: a lookup reads all of a row.
    assert np.abs(rows[0] - table).max() < 0.4
    expected = inputs[:96] @ rows[0].T
    np.testing.assert_allclose(got[0], expected, atol=0.03 * np.abs(expected).max())


HEADS = {
    "plain": ["y = MatMul(h, w_head)"],
    "Granite": ["p = MatMul(h, w_head)", "y = Mul(p, c)"],
    "Gemma 2": ["p = MatMul(h, w_head)", "d = Div(p, c)", "t = Tanh(d)", "y = Mul(t, c)"],
}


@pytest.mark.parametrize("head", HEADS.values(), ids=list(HEADS))
def test_a_head_behind_a_factor_or_a_bound_has_eight_bits(head: list[str]) -> None:
    text = f"(float[1,1,64] x) => (float[1,1,96] y) {{ h = MatMul(x, w) {' '.join(head)} }}"
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> g {text}')
    weights = {"w": (64, 64), "w_head": (64, 96)}
    for name, shape in weights.items():
        value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    parsed.graph.initializer.append(onnx.numpy_helper.from_array(np.array(3.0, np.float32), "c"))
    model = ir.from_proto(parsed)
    quantize(model, 4)
    bits = [node.attributes["bits"].as_int() for node in model.graph if node.op_type == "MatMulNBits"]
    assert bits == [4, 8]


@pytest.mark.slow
def test_a_gate_is_in_the_manifest_and_can_be_missed(
    save_composition: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llm2slm_export.authoring.exporters.quantization.weight_only.MINIMUM_WEIGHTS", 256
    )  # the model is tiny
    composition = save_composition("llama")
    options: dict[str, Any] = {"precision": dict.fromkeys(GRAPHS, "int4"), "calibration": ("Go on.",)}
    build(load_composition(composition), tmp_path / "out", BuildOptions(gate=Gate(GATE, 1.0), **options))
    manifest = read_manifest(tmp_path / "out")
    assert {graph.precision for graph in manifest.graphs.values()} == {"int4"}
    rows = [row for row in manifest.parity.rows if row.of_gate]
    assert [(row.tensor, row.measure) for row in rows] == [
        ("next tokens", "share that differs"), ("next tokens", "KL divergence, nats"), ("responses", "share that differs"),
    ]  # fmt: skip
    assert all(row.case.startswith("gate, 15 of 15 prompts") for row in rows)
    share, divergence, responses = (row.value for row in rows)
    assert 0 < share < responses <= 1
    assert 0 < divergence < 1
    # The same figures from the composition and the bundle alone.
    report = verify(tmp_path / "out", composition, gate=Gate(GATE, 1.0))
    assert report is not None
    assert [row.value for row in report.rows if row.of_gate] == pytest.approx([share, divergence, responses])
    with pytest.raises(ParityError) as caught:
        build(load_composition(composition), tmp_path / "other", BuildOptions(gate=Gate(GATE, share / 2), **options))
    assert f"next tokens: share that differs {share:.2e}" in str(caught.value)
    assert "--max-differing" in caught.value.remedy
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_fp32_passes_a_gate_of_nothing(save_composition: Callable[..., Path], tmp_path: Path) -> None:
    manifest = build(load_composition(save_composition("t5")), tmp_path / "out", BuildOptions(gate=Gate(GATE)))
    assert [row.value for row in manifest.parity.rows if row.of_gate][::2] == [0, 0]


def test_prompts_are_fitted_to_or_held_out() -> None:
    with pytest.raises(UsageError, match=r"2 of the gate's prompts") as caught:
        BuildOptions({"decoder": "int4"}, gate=Gate(GATE), calibration=GATE[3:5])
    assert repr(GATE[3]) in caught.value.evidence


def test_prompts_too_long_for_the_pair_are_left_out(save_composition: Callable[..., Path]) -> None:
    pair = load_composition(save_composition("t5"))
    ids = special_ids(pair.reference, pair.llm_tokenizer)
    cases = gate_batches(pair, ids, ["Yes", "word " * 300])
    assert [case.prompts for case in cases] == [("Yes",)]
    with pytest.raises(CompositionError, match="None of the 1 prompts"):
        gate_batches(pair, ids, ["word " * 300])
    assert all(len(case.prompts) <= 5 for case in reference_batches(pair, ids))


def test_a_model_is_left_as_it_is(save_composition: Callable[..., Path]) -> None:
    pair = load_composition(save_composition("t5"))
    ids = special_ids(pair.reference, pair.llm_tokenizer)
    model = export_graph(make_graph("decoder", pair.reference))
    before = ir.to_proto(model).SerializeToString()
    second_moments(model, whole_responses(pair.reference, ids, gate_batches(pair, ids, ["Yes"])))
    assert ir.to_proto(model).SerializeToString() == before
