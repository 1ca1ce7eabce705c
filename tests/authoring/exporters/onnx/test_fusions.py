"""Fused attention and the passes: fewer nodes, the same numbers."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from llm2slm_export.authoring.exporters.onnx import fusions
from llm2slm_export.authoring.exporters.onnx.export import export_graph, transpose_weights
from llm2slm_export.authoring.exporters.quantization.weight_only import quantize
from llm2slm_export.authoring.graphs.attention import FusedAttention, _looked_up_bias
from llm2slm_export.authoring.graphs.factory import make_graph
from llm2slm_export.authoring.models.loading import load_full
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.contract import GRAPHS
from llm2slm_export.errors import CompositionError
from tests.support.tiers import tiered
from tests.support.tiny_models import SLM_CONFIGS, SaveModel

# Of a decoder of two layers, and how many nodes it may have in all. T5: a norm, the projection of query, key and value,
# their Split, two TensorScatter, Attention, its output; the same for the cross-attention, with its five nodes;
# feed-forward. What is left over moves heads first and back, and makes masks and position biases.
_FUSED = {"TensorScatter": 4, "Softmax": 0, "Gemm": 0}
DECODERS = {
    "t5": (_FUSED | {"Attention": 4, "MatMul": 13, "Split": 2, "SkipSimplifiedLayerNormalization": 6}, 75),
    "llama": (_FUSED | {"Attention": 2, "MatMul": 9, "Split": 4, "SkipSimplifiedLayerNormalization": 4}, 84),
    "gpt2": (_FUSED | {"Attention": 2, "MatMul": 9, "Split": 2, "SkipLayerNormalization": 5}, 88),
}


@pytest.mark.parametrize("slm_type", tiered(DECODERS.keys(), fast=["t5"], slow=["llama", "gpt2"]))
def test_a_decoder_is_fused(slm_type: str, save_composition: Callable[..., Path]) -> None:
    expected, most = DECODERS[slm_type]
    reference = load_composition(save_composition(slm_type)).reference
    model = export_graph(make_graph("decoder", reference))
    fusions.require_fused_attention(model, reference.shape)
    transpose_weights(model)
    counts = Counter(node.op_type for node in model.graph)
    assert {op: counts[op] for op in expected} == expected
    assert sum(counts.values()) <= most, counts
    # Each product is one node at int8 too, its bias in it.
    quantize(model, 8)
    left = Counter(node.op_type for node in model.graph)
    assert left["MatMulNBits"] + left["MatMul"] == expected["MatMul"]


@pytest.mark.slow
def test_an_encoder_keeps_its_layers(save_composition: Callable[..., Path]) -> None:
    # OpenVINO multiplies and activates in one operator what a Split would come between
    # (docs/notebook/encoder-runtimes.md).
    model = export_graph(make_graph("encoder", load_composition(save_composition("t5")).reference))
    assert not [node for node in model.graph if node.op_type == "Split"]


@pytest.mark.nightly
def test_outputs_keep_the_contracts_names_whatever_is_fused_behind_them(save_composition: Callable[..., Path]) -> None:
    # Keys and values of a single layer are merged into one product, and split by heads.
    composition = save_composition("t5", fields=SLM_CONFIGS["t5"] | {"num_layers": 1, "num_decoder_layers": 1})
    reference = load_composition(composition).reference
    for name in GRAPHS:
        graph = make_graph(name, reference)
        model = export_graph(graph)
        assert [value.name for value in model.graph.outputs] == graph.spec.output_names
        names = [out.name for node in model.graph for out in node.outputs if out.name]
        assert len(set(names)) == len(names)


@pytest.mark.slow
def test_attention_that_is_not_fused_is_refused(save_composition: Callable[..., Path]) -> None:
    reference = load_composition(save_composition("llama")).reference
    encoder = export_graph(make_graph("encoder", reference))
    with pytest.raises(CompositionError, match="was not exported as one operator per layer") as error:
        fusions.require_fused_attention(encoder, reference.shape)
    assert error.value.evidence[:2] == ("Attention: expected 2, found 0", "Softmax: expected 0, found 2")


def test_a_position_bias_looked_up_by_distance_is_t5s_own(save_model: SaveModel) -> None:
    slm: Any = load_full(str(save_model(SLM_CONFIGS["t5"])))
    module = slm.decoder.block[0].layer[0].SelfAttention
    most = module.relative_attention_max_distance
    assert most == 128
    (table,) = FusedAttention(slm)._bias_tables.values()
    for new, past in ((1, 0), (1, 127), (1, 128), (1, 129), (5, 0), (40, 300)):
        own = module.compute_bias(new, past + new, past_seen_tokens=past)
        looked_up = _looked_up_bias(table, new, past + new, torch.tensor([[past]]))
        seen = torch.ones(new, past + new, dtype=torch.bool).tril(past)
        assert torch.equal(looked_up[:, :, seen], own[:, :, seen])
        assert (looked_up[:, :, ~seen] == torch.finfo(torch.float32).min).all()


def test_a_model_is_as_it_was_after_its_export(save_composition: Callable[..., Path]) -> None:
    reference = load_composition(save_composition("t5")).reference
    slm: Any = reference.slm
    ids = torch.arange(6)[None]
    before = slm(input_ids=ids, decoder_input_ids=ids).logits
    export_graph(make_graph("decoder", reference))
    assert slm.config._attn_implementation == "eager"
    assert torch.equal(slm(input_ids=ids, decoder_input_ids=ids).logits, before)


def _model(text: str, **weights: Any) -> ir.Model:
    """A model in ONNX's text form; `weights` are its initializers, with shapes that are known throughout."""
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> g {text}')
    for name, value in weights.items():
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(parsed, strict_mode=True, data_prop=True))


def _same_after(change: Callable[[ir.Model], None], model: ir.Model, **feeds: Any) -> Counter[str]:
    """The operators after a change, which must not change what the model computes."""

    def run() -> list[Any]:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto)
        return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds)

    before = run()
    change(model)
    model.opset_imports[fusions.DOMAIN] = 1
    for one, other in zip(before, run(), strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()
    return Counter(node.op_type for node in model.graph)


def _draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_gemm_between_reshapes_is_a_product_and_a_sum(rows: int) -> None:
    model = _model(
        f"""(float[2,3,4] x) => (float[2,3,5] y) {{
            flat = Reshape(x, to_matrix)
            product = Gemm<transB = {rows}>(flat, w, b)
            y = Reshape(product, back)
        }}""",
        w=_draw(5, 4) if rows else _draw(4, 5), b=_draw(5), to_matrix=np.array([-1, 4]), back=np.array([2, 3, 5]),
    )  # fmt: skip
    left = _same_after(fusions.gemm_to_matmul, model, x=_draw(2, 3, 4))
    assert left == {"MatMul": 1, "Add": 1} | ({"Transpose": 1} if rows else {})


def test_a_gemm_of_heads_is_a_product_of_what_they_join_to() -> None:
    model = _model(
        """(float[2,3,2,4] x) => (float[2,3,5] y) {
            flat = Reshape(x, to_matrix)
            product = Gemm(flat, w, b)
            y = Reshape(product, back)
        }""",
        w=_draw(8, 5), b=_draw(5), to_matrix=np.array([-1, 8]), back=np.array([2, 3, 5]),
    )  # fmt: skip
    assert _same_after(fusions.gemm_to_matmul, model, x=_draw(2, 3, 2, 4)) == {"Reshape": 1, "MatMul": 1, "Add": 1}


def test_a_gemm_with_a_factor_stays() -> None:
    model = _model(
        """(float[2,3,4] x) => (float[2,3,5] y) {
            flat = Reshape(x, to_matrix)
            product = Gemm<alpha = 0.5>(flat, w)
            y = Reshape(product, back)
        }""",
        w=_draw(4, 5), to_matrix=np.array([-1, 4]), back=np.array([2, 3, 5]),
    )  # fmt: skip
    assert _same_after(fusions.gemm_to_matmul, model, x=_draw(2, 3, 4))["Gemm"] == 1


@pytest.mark.parametrize("kv_heads", [3, 1])
def test_heads_are_split_once(kv_heads: int) -> None:
    model = _model(
        """(float[2,3,W] x) => (float[2,3,3,8] q, float[2,K,3,8] k, float[2,K,3,8] v) {
            a, b, c = Split<axis = -1>(x, widths)
            qs = Reshape(a, heads_q)
            q = Transpose<perm = [0, 2, 1, 3]>(qs)
            ks = Reshape(b, heads_kv)
            k = Transpose<perm = [0, 2, 1, 3]>(ks)
            vs = Reshape(c, heads_kv)
            v = Transpose<perm = [0, 2, 1, 3]>(vs)
        }""".replace("W", str(24 + 16 * kv_heads)).replace("K", str(kv_heads)),
        widths=np.array([24, 8 * kv_heads, 8 * kv_heads]),
        heads_q=np.array([2, 3, 3, 8]), heads_kv=np.array([2, 3, kv_heads, 8]),
    )  # fmt: skip
    left = _same_after(fusions.split_by_heads, model, x=_draw(2, 3, 24 + 16 * kv_heads))
    assert left == {"Reshape": 1, "Transpose": 1, "Split": 1}


@pytest.mark.parametrize(
    ("last", "widths", "shapes"),
    [
        ("v = Transpose<perm = [0, 2, 3, 1]>(vs)", [8, 8], [2, 3, 2, 4]),  # not to heads first
        ("v = Transpose<perm = [0, 2, 1, 3]>(vs)", [8, 6], [2, 3, 2, 3]),  # heads of another width
    ],
)
def test_parts_that_are_not_alike_are_split_as_they_were(last: str, widths: list[int], shapes: list[int]) -> None:
    out = "2,2,4,3" if "[0, 2, 3, 1]" in last else f"2,2,3,{shapes[3]}"
    model = _model(
        f"""(float[2,3,{sum(widths)}] x) => (float[2,2,3,4] q, float[{out}] v) {{
            a, b = Split<axis = -1>(x, widths)
            qs = Reshape(a, heads_q)
            q = Transpose<perm = [0, 2, 1, 3]>(qs)
            vs = Reshape(b, heads_v)
            {last}
        }}""",
        widths=np.array(widths), heads_q=np.array([2, 3, 2, 4]), heads_v=np.array(shapes),
    )  # fmt: skip
    left = _same_after(fusions.split_by_heads, model, x=_draw(2, 3, sum(widths)))
    assert left == {"Split": 1, "Reshape": 2, "Transpose": 2}


@pytest.mark.parametrize("rows", [False, True], ids=["in-out", "out-in"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_projections_of_one_input_are_one_product(rows: bool, bias: bool) -> None:
    widths = {"q": 6, "k": 4, "v": 4}
    lines, weights = [], {}
    for name, width in widths.items():
        weights[f"w_{name}"] = _draw(width, 5, seed=width) if rows else _draw(5, width, seed=width)
        weight = f"w_{name}"
        if rows:
            lines.append(f"t_{name} = Transpose<perm = [1, 0]>(w_{name})")
            weight = f"t_{name}"
        lines.append(f"{f'p_{name}' if bias else name} = MatMul(x, {weight})")
        if bias:
            weights[f"b_{name}"] = _draw(width, seed=7)
            lines.append(f"{name} = Add(b_{name}, p_{name})")
    outputs = ", ".join(f"float[2,3,{width}] {name}" for name, width in widths.items())
    model = _model(f"(float[2,3,5] x) => ({outputs}) {{ {' '.join(lines)} }}", **weights)
    left = _same_after(fusions.merge_projections, model, x=_draw(2, 3, 5))
    assert left == {"MatMul": 1, "Split": 1} | ({"Transpose": 1} if rows else {}) | ({"Add": 1} if bias else {})
    assert len(model.graph.initializers) == (3 if bias else 2)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_how_many_projections_are_merged(count: int) -> None:
    lines = " ".join(f"y{i} = MatMul(x, w{i})" for i in range(count))
    outputs = ", ".join(f"float[2,4] y{i}" for i in range(count))
    model = _model(
        f"(float[2,5] x) => ({outputs}) {{ {lines} }}", **{f"w{i}": _draw(5, 4, seed=i) for i in range(count)}
    )
    left = _same_after(fusions.merge_projections, model, x=_draw(2, 5))
    assert left["MatMul"] == (1 if 1 < count < 4 else count)


def test_projections_of_a_projection_are_merged_too() -> None:
    model = _model(
        """(float[2,5] x) => (float[2,3] c, float[2,3] d, float[2,4] b) {
            a = MatMul(x, w_a)
            b = MatMul(x, w_b)
            c = MatMul(a, w_c)
            d = MatMul(a, w_d)
        }""",
        w_a=_draw(5, 4), w_b=_draw(5, 4, seed=1), w_c=_draw(4, 3), w_d=_draw(4, 3, seed=1),
    )  # fmt: skip
    assert _same_after(fusions.merge_projections, model, x=_draw(2, 5)) == {"MatMul": 2, "Split": 2}


def test_a_weight_that_something_else_reads_is_not_merged() -> None:
    model = _model(
        """(float[2,5] x, int64[3] ids) => (float[2,4] one, float[2,4] other, float[3,4] rows) {
            one = MatMul(x, w)
            other = MatMul(x, v)
            rows = Gather(w, ids)
        }""",
        w=_draw(5, 4), v=_draw(5, 4, seed=1),
    )  # fmt: skip
    left = _same_after(fusions.merge_projections, model, x=_draw(2, 5), ids=np.array([0, 4, 2]))
    assert left == {"MatMul": 2, "Gather": 1}


@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization"])
def test_a_residual_sum_and_its_norm_are_one_node(norm: str) -> None:
    bias = ", b" if norm == "LayerNormalization" else ""
    model = _model(
        f"""(float[2,3,8] x, float[2,3,8] r) => (float[2,3,8] y, float[2,3,8] z) {{
            sum = Add(x, r)
            y = {norm}<axis = -1, epsilon = 0.001>(sum, w{bias})
            z = Sub(sum, r)
        }}""",
        w=_draw(8), b=_draw(8, seed=1),
    )  # fmt: skip
    left = _same_after(fusions.skip_norms, model, x=_draw(2, 3, 8), r=_draw(2, 3, 8, seed=2))
    assert left == {fusions._SKIP_NORMS[norm]: 1, "Sub": 1}


def test_a_sum_that_broadcasts_keeps_its_norm() -> None:
    model = _model(
        """(float[2,3,8] x, float[1,3,8] r) => (float[2,3,8] y) {
            sum = Add(x, r)
            y = RMSNormalization<axis = -1>(sum, w)
        }""",
        w=_draw(8),
    )  # fmt: skip
    left = _same_after(fusions.skip_norms, model, x=_draw(2, 3, 8), r=_draw(1, 3, 8))
    assert left == {"Add": 1, "RMSNormalization": 1}
