"""Bundles at fp16: what their tensors are, that they run on the CPU too, and that precisions can be mixed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2slm_export.authoring.build import build
from llm2slm_export.authoring.build_options import BuildOptions
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.authoring.plan import plan
from llm2slm_export.authoring.recipe import ModelSource
from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.bundle.parity_report import ParityError
from llm2slm_export.contract import GRAPHS, GraphName, Precision, TensorSpec, graph_specs
from llm2slm_export.errors import EncodingError
from llm2slm_export.evaluation.latency import _step_bytes
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend
from llm2slm_export.inference.runtime.onnxruntime.cuda_backend import CudaBackend
from llm2slm_export.inference.scheduler import Scheduler

PROMPTS = ["How are you?", "The weather is fine.", "No"]


def types(bundle: Bundle) -> dict[str, str]:
    """Of every float that crosses a graph, by the graph and name, without the layer's number."""
    return {
        f"{graph} {tensor.name.replace('.0.', '.i.').replace('.1.', '.i.')}": tensor.dtype
        for graph, entry in bundle.manifest.graphs.items()
        for tensor in (*entry.inputs, *entry.outputs)
        if tensor.dtype != "int64"
    }


@pytest.mark.parametrize("slm_type", ["t5", "llama"])
def test_keys_and_values_are_in_half_and_everything_else_is_not(
    bundles: Callable[..., tuple[Path, Path]], slm_type: str
) -> None:
    bundle = open_bundle(bundles(slm_type, precision="fp16")[1])
    found = types(bundle)
    assert {name.split()[1].split(".")[0] for name, kind in found.items() if kind == "float16"} == {
        "past_key_values", "present",
    }  # fmt: skip
    wide = {name.split()[1] for name, kind in found.items() if kind == "float32"}
    assert wide == {"hidden_states", "logits"} | ({"prompt_embeds"} if slm_type == "llama" else set())
    assert {part.dtype for state in bundle.manifest.cache.state for part in (state.past, state.present)} == {"float16"}
    assert bundle.manifest.cache.bytes_each == 2
    assert _step_bytes(bundle.manifest, 1, 10, 2) is not None


@pytest.mark.parametrize("slm_type", ["t5", "llama"])
def test_it_writes_the_same_on_both_backends(bundles: Callable[..., tuple[Path, Path]], slm_type: str) -> None:
    bundle = open_bundle(bundles(slm_type, precision="fp16")[1])
    plain, fixed = OrtBackend(bundle, device="cpu", threads=1), CudaBackend(bundle, device="cpu", threads=1)
    ids = [
        [g.token_ids for g in Orchestrator(bundle, backend).generate(PROMPTS, num_beams=beams)]
        for backend in (plain, fixed)
        for beams in (1, 3)
    ]
    assert ids[:2] == ids[2:]


def test_an_encoding_keeps_its_type_on_disk(bundles: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    with Orchestrator(
        bundle := open_bundle(bundles("t5", precision="fp16")[1]), OrtBackend(bundle, device="cpu", threads=1)
    ) as pair:
        encoding = pair.encode(PROMPTS)
        pair.save_encoding(encoding, tmp_path / "e.safetensors")
        again = pair.load_encoding(tmp_path / "e.safetensors")
        arrays = pair._running().arrays(again.conditioning)
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
        assert [g.token_ids for g in pair.generate_from(again)] == [g.token_ids for g in pair.generate_from(encoding)]


def test_an_encoding_of_another_runtime_is_converted(bundles: Callable[..., tuple[Path, Path]]) -> None:
    """TensorRT's tensors are float32, whatever the decoder's are."""
    with Orchestrator(
        bundle := open_bundle(bundles("t5", precision="fp16")[1]), OrtBackend(bundle, device="cpu", threads=1)
    ) as pair:
        half = pair.host_encoding(pair.encode(PROMPTS[:1]))
        single = replace(half, tensors={name: array.astype(np.float32) for name, array in half.tensors.items()})
        sent = pair.encoding_from_bytes(single.to_bytes())
        expected = [g.token_ids for g in pair.generate_from(half)]
        assert [g.token_ids for g in pair.generate_from(sent)] == expected
        large = replace(single, tensors={name: array + 1e6 for name, array in single.tensors.items()})
        with pytest.raises(EncodingError, match="overflow float16"):
            pair.generate_from(pair.encoding_from_bytes(large.to_bytes()))
        with Scheduler(pair) as scheduler:
            good = [scheduler.submit(encoding) for encoding in (half, sent, half)]
            bad = scheduler.submit(large)
            assert [submission.result()[0].token_ids for submission in good] == expected * 3
            with pytest.raises(EncodingError, match="overflow float16"):
                bad.result()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "cached"),
    [({"decoder": "fp16"}, "float16"), ({"encoder": "fp16", "projector": "fp16"}, "float32")],
    ids=["decoder", "encoder and projector"],
)
def test_precisions_can_be_mixed(
    save_composition: Callable[..., Path], tmp_path: Path, precision: dict[GraphName, Precision], cached: str
) -> None:
    """The projector gives what the decoder takes, whatever each multiplies in; the build's own gate has run them."""
    build(load_composition(save_composition("t5")), tmp_path / "b", BuildOptions(precision))
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.parity.passed
    names: tuple[TensorSpec, ...] = bundle.manifest.graphs["projector"].outputs
    assert {tensor.dtype for tensor in names} == {cached}
    with Orchestrator(bundle, OrtBackend(bundle, device="cpu", threads=1)) as pair:
        assert len(pair.generate(PROMPTS)) == 3


def test_values_that_float16_does_not_hold_are_refused(save_composition: Callable[..., Path], tmp_path: Path) -> None:
    """ONNX Runtime's CPU computes in float32 and leaves roundings out: there they would be finite, and on a GPU not."""
    pair = load_composition(save_composition("llama"))
    llm: Any = pair.reference.llm
    llm.final_layer_norm.weight.data *= 1e6
    with pytest.raises(ParityError, match="does not match") as caught:
        build(pair, tmp_path / "out", BuildOptions(dict.fromkeys(GRAPHS, "fp16")))
    assert "projector" in str(caught.value)
    assert "nan" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_contract_says_the_type(bundles: Callable[..., tuple[Path, Path]]) -> None:
    manifest = open_bundle(bundles("t5", precision="fp16")[1]).manifest
    specs = graph_specs(manifest.shape, "float16")
    for name, entry in manifest.graphs.items():
        assert (entry.inputs, entry.outputs) == (specs[name].inputs, specs[name].outputs)


def test_the_plan_knows_what_is_kept(bundles: Callable[..., tuple[Path, Path]]) -> None:
    composition, directory = bundles("t5", precision="fp16")
    bundle = open_bundle(directory)
    planned = plan(
        ModelSource(model=str(composition / "llm")),
        ModelSource(model=str(composition / "slm")),
        precision=dict.fromkeys(GRAPHS, "fp16"),
    )
    for size in planned.graphs:
        assert size.bytes_read == pytest.approx(bundle.manifest.graphs[size.graph].bytes_read, rel=0.1)
    assert planned.cache.self_per_token == 2 * 2 * 3 * 6 * 2  # key and value, layers, heads, head_dim, bytes
