"""Sizes from configurations alone, against models that are really built."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from llm2slm_export.authoring.exporters.onnx.export import export_graph, transpose_weights
from llm2slm_export.authoring.exporters.onnx.external_data import WeightStore
from llm2slm_export.authoring.graphs.factory import make_graph
from llm2slm_export.authoring.models.architectures import LLM_ARCHITECTURES, SLM_ARCHITECTURES
from llm2slm_export.authoring.models.loading import config_from, llm_from_config, model_from_config
from llm2slm_export.authoring.models.pairing import PairConfig, projector_entry
from llm2slm_export.authoring.models.projector import Projector
from llm2slm_export.authoring.models.reference import Reference
from llm2slm_export.authoring.plan import Plan, plan
from llm2slm_export.authoring.recipe import ModelSource, Recipe
from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.contract import DEFAULT_WEIGHT_QUANTIZATION, GRAPHS, GraphName, Precision, WeightQuantization
from llm2slm_export.environment.hardware import probe
from llm2slm_export.errors import CompositionError
from tests.families.models import CONFIGS
from tests.support.tiers import tiered
from tests.support.tiny_models import LLM_CONFIG
from tests.support.tiny_models import SLM_CONFIGS as MODELS

FP32: dict[GraphName, Precision] = {"encoder": "fp32", "projector": "fp32", "decoder": "fp32"}
INT8: dict[GraphName, Precision] = {"encoder": "int8", "projector": "fp32", "decoder": "int8"}
TINY_T5 = {
    "model_type": "t5", "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
    "num_decoder_layers": 1, "num_heads": 4,
}  # fmt: skip
# As wide as t5-small: what is not quantized is a thousandth of it.
WIDE_T5 = {
    "model_type": "t5", "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 1,
    "num_decoder_layers": 1, "num_heads": 8,
}  # fmt: skip
TINY_LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def source(model: str | dict[str, object]) -> ModelSource:
    fields = {"model": model} if isinstance(model, str) else {"config": model, "tokenizer": "none"}
    return ModelSource.model_validate(fields)


@pytest.fixture(autouse=True)
def quickly_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe of 8 MB: its figures are real, and only `test_the_probe_is_quick_and_positive` looks at them."""
    monkeypatch.setattr("llm2slm_export.authoring.plan.probe", partial(probe, megabytes=8, width=128))


def sized(
    llm: str | dict[str, object],
    slm: str | dict[str, object],
    precision: dict[GraphName, Precision] = FP32,
    weight_quantization: WeightQuantization = DEFAULT_WEIGHT_QUANTIZATION,
) -> Plan:
    return plan(
        source(llm),
        source(slm),
        precision=precision,
        weight_quantization=weight_quantization,
        prompt_tokens=10,
        new_tokens=20,
    )


@pytest.mark.nightly
def test_published_parameter_counts_without_weights() -> None:
    assert torch.get_default_device().type == "cpu"
    made = sized("t5-xxl", "t5-small")
    assert made.parameters.llm == 11_135_332_352  # T5 1.1 XXL, with the output head of its own; it would not fit
    assert made.parameters.slm == 60_506_624
    assert made.parameters.llm_encoder == 4_762_310_656
    encoder = made.graphs[0]
    assert encoder.bytes == 4 * 4_762_310_656
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize(
    "slm", [TINY_T5, TINY_LLAMA, TINY_LLAMA | {"tie_word_embeddings": True}], ids=["t5", "llama", "tied"]
)
def test_the_bundle_holds_every_weight_once(slm: dict[str, object]) -> None:
    made = sized(TINY_T5, slm)
    built = sum(p.numel() for p in model_from_config(slm).parameters())
    assert made.parameters.slm == built
    whole = made.parameters.llm_encoder + made.parameters.projector + built
    assert made.bundle_bytes == 4 * whole


@pytest.mark.slow
def test_int8_takes_a_byte_and_a_share_of_a_scale() -> None:
    full, small = sized(WIDE_T5, WIDE_T5), sized(WIDE_T5, WIDE_T5, INT8)
    assert small.graphs[0].bytes / full.graphs[0].bytes == pytest.approx((1 + 4 / 128) / 4, rel=1e-3)
    assert small.graphs[1].bytes == full.graphs[1].bytes


@pytest.mark.parametrize("block", tiered([None, 128], slow=[None]))
def test_int4_leaves_tables_and_the_head_at_int8(block: int | None) -> None:
    tied = TINY_LLAMA | {"tie_word_embeddings": True}
    four, eight = 1 / 2 + 4 / (block or 32), 1 + 4 / 128
    for slm in (TINY_LLAMA, tied):
        full, *smaller = (
            sized(TINY_T5, slm, FP32 | {"decoder": precision}, WeightQuantization(block, quantize_lm_head)).graphs[2]
            for precision, quantize_lm_head in (("fp32", False), ("int4", False), ("int4", True))
        )
        head, looked_up, norms = 96 * 32, 96 * 32 * (slm is not tied), 5 * 32
        fours = full.parameters - head - looked_up - norms
        assert [made.bytes for made in smaller] == [
            pytest.approx(looked_up * eight + head * of_head + fours * four + norms * 4, rel=0.01)
            for of_head in (eight, four)
        ]


def test_the_cache_of_both_kinds() -> None:
    t5, llama = sized(TINY_T5, TINY_T5).cache, sized(TINY_T5, TINY_LLAMA).cache
    assert (t5.self_per_token, t5.cross_per_prompt_token) == (2 * 1 * 4 * 8 * 4, 2 * 1 * 4 * 8 * 4)
    assert t5.total == 30 * t5.self_per_token
    assert (llama.self_per_token, llama.cross_per_prompt_token) == (2 * 2 * 2 * 8 * 4, 0)


def test_stages_add_up() -> None:
    stages = {stage.stage: stage.ms for stage in sized(TINY_T5, TINY_LLAMA).stages}
    once = stages["encode"] + stages["project"] + stages["prefill"]
    assert stages["total"] == pytest.approx(once + 20 * stages["step"])
    assert "prefill" not in {stage.stage for stage in sized(TINY_T5, TINY_T5).stages}


def test_the_probe_is_quick_and_positive() -> None:
    machine = probe(megabytes=8, width=128)
    assert machine.bandwidth > 0
    assert machine.flops > 0
    assert machine.seconds < 1


def test_a_step_reads_what_a_step_multiplies() -> None:
    slm = model_from_config(TINY_T5)
    names = [name for name, _ in slm.named_parameters() if name.startswith("decoder.") and "relative" not in name]
    step = sum(
        slm.get_parameter(name).numel()
        for name in names
        if "EncDecAttention.k" not in name and "EncDecAttention.v" not in name
    )
    assert sized(TINY_T5, TINY_T5).parameters.slm_step == step + 96 * 32


def test_an_unknown_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CompositionError, match="nobody/nothing") as caught:
        sized("nobody/nothing", "t5-small")
    assert "check the name" in caught.value.remedy


def test_unsupported_types_are_both_named() -> None:
    mamba = {"model_type": "mamba", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1}
    with pytest.raises(CompositionError) as caught:
        sized(mamba, mamba)
    llm, slm = caught.value.evidence
    assert llm.startswith("LLM of type 'mamba'; supported: encoder-decoder: t5,")
    assert "encoder-only: bert, distilbert, modernbert; decoder-only: gpt2," in llm
    assert slm.startswith("SLM of type 'mamba'; supported: encoder-decoder: t5,")
    assert "bert" not in slm


# --- every family --------------------------------------------------------------------------------------------------


def recipe_of(llm: str, slm: str, *, layer: int | tuple[int, ...] = -1, **choices: Any) -> Recipe:
    made = [{"config": CONFIGS[name], "tokenizer": "none"} for name in (llm, slm)]
    return Recipe.model_validate({"name": "tiny", "llm": made[0] | {"layer": layer}, "slm": made[1], **choices})


def planned(recipe: Recipe, *, prompt_tokens: int = 10) -> Plan:
    return plan(
        recipe.llm,
        recipe.slm,
        precision=FP32,
        pair_config=PairConfig.of(recipe),
        prompt_tokens=prompt_tokens,
        new_tokens=20,
    )


SUPPORTED_LLMS = [n for n, c in CONFIGS.items() if c["model_type"] in LLM_ARCHITECTURES]


@pytest.mark.parametrize("name", tiered(SUPPORTED_LLMS, fast=("t5", "bert", "gpt2"), slow=("longt5-local", "t5gemma2")))
def test_every_llm_can_be_sized(name: str) -> None:
    made = planned(recipe_of(name, "llama"))
    # All of it but BERT's pooler and T5Gemma 2's vision tower, which no prompt reaches.
    assert 0.85 * made.parameters.llm_encoder < made.graphs[0].parameters <= made.parameters.llm_encoder
    assert made.graphs[0].bytes_read < made.graphs[0].bytes == 4 * made.graphs[0].parameters
    writes_too = CONFIGS[name]["model_type"] in SLM_ARCHITECTURES
    assert (made.parameters.llm_step is not None) == writes_too
    assert ("LLM's own step (fp32)" in {stage.stage for stage in made.stages}) == writes_too


@pytest.mark.parametrize(
    "name",
    tiered(
        [n for n, c in CONFIGS.items() if c["model_type"] in SLM_ARCHITECTURES],
        fast=("t5", "llama"), slow=("bart", "t5gemma"),
    ),
)  # fmt: skip
def test_every_slm_can_be_sized(name: str) -> None:
    made = planned(recipe_of("t5", name))
    built = sum(p.numel() for p in model_from_config(CONFIGS[name]).parameters())
    assert made.parameters.slm == built
    # Between them, the projector and the decoder graph hold the whole SLM: its encoder's positions and its decoder's.
    assert made.bundle_bytes == 4 * (made.graphs[0].parameters + made.parameters.projector + built)


@pytest.mark.parametrize("slm", tiered(["t5", "llama"], slow=["t5", "llama"]))
def test_sizes_are_those_of_a_bundle(bundles: Callable[..., tuple[Path, Path]], slm: str) -> None:
    _, bundle = bundles(slm)
    manifest = read_manifest(bundle)
    made = planned(
        Recipe.model_validate({
            "name": "tiny", "projector": {"d_hidden": 24}, "llm": {"config": LLM_CONFIG, "tokenizer": "none"},
            "slm": {"config": MODELS[slm], "tokenizer": "none"},
        })
    )  # fmt: skip
    for size in made.graphs:
        weights = onnx.load(bundle / f"{size.graph}.onnx").graph.initializer
        stored = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in weights)
        assert size.bytes == pytest.approx(stored, rel=0.02), size.graph
        assert size.bytes_read == pytest.approx(manifest.graphs[size.graph].bytes_read, rel=0.02), size.graph
    outside = sum(path.stat().st_size for path in bundle.glob("*.onnx.data"))
    assert 0.85 * made.bundle_bytes < outside < made.bundle_bytes  # of tiny models, much is small, and stays inside


JOINED = {
    "bart, prefix, two layers": recipe_of("gpt2", "bart", fusion="prefix", layer=[0, 1]),
    "t5gemma, cross_attention": recipe_of("bert", "t5gemma-unbalanced", fusion="cross_attention", tokenizer="llm"),
    "gemma2, adapter": recipe_of("t5", "gemma2", tokenizer="llm"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", JOINED.values(), ids=JOINED)
def test_sizes_are_those_of_the_weights_that_the_exporter_keeps(recipe: Recipe, tmp_path: Path) -> None:
    made, stored, whole = planned(recipe), {}, WeightStore(tmp_path)
    pair_config = PairConfig.of(recipe)
    llm, slm = llm_from_config(config_from(recipe.llm.config)), model_from_config(recipe.slm.config)
    projector = Projector(projector_entry(llm, slm, pair_config))
    reference = Reference(llm, projector, slm, pair_config.fusion, pair_config.layer).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_()  # or norms and biases, all ones and zeros, were stored once
    for name in GRAPHS:
        model = export_graph(make_graph(name, reference))
        transpose_weights(model)
        stored[name] = sum(len(value.const_value.tobytes()) for value in model.graph.initializers.values())
        whole.save(model, f"{name}.onnx")
    for size in made.graphs:
        assert size.bytes == pytest.approx(stored[size.graph], rel=0.02), size.graph
    assert made.bundle_bytes == pytest.approx(whole.unique_bytes, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("slm", ["bart", "llama"])
def test_prefix_doubles_the_memory(slm: str) -> None:
    added, prefixed = planned(recipe_of("t5", slm)), planned(recipe_of("t5", slm, fusion="prefix"))
    crossed = added.cache.self_per_token if slm == "bart" else 0
    assert (added.cache.cross_per_prompt_token, prefixed.cache.cross_per_prompt_token) == (crossed, 2 * crossed)
    assert prefixed.cache.self_per_token == added.cache.self_per_token
    assert prefixed.cache.total - added.cache.total == 10 * added.cache.self_per_token
    assert prefixed.graphs == added.graphs


@pytest.mark.slow
def test_only_the_layers_that_are_read_are_held() -> None:
    whole, first, table = (planned(recipe_of("gpt2", "llama", layer=layer)).graphs[0] for layer in (-1, 1, 0))
    assert planned(recipe_of("gpt2", "llama", layer=3)).graphs[0].parameters == whole.parameters
    config = CONFIGS["gpt2"]
    assert table.parameters == (config["vocab_size"] + config["n_positions"]) * config["n_embd"]
    layers = [size.parameters - table.parameters for size in (whole, first)]
    assert layers[0] - 2 * config["n_embd"] == 3 * layers[1]  # and, after the last, a norm


def test_the_adapters_table_is_the_llms_and_is_stored_once() -> None:
    shared, adapted = (planned(recipe_of("t5", "llama", tokenizer=kind)) for kind in ("shared", "llm"))
    llm, width = CONFIGS["t5"], CONFIGS["llama"]["hidden_size"]
    table, adapter = llm["vocab_size"] * llm["d_model"], llm["d_model"] * width + width
    assert adapted.parameters.projector == shared.parameters.projector + adapter
    assert adapted.graphs[1].parameters == adapted.parameters.projector + table
    assert adapted.bundle_bytes == shared.bundle_bytes + 4 * adapter


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"fusion": "cross_attention"}, "cross_attention needs an SLM with cross-attention; llama is decoder-only"),
        ({"layer": [1, 9]}, "LLM layer 9 of 3 layers"),
        ({"layer": 4}, "LLM layer 4 of 3 layers"),
        ({"projector": {"kind": "identity"}, "fusion": "replace"}, "got 48 and 36"),
    ],
)
def test_what_cannot_be_joined_is_refused(choices: dict[str, Any], message: str) -> None:
    narrow = {"config": MODELS["llama"], "tokenizer": "none"}
    with pytest.raises(CompositionError, match=re.escape(message)):
        planned(recipe_of("t5", "llama", **choices).model_copy(update={"slm": ModelSource.model_validate(narrow)}))


@pytest.mark.parametrize(("saved_as", "heads"), [({}, 1), ({"tie_word_embeddings": False}, 2)])
def test_a_published_head_of_its_own_is_counted(tmp_path: Path, saved_as: dict[str, object], heads: int) -> None:
    """transformers ties every T5 that is made from a configuration, whatever that says."""
    config_from(TINY_T5 | saved_as).save_pretrained(tmp_path)
    built = sum(p.numel() for p in model_from_config(TINY_T5).parameters())
    assert sized(str(tmp_path), str(tmp_path)).parameters.slm == built + (heads - 1) * 96 * 32
