"""Engines: what they are made of, checked without a compiler; and, where TensorRT-RTX is installed, really compiled."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from typer.testing import CliRunner

from llm2slm_export import contract
from llm2slm_export.authoring.build import build
from llm2slm_export.authoring.build_engines import EngineChoice
from llm2slm_export.authoring.build_options import BuildOptions
from llm2slm_export.authoring.exporters.tensorrt import network
from llm2slm_export.authoring.exporters.tensorrt.builder import Compiler, load_tensorrt
from llm2slm_export.authoring.exporters.tensorrt.network import dequantize_weights, fix_axes
from llm2slm_export.authoring.exporters.tensorrt.profiles import (
    CALL_TOKENS,
    engine_limits,
    fixed_axes,
    profiles,
)
from llm2slm_export.authoring.graphs.graph import kept_in_float32
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.recipe import EngineSettings
from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.bundle.files import graph_digest
from llm2slm_export.bundle.manifest import Bounds, EngineLimits, EngineSet, Manifest
from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.bundle.parity_report import ParityError
from llm2slm_export.cli.app import app
from llm2slm_export.cli.export_options import EngineRequest
from llm2slm_export.contract import (
    DEFAULT_WEIGHT_QUANTIZATION,
    GRAPHS,
    EnginePrecision,
    GraphName,
    PairShape,
    WeightQuantization,
)
from llm2slm_export.errors import DeviceError, EngineError, MissingExtraError, UsageError
from tests.support.paths import DEMO_COMPOSITION
from tests.support.tiers import tiered

ENCODER_DECODER = PairShape(
    "encoder-decoder",
    "prefix",
    encoder_hidden_size=16,
    hidden_size=8,
    num_hidden_layers=1,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=32,
)
DECODER_ONLY = PairShape(
    "decoder-only",
    "add",
    encoder_hidden_size=16,
    hidden_size=8,
    num_hidden_layers=1,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=32,
)

with_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install 'llm2slm-export[tensorrt-rtx]'"
)


# --- limits and profiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [(), (16, 64)], ids=["one bucket", "buckets"])
@pytest.mark.parametrize("shape", [ENCODER_DECODER, DECODER_ONLY], ids=lambda shape: shape.slm_kind)
def test_profiles_cover_the_limits(shape: PairShape, buckets: tuple[int, ...]) -> None:
    limits = engine_limits(shape, batch=4, prompt=100, new=20, prompt_buckets=buckets)
    memory = 100 * shape.context_per_token
    assert limits.capacity == (20 if shape.slm_kind == "encoder-decoder" else 120)
    most: dict[str, int] = {
        "batch": 4,
        "prompt": 100,
        "context": memory,
        "embeds_length": memory,
        "capacity": limits.capacity,
    }
    for name, spec in contract.graph_specs(shape).items():
        made = profiles(name, shape, fixed(name, spec.inputs, limits), limits)
        count = len(buckets) + 1
        of_decoder = 2 * count if shape.slm_kind == "encoder-decoder" else count + 2
        assert len(made) == (of_decoder if name == "decoder" else count)
        for tensor in spec.inputs:
            for place, axis in enumerate(tensor.axes):
                bounds = [profile[tensor.name] for profile in made]
                assert all(b.minimum[place] <= b.optimum[place] <= b.maximum[place] for b in bounds)
                if axis in most:
                    assert max(b.maximum[place] for b in bounds) == most[str(axis)]
                if axis in ("prompt", "embeds_length"):
                    lows, highs = ({getattr(b, side)[place] for b in bounds} - {0} for side in ("minimum", "maximum"))
                    assert lows == {1} | {high + 1 for high in highs - {most[str(axis)]}}, (
                        "nothing is left between them"
                    )
        if name == "decoder":
            assert made[-1]["input_ids"].maximum[1] == 1, "a step has a profile of its own"
            for tensor in fixed(name, spec.inputs, limits):
                if tensor.name.startswith("past_key_values.") and ".encoder." not in tensor.name:
                    assert "capacity" not in tensor.axes, "TensorRT's cache has a fixed capacity"


def fixed(name: GraphName, inputs: Any, limits: EngineLimits) -> Any:
    sizes = fixed_axes(name, limits)
    return tuple(contract.TensorSpec(t.name, t.dtype, tuple(sizes.get(str(a), a) for a in t.axes)) for t in inputs)


def test_a_decoder_only_call_is_a_prompt_or_tokens() -> None:
    limits = engine_limits(DECODER_ONLY, batch=2, prompt=30, new=10)
    inputs = contract.decoder_spec(DECODER_ONLY).inputs[:4]
    prompt, several, one = profiles("decoder", DECODER_ONLY, inputs, limits)
    assert prompt["input_ids"] == Bounds(minimum=(1, 0), optimum=(1, 0), maximum=(2, 0))
    assert prompt["prompt_embeds"] == Bounds(minimum=(1, 1, 8), optimum=(1, 30, 8), maximum=(2, 30, 8))
    assert prompt["logits_to_keep"] == Bounds(minimum=(1, 1), optimum=(1, 1), maximum=(2, 1))
    assert several["input_ids"] == several["logits_to_keep"] == Bounds(minimum=(1, 2), optimum=(1, 8), maximum=(2, 16))
    assert one["input_ids"] == one["logits_to_keep"] == Bounds(minimum=(1, 1), optimum=(1, 1), maximum=(2, 1))
    assert several["prompt_embeds"].maximum == one["prompt_embeds"].maximum == (2, 0, 8)


@pytest.mark.parametrize(("new", "call_tokens", "most"), [(40, None, 16), (40, 4, 4), (10, None, 10), (1, None, 1)])
def test_an_encoder_decoder_call_is_one_token_or_several(new: int, call_tokens: int | None, most: int) -> None:
    limits = engine_limits(ENCODER_DECODER, batch=2, prompt=100, new=new, prompt_buckets=(16,))
    more = {} if call_tokens is None else {"call_tokens": call_tokens}
    made = profiles("decoder", ENCODER_DECODER, contract.decoder_spec(ENCODER_DECODER).inputs[:2], limits, **more)
    calls = [(p["input_ids"].minimum[1], p["input_ids"].maximum[1]) for p in made]
    assert calls == ([(2, most), (1, 1)] if most > 1 else [(1, 1)]) * 2, "for each bucket"


def test_a_cache_has_no_more_room_than_the_slm_has_positions() -> None:
    assert engine_limits(DECODER_ONLY, batch=1, prompt=100, new=50, positions=128).capacity == 128
    assert engine_limits(ENCODER_DECODER, batch=1, prompt=100, new=50).capacity == 50


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_of_engines_need_engines() -> None:
    with pytest.raises(UsageError, match="--engine-precision, --max-batch are options of engines"):
        EngineRequest("onnx", precision="fp16", max_batch=3).precisions()
    with pytest.raises(UsageError, match="there is no precision 'fp8'"):
        EngineRequest("tensorrt-rtx", precision="encoder=fp8").precisions()
    assert EngineRequest().precisions() == {}
    with pytest.raises(UsageError, match="--prompt-buckets 'short' cannot be read"):
        EngineRequest("tensorrt-rtx", prompt_buckets="short")._buckets()
    mixed = EngineRequest("tensorrt-rtx", precision="encoder=bf16,decoder=int4").precisions()
    assert mixed == {"encoder": "bf16", "projector": "fp16", "decoder": "int4"}


def test_a_recipe_says_what_the_command_does_not() -> None:
    recipe = EngineSettings(backend="tensorrt-rtx", precision={"encoder": "bf16"}, max_batch=2, prompt_buckets=(64,))
    assert EngineRequest(recipe=recipe).variant == "tensorrt-rtx"
    assert EngineRequest("onnx", recipe=recipe).variant is None
    assert EngineRequest("onnx", recipe=recipe).precisions() == {}
    asked = EngineRequest(precision="decoder=int4", max_new=9, compute_capability="8.6, 8.9", recipe=recipe)
    settings = asked._settings("tensorrt-rtx")
    assert settings.precision == {"encoder": "bf16", "projector": "fp16", "decoder": "int4"}
    assert (settings.max_batch, settings.max_prompt, settings.max_new) == (2, None, 9)
    assert (settings.prompt_buckets, settings.compute_capabilities) == ((64,), ("8.6", "8.9"))


def test_a_missing_variant_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError) as caught:
        load_tensorrt("tensorrt-rtx")
    assert "pip install 'llm2slm-export[tensorrt-rtx]'" in str(caught.value)


def test_a_variant_that_does_not_load_or_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    with pytest.raises(EngineError, match="does not load") as caught:
        load_tensorrt("tensorrt")
    assert "libnvinfer.so.10" in str(caught.value)
    (tmp_path / "tensorrt.py").write_text("__version__ = '10.13.3.9'")
    sys.modules.pop("tensorrt", None)
    with pytest.raises(EngineError, match=r"10\.13\.3\.9 is too old"):
        load_tensorrt("tensorrt")
    sys.modules.pop("tensorrt", None)


# --- the engine's graph ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "block"), [(8, 128), (4, 32)])
@pytest.mark.parametrize("rows", [False, True])
def test_dequantized_weights_are_the_bundles_own_numbers(bits: contract.Bits, block: int, rows: bool) -> None:
    rng = np.random.default_rng(0)
    weight, given = rng.normal(size=(96, 128)).astype(np.float32), rng.normal(size=(3, 128)).astype(np.float32)
    model = linear_model(weight if rows else np.ascontiguousarray(weight.T), transposed=rows)
    dequantize_weights(model, bits, weight_quantization=WeightQuantization(quantize_lm_head=True), moments={})
    (node,) = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert node.attributes["block_size"].as_int() == block
    assert model.graph.initializers[f"w.q{bits}"].dtype == (ir.DataType.INT8 if bits == 8 else ir.DataType.INT4)
    if bits == 8:
        numbers, scales = network.weight_only.quantize_rows(weight, block)
        expected = (numbers.astype(np.float32) - 128) * scales[:, :, None]
    else:
        packed, scales = network.gptq.quantize_int4(weight, None, block)
        numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], block)
        expected = (numbers.astype(np.float32) - 8) * scales[:, :, None]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else activations are rounded too
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    np.testing.assert_allclose(
        session.run(None, {"x": given})[0], given @ expected.reshape(96, 128).T, rtol=1e-4, atol=1e-4
    )


def test_an_output_layer_keeps_eight_bits_in_a_graph_of_four() -> None:
    model = linear_model(np.ones((128, 96), np.float32))
    dequantize_weights(model, 4, weight_quantization=DEFAULT_WEIGHT_QUANTIZATION, moments={})
    assert "w.q8" in model.graph.initializers


def linear_model(weight: Any, *, transposed: bool = False) -> ir.Model:
    """y = x w, or x wᵀ."""
    width, out = weight.shape[::-1] if transposed else weight.shape
    body = "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)" if transposed else "y = MatMul(x, w)"
    text = f'<ir_version: 10, opset_import: ["" : 23]> g (float[n, {width}] x) => (float[n, {out}] y) {{ {body} }}'
    parsed = onnx.parser.parse_model(text)
    parsed.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return ir.from_proto(parsed)


def test_axes_are_fixed_by_name() -> None:
    model = linear_model(np.zeros((4, 4), np.float32))
    fix_axes(model, {"n": 7})
    assert [list(value.shape or ()) for value in (*model.graph.inputs, *model.graph.outputs)] == [[7, 4], [7, 4]]


@pytest.mark.parametrize("choices", [7, 5])
def test_the_highest_logit_of_those_that_may_be_chosen_is_told(choices: int) -> None:
    text = '<ir_version: 10, opset_import: ["" : 23]> g (float[batch, kept, 7] x) => (float[batch, kept, 7] logits) { logits = Identity(x) }'
    model = ir.from_onnx_text(text)
    specs = network.add_argmax(model, choices)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    assert [(spec.name, spec.axes) for spec in specs] == [(t.name, tuple(t.shape)) for t in session.get_outputs()[1:]]
    logits = np.random.default_rng(0).normal(size=(3, 2, 7)).astype(np.float32)
    logits[0, 0, 6] = 9.0
    _, highest, best = session.run(None, {"x": logits})
    np.testing.assert_array_equal(best, logits[:, :, :choices].argmax(axis=2))
    np.testing.assert_array_equal(highest, logits[:, :, :choices].max(axis=2))


def test_what_overflows_float16_is_told_by_transformers(save_composition: Callable[..., Path]) -> None:
    assert kept_in_float32(load_composition(save_composition("t5")).reference.slm) == {"wo"}


# --- a build without a compiler --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_values_that_float16_does_not_hold_are_refused_before_anything_is_compiled(
    save_composition: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An LLM whose states leave float16's range: the first product with them is infinite."""
    pair = load_composition(save_composition("llama"))
    scale_embeddings(pair.reference, 1e6)
    monkeypatch.setattr(Compiler, "compile", lambda *_: pytest.fail("compiled"))
    choice = EngineChoice("tensorrt-rtx", module(), dict.fromkeys(GRAPHS, "fp16"))
    with pytest.raises(ParityError, match="engines would not match") as caught:
        build(pair, tmp_path / "out", BuildOptions(engines=choice))
    assert "projector at fp16" in str(caught.value)
    assert "nan" in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def scale_embeddings(reference: Reference, factor: float) -> None:
    llm: Any = reference.llm
    llm.final_layer_norm.weight.data *= factor


def module() -> Any:
    """As much of TensorRT-RTX as is looked at before anything is compiled."""
    trt: Any = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7.1", ILogger=object)
    return trt


def test_tensorrt_says_that_it_needs_the_device(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a device")
    trt: Any = SimpleNamespace(__name__="tensorrt", __version__="11.4.0.106", ILogger=object)
    from llm2slm_export.authoring.build_engines import EngineBuilder

    making = EngineBuilder(EngineChoice("tensorrt", trt), tmp_path / "partial")
    with pytest.raises(DeviceError, match="this machine has none"):
        making.key(EngineLimits(batch=1, prompt=1, new=1, capacity=1))
    making.close()


def test_limits_that_the_pair_cannot_have_are_named_together(save_composition: Callable[..., Path]) -> None:
    pair = load_composition(save_composition("gpt2"))
    with pytest.raises(UsageError) as caught:
        EngineChoice("tensorrt-rtx", module(), batch=0, prompt=10_000, prompt_buckets=(0, 64, 10_000)).limits(pair)
    assert "--max-batch is 0" in str(caught.value)
    assert "--prompt-buckets 0,10000: must be between 1 and 9999" in str(caught.value)
    assert "--max-prompt 10000: the pair's maximum is 200 tokens" in str(caught.value)
    assert "--max-prompt 10000: the SLM has 600 positions" in str(caught.value)
    limits = EngineChoice("tensorrt-rtx", module()).limits(pair)
    assert limits == EngineLimits(batch=8, prompt=200, new=20, capacity=220)


class FakeTensorRT:
    """TensorRT as far as a compiler calls it, with what it was given: no machine without a GPU has more."""

    ILogger = object
    IProgressMonitor = object
    LayerType = SimpleNamespace(ATTENTION_INPUT="attention", KV_CACHE_UPDATE="cache")
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")

    def __init__(self, version: str, *, typed: int) -> None:
        self.__name__, self.__version__ = "tensorrt", version
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=typed)
        self.given: dict[str, Any] = {}
        config = SimpleNamespace(
            create_timing_cache=lambda known: self.given.update(known=known) or "cache",
            set_timing_cache=lambda cache, mismatched: self.given.update(cache=(cache, mismatched)),
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"measured"),
            add_optimization_profile=lambda _: 0,
        )
        network = SimpleNamespace(num_layers=0)
        self.OnnxParser = lambda *_: SimpleNamespace(parse_from_file=lambda _: True)
        self.Builder = lambda _: SimpleNamespace(
            create_network=lambda flags: self.given.update(flags=flags) or network,
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *_: None),
            build_serialized_network=lambda *_: b"plan",
        )


@pytest.mark.parametrize(("version", "typed", "flags"), [("10.16.1.11", 1, 2), ("11.4.0.106", 0, 0)])
def test_networks_of_tensorrt_are_strongly_typed_and_what_it_measured_is_kept(
    version: str, typed: int, flags: int, tmp_path: Path
) -> None:
    trt: Any = FakeTensorRT(version, typed=typed)
    cache = tmp_path / "cache" / "tensorrt.timing"
    compiler = Compiler(trt, timing_cache=cache)
    assert compiler.compile(tmp_path / "graph.onnx", [{}]).plan == b"plan"
    assert trt.given == {"flags": flags, "known": b"", "cache": ("cache", False)}
    assert cache.read_bytes() == b"measured"
    compiler.compile(tmp_path / "graph.onnx", [{}])
    assert trt.given["known"] == b"measured"
    assert [path.name for path in cache.parent.iterdir()] == ["tensorrt.timing"]


def test_tensorrt_builds_for_no_other_device() -> None:
    trt: Any = FakeTensorRT("11.4.0.106", typed=0)
    with pytest.raises(UsageError, match=r"no compute capability '9\.0'") as caught:
        Compiler(trt, compute_capabilities=("9.0",))
    assert "leave out --compute-capability" in str(caught.value)


# --- really compiled -------------------------------------------------------------------------------------------------


def check_engines(bundle: Path, manifest: Manifest, precision: EnginePrecision) -> EngineSet:
    """Engines that are whole, listed, and made of these graphs; whose profiles cover what the limits promise."""
    open_bundle(bundle)
    ((key, engines),) = manifest.engines.items()
    assert engines.variant == "tensorrt-rtx"
    assert key.startswith(f"tensorrt-rtx-{engines.version}-portable-{precision}-")
    assert set(engines.graphs) == set(GRAPHS)
    hashes = {entry.path: entry.sha256 for entry in manifest.files}
    for name, entry in engines.graphs.items():
        assert entry.file in hashes
        assert (bundle / entry.file).stat().st_size > 1000
        assert entry.source == graph_digest(manifest.graphs[name], hashes)
        specs = manifest.graphs[name]
        assert [t.name for t in entry.inputs] == [t.name for t in specs.inputs]
        best = [contract.MAX_LOGITS, contract.ARGMAX_IDS] if name == "decoder" else []
        assert [t.name for t in entry.outputs] == [*(t.name for t in specs.outputs), *best]
        assert all(profile.keys() == {t.name for t in entry.inputs} for profile in entry.profiles)
    decoder = engines.graphs["decoder"]
    assert decoder.aliases == {state.present.name: state.past.name for state in manifest.cache.state}
    kinds = {"fp32": "float32", "bf16": "bfloat16"}
    cached = {t.dtype for t in decoder.inputs if t.name.startswith("past_key_values.")}
    assert cached == {kinds.get(precision, "float16")}
    assert {t.dtype for t in decoder.outputs if t.name == contract.LOGITS} == {"float32"}
    counted = contract.LOGITS_TO_KEEP if manifest.shape.slm_kind == "decoder-only" else contract.INPUT_IDS
    calls = [(profile[counted].minimum[1], profile[counted].maximum[1]) for profile in decoder.profiles]
    assert calls[-2:] == [(2, CALL_TOKENS), (1, 1)], "calls that return the logits of every token"
    return engines


PAIRS = [("t5", "add"), ("llama", "add"), ("gpt2", "prefix")]
OTHER_FUSIONS = [("t5", "replace"), ("t5", "prefix"), ("t5", "cross_attention")]
FLOATS: tuple[EnginePrecision, ...] = ("fp32", "fp16", "bf16")


COMPILED = [(*pair, precision) for pair in PAIRS for precision in FLOATS] + [(*pair, "fp16") for pair in OTHER_FUSIONS]
# Both kinds of SLM, and both half types.
IN_CI = {("gpt2", "prefix", "bf16"), ("t5", "cross_attention", "fp16")}


@with_rtx
@pytest.mark.parametrize(
    ("slm_type", "fusion", "precision"),
    tiered(COMPILED, slow=IN_CI),
)
def test_a_pair_is_compiled(
    slm_type: str, fusion: str, precision: EnginePrecision, save_composition: Callable[..., Path], tmp_path: Path
) -> None:
    steps: list[str] = []
    choice = EngineChoice(
        "tensorrt-rtx", load_tensorrt("tensorrt-rtx"), dict.fromkeys(GRAPHS, precision), batch=4, prompt=50,
        on_step=lambda phase, *_: steps.append(phase),
    )  # fmt: skip
    pair = load_composition(save_composition(slm_type, fusion))
    manifest = build(pair, tmp_path / "out", BuildOptions(engines=choice))
    engines = check_engines(tmp_path / "out", manifest, precision)
    assert engines.limits.batch == 4
    assert "Building engine" in steps


MIXED = "encoder=fp16,projector=int8,decoder=int4"


@with_rtx
@pytest.mark.parametrize(
    ("pair", "precision"),
    tiered([("tiny", MIXED), ("demo", MIXED), ("demo", "fp16")], slow=[("tiny", MIXED)]),
)
def test_a_pair_is_compiled_by_the_command_and_still_runs_on_onnx_runtime(
    pair: str, precision: str, save_composition: Callable[..., Path], tmp_path: Path
) -> None:
    composition = DEMO_COMPOSITION if pair == "demo" else save_composition("t5")
    out = tmp_path / "bundle"
    command = ["build", "--composition", str(composition), "--out", str(out), "--backend", "tensorrt-rtx", "--max-batch", "2",
               "--engine-precision", precision, "--compute-capability", "8.6,8.9"]  # fmt: skip
    runner = CliRunner()
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    (engines,) = read_manifest(out).engines.values()
    assert engines.compute_capabilities == ("8.6", "8.9")
    assert "decoder engine" in result.output
    output = runner.invoke(app, ["inspect", str(out)]).output
    assert "8.6, 8.9" in output
    answered = runner.invoke(app, ["run", str(out), "How are you?", "--json"])
    assert answered.exit_code == 0, answered.output
    assert json.loads(answered.stdout.splitlines()[0])["token_ids"]


@with_rtx
def test_the_parsers_reasons_are_told_by_node(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> g (float[n, 4] x) => (float[n, 4] y) { y = com.microsoft.FastGelu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "contrib.onnx")
    compiler = Compiler(load_tensorrt("tensorrt-rtx"))
    with pytest.raises(EngineError, match=r"cannot parse contrib\.onnx") as caught:
        compiler.compile(tmp_path / "contrib.onnx", [])
    assert "FastGelu" in str(caught.value)


@with_rtx
def test_a_profile_that_cannot_be_is_refused(tmp_path: Path) -> None:
    ir.save(linear_model(np.zeros((4, 4), np.float32)), tmp_path / "graph.onnx")
    wrong = {"x": Bounds(minimum=(5, 4), optimum=(2, 4), maximum=(3, 4))}
    with pytest.raises(EngineError, match="does not accept the shapes"):
        Compiler(load_tensorrt("tensorrt-rtx")).compile(tmp_path / "graph.onnx", [wrong])


@with_rtx
def test_compute_capabilities_that_the_variant_does_not_have_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no compute capability '9\.0'") as caught:
        Compiler(load_tensorrt("tensorrt-rtx"), compute_capabilities=("8.9", "9.0"))
    assert "8.9" in str(caught.value)
