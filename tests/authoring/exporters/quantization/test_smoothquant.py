"""Columns smoothed between norms and the layers that read them: the same graph, rounded with less harm."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from llm2slm_export.authoring.exporters.quantization.calibration import second_moments
from llm2slm_export.authoring.exporters.quantization.smoothquant import smooth
from llm2slm_export.authoring.exporters.quantization.weight_only import quantize

WIDTH = 128
NORMS = {
    "RMSNormalization<axis = -1>": ("x, g", "float[2,3,128] x"),
    "LayerNormalization<axis = -1>": ("x, g, b", "float[2,3,128] x"),
    "com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.00001>": ("x, r, g", "float[2,3,128] x, float[2,3,128] r"),
    "com.microsoft.SkipLayerNormalization<epsilon = 0.00001>": ("x, r, g, b", "float[2,3,128] x, float[2,3,128] r"),
}  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(norm: str, *, scaled: bool, rows: bool) -> ir.Model:
    """A norm whose weight is far from even, and two layers that read it."""
    inputs, given = NORMS[norm]
    read, lines = ("n", [f"n = {norm}({inputs})"])
    if scaled:
        lines.append("m = Mul(n, half)")
        read = "m"
    for name in ("p", "q"):
        weight = f"w_{name}"
        if rows:
            lines.append(f"t_{name} = Transpose<perm = [1, 0]>(w_{name})")
            weight = f"t_{name}"
        lines.append(f"{name} = MatMul({read}, {weight})")
    text = f"({given}) => (float[2,3,40] p, float[2,3,40] q) {{ {' '.join(lines)} }}"
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> g {text}')
    weights = {
        "g": np.exp(2 * draw(WIDTH)), "b": draw(WIDTH, seed=1), "half": np.array(0.5, np.float32),
        **{f"w_{name}": draw(*((40, WIDTH) if rows else (WIDTH, 40)), seed=seed) for seed, name in enumerate("pq", 2)},
    }  # fmt: skip
    for name, value in weights.items():
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float32), name))
    return ir.from_proto(parsed)


def run(changed: ir.Model) -> list[Any]:
    session = onnxruntime.InferenceSession(ir.to_proto(changed).SerializeToString())
    feed = {tensor.name: draw(2, 3, WIDTH, seed=9 + i) for i, tensor in enumerate(session.get_inputs())}
    outputs: list[Any] = session.run(None, feed)
    return outputs


def calls(count: int = 8) -> list[Any]:
    return [({"x": draw(2, 3, WIDTH, seed=20 + i), "r": draw(2, 3, WIDTH, seed=60 + i)}, {}) for i in range(count)]


@pytest.mark.parametrize("rows", [False, True], ids=["in-out", "out-in"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_graph_computes_the_same_and_is_rounded_with_less_harm(norm: str, scaled: bool, rows: bool) -> None:
    expected = run(model(norm, scaled=scaled, rows=rows))
    smoothed = model(norm, scaled=scaled, rows=rows)
    moments = second_moments(smoothed, calls())
    after = smooth(smoothed, moments)
    for one, other in zip(run(smoothed), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())
    # What it says the layers are given now is what they are given.
    (name,) = moments
    np.testing.assert_allclose(second_moments(smoothed, calls())[name], after[name], rtol=1e-3, atol=1e-3)
    plain = model(norm, scaled=scaled, rows=rows)
    quantize(plain, 8)
    quantize(smoothed, 8)

    def error(got: list[Any]) -> float:
        return float(np.mean([np.square(g - e).mean() for g, e in zip(got, expected, strict=True)]))

    assert error(run(smoothed)) < 0.5 * error(run(plain))


BRANCHES = {
    "gated": ("ab = MatMul(x, w_in)", "a, b = Split<axis = -1>(ab, halves)", "s = Sigmoid(a)", "h = Mul(s, b)"),
    "gated, the other way round": ("ab = MatMul(x, w_in)", "a, b = Split<axis = -1>(ab, halves)", "s = Sigmoid(b)", "h = Mul(a, s)"),
    "gated, two layers": ("a = MatMul(x, w_in)", "p = MatMul(x, w_up)", "b = Add(p, c)", "s = Sigmoid(a)", "h = Mul(s, b)"),
    "ReLU": ("a = MatMul(x, w_in)", "b = Add(a, c)", "h = Relu(b)"),
}  # fmt: skip
UNEVEN = np.exp(1.5 * draw(WIDTH, seed=5))


def feed_forward(lines: tuple[str, ...]) -> ir.Model:
    """A feed-forward layer whose inner columns are far from even, before a layer that reads them."""
    text = f"(float[2,3,40] x) => (float[2,3,16] y) {{ {' '.join(lines)} y = MatMul(h, w_out) }}"
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> g {text}')
    split = "Split" in text
    inner = np.concatenate([draw(40, WIDTH, seed=1)] * 2, axis=1) if split else draw(40, WIDTH, seed=1)
    uneven = np.concatenate([UNEVEN, UNEVEN]) if split else UNEVEN
    weights = {
        "w_in": inner * (uneven if split or "Relu" in text else 1), "w_up": draw(40, WIDTH, seed=2) * UNEVEN,
        "c": 0.1 * draw(WIDTH, seed=3) * UNEVEN, "w_out": draw(WIDTH, 16, seed=4),
    }  # fmt: skip
    for name, value in weights.items():
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float32), name))
    parsed.graph.initializer.append(onnx.numpy_helper.from_array(np.array([WIDTH, WIDTH]), "halves"))
    return ir.from_proto(parsed)


@pytest.mark.parametrize("lines", BRANCHES.values(), ids=list(BRANCHES))
def test_inner_columns_of_a_feed_forward_layer_are_smoothed(lines: tuple[str, ...]) -> None:
    def given(count: int) -> list[Any]:
        return [({"x": draw(2, 3, 40, seed=20 + i)}, {}) for i in range(count)]

    def run(changed: ir.Model) -> Any:
        (output,) = onnxruntime.InferenceSession(ir.to_proto(changed).SerializeToString()).run(
            None, {"x": draw(2, 3, 40, seed=9)}
        )
        return output

    expected, smoothed = run(feed_forward(lines)), feed_forward(lines)
    moments = second_moments(smoothed, given(8))
    after = smooth(smoothed, moments)
    np.testing.assert_allclose(run(smoothed), expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(second_moments(smoothed, given(8))["h"], after["h"], rtol=1e-3, atol=1e-3)
    spread = [np.log(np.diag(known["h"])).std() for known in (moments, after)]
    assert spread[1] < 0.7 * spread[0]


@pytest.mark.parametrize(
    "lines",
    [
        ("a = MatMul(x, w_in)", "h = Gelu(a)"),
        ("a = MatMul(x, w_in)", "s = Sigmoid(a)", "h = Mul(s, a)"),
        ("a = MatMul(x, w_in)", "b = Relu(a)", "n = Neg(b)", "h = Add(b, n)"),
    ],
    ids=["GELU", "SiLU", "read twice"],
)
def test_what_is_not_proportional_stays(lines: tuple[str, ...]) -> None:
    graph = feed_forward(lines)
    moments = second_moments(graph, [({"x": draw(2, 3, 40)}, {})])
    after = smooth(graph, moments)
    np.testing.assert_array_equal(after["h"], moments["h"])


def test_what_something_else_reads_stays() -> None:
    text = """(float[2,3,128] x) => (float[2,3,40] p, float[2,3,128] z) {
        n = RMSNormalization<axis = -1>(x, g)
        p = MatMul(n, w)
        z = Sub(n, x)
    }"""
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> g {text}')
    for name, value in {"g": np.exp(draw(WIDTH)), "w": draw(WIDTH, 40)}.items():
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    graph = ir.from_proto(parsed)
    before = ir.to_proto(graph).SerializeToString()
    smooth(graph, second_moments(graph, calls()))
    assert ir.to_proto(graph).SerializeToString() == before


def test_a_column_that_is_always_zero_does_no_harm() -> None:
    smoothed = model("RMSNormalization<axis = -1>", scaled=False, rows=False)
    weight = smoothed.graph.initializers["g"]
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array[5] = 0
    weight.const_value = ir.tensor(array, name="g")
    expected = run(smoothed)
    smooth(smoothed, second_moments(smoothed, calls()))
    for one, other in zip(run(smoothed), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


def test_a_norms_new_weight_takes_no_other_values_name() -> None:
    changed = model("LayerNormalization<axis = -1>", scaled=False, rows=False)
    # As the exporter names what several norms give.
    for node in changed.graph:
        if node.op_type == "MatMul" and node.outputs[0].name == "p":
            twin = ir.node("Relu", [node.outputs[0]])
            twin.outputs[0].name = "n_1"
            twin.outputs[0].shape, twin.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
            changed.graph.append(twin)
    expected = run(changed)
    smooth(changed, second_moments(changed, calls()))
    read = ir.from_proto(ir.to_proto(changed))
    for one, other in zip(run(read), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())
