"""Encoders of eight bits on both sides of their products: what is rounded, what is not, and what is left of the values."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import llm2slm_export
from llm2slm_export.authoring import build as build_module
from llm2slm_export.authoring.build import build
from llm2slm_export.authoring.build_options import BuildOptions
from llm2slm_export.authoring.exporters.quantization.calibration import ActivationRange, input_ranges, second_moments
from llm2slm_export.authoring.exporters.quantization.smoothquant import smooth
from llm2slm_export.authoring.exporters.quantization.static_int8 import quantize_static_int8, rounding_error
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.authoring.parity.verify import verify
from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.bundle.manifest import Manifest
from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.inference.runtime import openvino
from llm2slm_export.inference.runtime.openvino import OpenVinoGraph, _computed
from tests.support.tiny_models import LLM_CONFIG

WIDTH = 96


def saturates() -> bool:
    """Whether ONNX Runtime's product of u8 and s8 loses what does not fit into sixteen bits, as on x86 processors without VNNI."""
    text = "(uint8[m,k] a, int8[k,n] b) => (int32[m,n] y) { y = MatMulInteger(a, b) }"
    product = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> g {text}')
    session = onnxruntime.InferenceSession(product.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 1), 127, np.int8)})
    return int(got[0, 0]) != 64 * 255 * 127


needs_exact_products = pytest.mark.skipif(
    saturates(), reason="8-bit products saturate: the processor has no VNNI, for which encoder=w8a8 is made"
)
PROMPTS = (
    "How are you?",
    "The quick brown fox jumps",
    "a",
    "To be or not to be, that is the question",
    "one two three",
)


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(*, rows: bool = False, relu: bool = False) -> ir.Model:
    """Two layers that read one input, and a third that reads the square of one of them: few numbers of it are large."""
    lines = ["h = Identity(x)", "a = MatMul(h, w_a)", "b0 = MatMul(h, w_b)", "b = Add(b0, bias)"]
    lines += ["s0 = Mul(a, a)", "s1 = Mul(s0, s0)", "s = Mul(s1, s1)", "c = MatMul(s, w_c)"]
    if relu:
        lines[4:] = ["s = Relu(a)", "c = MatMul(s, w_c)"]
    if rows:
        lines = [line.replace("w_a", "t_a") for line in lines]
        lines.insert(0, "t_a = Transpose<perm = [1, 0]>(w_a)")
    text = f"(float[n,l,{WIDTH}] x) => (float[n,l,80] b, float[n,l,64] c) {{ {' '.join(lines)} }}"
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> g {text}')
    weights = {
        "w_a": draw(*((80, WIDTH) if rows else (WIDTH, 80)), seed=1), "w_b": draw(WIDTH, 80, seed=2),
        "bias": draw(80, seed=3), "w_c": draw(80, 64, seed=4),
    }  # fmt: skip
    for name, value in weights.items():
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return ir.from_proto(parsed)


def run(changed: ir.Model, x: Any) -> list[Any]:
    proto = ir.to_proto(changed)
    onnx.checker.check_model(proto)
    found: list[Any] = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})
    return found


def calls(count: int = 6) -> list[Any]:
    return [({"x": draw(2, 5, WIDTH, seed=20 + i)}, {}) for i in range(count)]


def rms(array: Any) -> float:
    return float(np.sqrt(np.square(array, dtype=np.float64).mean()))


@needs_exact_products
@pytest.mark.parametrize("rows", [False, True], ids=["in-out", "out-in"])
def test_layers_are_rounded_on_both_sides_and_what_would_lose_too_much_is_not(rows: bool) -> None:
    changed, x = model(rows=rows), draw(3, 4, WIDTH, seed=9)
    expected = run(model(rows=rows), x)
    ranges = input_ranges(changed, calls())
    assert rounding_error(ranges["h"]) < 0.02 < 0.05 < rounding_error(ranges["s"])
    quantize_static_int8(changed, ranges)
    counts = Counter(node.op_type for node in changed.graph)
    # Of the input once, for both layers, and of each one's weight.
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"], counts["MatMul"]) == (1, 3, 3)
    stored = {name: value.dtype for name, value in changed.graph.initializers.items() if "w_" in name and ".q8" in name}
    assert stored == {"w_a.q8": ir.DataType.INT8, "w_b.q8": ir.DataType.INT8}
    assert "w_c" in changed.graph.initializers
    got = run(changed, x)
    assert rms(got[0] - expected[0]) < 0.02 * rms(expected[0])


@needs_exact_products
def test_zero_stays_zero_and_half_the_steps_are_not_lost_to_what_never_comes() -> None:
    changed = model(relu=True)
    ranges = input_ranges(changed, calls())
    assert ranges["s"].lowest == 0.0
    quantize_static_int8(changed, ranges)
    zero = changed.graph.initializers["s.zero"].const_value
    assert zero is not None
    assert zero.numpy() == 0
    scale = changed.graph.initializers["s.scale"].const_value
    assert scale is not None
    np.testing.assert_allclose(scale.numpy(), ranges["s"].highest / 255, rtol=1e-6)
    x = draw(3, 4, WIDTH, seed=9)
    for got, expected in zip(run(changed, x), run(model(relu=True), x), strict=True):
        assert rms(got - expected) < 0.03 * rms(expected)


def test_what_is_only_padding_counts_for_nothing() -> None:
    x = draw(2, 5, WIDTH)
    x[1, 3:] = 1e6
    mask = np.ones((2, 5), bool)
    mask[1, 3:] = False
    known = input_ranges(model(), [({"x": x}, {5: mask})])["h"]
    assert known.highest < 10
    assert known.count == 8 * WIDTH
    np.testing.assert_allclose(known.rms, rms(x[mask]), rtol=1e-6)


def test_nothing_given_is_rounded_without_a_division_by_zero() -> None:
    changed = model()
    quantize_static_int8(changed, {"h": ActivationRange(count=10)})
    assert np.isfinite(run(changed, draw(1, 2, WIDTH))[0]).all()


def test_diagonals_even_out_as_the_whole_does() -> None:
    whole, diagonal = (second_moments(model(), calls(), diagonal=alone) for alone in (False, True))
    for name, moments in whole.items():
        np.testing.assert_allclose(diagonal[name], np.diag(moments), rtol=1e-5)
    first, second = model(relu=True), model(relu=True)
    smoothed = smooth(first, second_moments(first, calls()))
    likewise = smooth(second, second_moments(second, calls(), diagonal=True))
    assert smoothed.keys() == likewise.keys()
    for name in smoothed:
        np.testing.assert_allclose(likewise[name], np.diag(smoothed[name]), rtol=1e-4)


@pytest.fixture(scope="module")
def built(save_composition: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A composition, and its bundle with an encoder of eight bits."""
    llm_config = LLM_CONFIG | {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128}
    composition, out = save_composition("t5", llm_config=llm_config), tmp_path_factory.mktemp("w8a8") / "bundle"
    build(load_composition(composition), out, BuildOptions({"encoder": "w8a8"}, calibration=PROMPTS))
    return composition, out


def graph_of(manifest: Manifest, directory: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(directory / manifest.graphs["encoder"].file).graph.node)


@needs_exact_products
def test_an_encoder_is_built_and_both_runtimes_compute_the_same(built: tuple[Path, Path]) -> None:
    composition, out = built
    manifest = read_manifest(out)
    counts = graph_of(manifest, out)
    assert counts["QuantizeLinear"] >= 4
    assert counts["GatherBlockQuantized"] == 1
    entry = manifest.graphs["encoder"]
    assert (entry.precision, entry.block_size) == ("w8a8", 128)
    rows = [row for row in manifest.parity.rows if row.graph == "encoder"]
    assert rows
    assert all(0 < row.value <= row.tolerance for row in rows)
    bundle = open_bundle(out)
    ids = np.arange(3, 15)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    session = onnxruntime.InferenceSession(bundle.path(entry.file))
    (expected,) = session.run(["hidden_states"], feeds)
    got = OpenVinoGraph(bundle, "encoder", threads=1)(feeds)["hidden_states"]
    assert rms(got - expected) < 0.02 * rms(expected)
    for runtime in ("onnxruntime", "openvino"):
        report = verify(out, composition, runtime=runtime)
        assert report is not None
        assert [row for row in report.rows if not row.passed] == []


@needs_exact_products
def test_no_responses_are_written_for_an_encoder(
    built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take longer than anything else, and an encoder does not see them."""
    monkeypatch.setattr(build_module, "gate_batches", None)  # not to be called
    out = tmp_path / "bundle"
    build(load_composition(built[0]), out, BuildOptions({"encoder": "w8a8"}, calibration=PROMPTS))
    encoder, known = (read_manifest(directory).files for directory in (out, built[1]))
    assert [f for f in encoder if f.path.startswith("encoder")] == [f for f in known if f.path.startswith("encoder")]


@needs_exact_products
def test_a_pair_of_it_writes(built: tuple[Path, Path]) -> None:
    with llm2slm_export.load(built[1]) as pair:
        assert all(g.token_ids for g in pair.generate(list(PROMPTS), max_new_tokens=6))


@needs_exact_products
@pytest.mark.parametrize(
    ("precision", "blocks", "group"), [("int8", 64, 64), ("int8", None, 128), ("int4", None, 32), ("w8a8", 128, 128)]
)
def test_openvino_rounds_in_groups_no_larger_than_the_weights(
    built: tuple[Path, Path], precision: str, blocks: int | None, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = read_manifest(built[1]).graphs["encoder"].model_copy(update={"precision": precision, "block_size": blocks})
    monkeypatch.setattr(openvino, "instruction_sets", lambda: {"avx512_vnni", "avx512_bf16"})
    assert _computed(entry) == {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    # Or not at all, where the processor multiplies matrices in bf16.
    monkeypatch.setattr(openvino, "instruction_sets", lambda: {"avx512_vnni", "amx_bf16"})
    kept = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    whole = {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    assert _computed(entry) == (kept if precision == "w8a8" else whole)
