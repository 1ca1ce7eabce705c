"""Sizes from configurations alone, against models that are really built."""

import pytest
import torch

from llm2slm_export.contract import GraphName, Precision
from llm2slm_export.errors import CompositionError
from llm2slm_export.models.loading import model_from_config
from llm2slm_export.plan import INT8_BYTES, Plan, plan, probe
from llm2slm_export.recipe import ModelSource

FP32: dict[GraphName, Precision] = {"encoder": "fp32", "projector": "fp32", "decoder": "fp32"}
INT8: dict[GraphName, Precision] = {"encoder": "int8", "projector": "fp32", "decoder": "int8"}
TINY_T5 = {
    "model_type": "t5", "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
    "num_decoder_layers": 1, "num_heads": 4,
}  # fmt: skip
TINY_LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def source(model: str | dict[str, object]) -> ModelSource:
    fields = {"model": model} if isinstance(model, str) else {"config": model, "tokenizer": "none"}
    return ModelSource.model_validate(fields)


def sized(
    llm: str | dict[str, object], slm: str | dict[str, object], precision: dict[GraphName, Precision] = FP32
) -> Plan:
    return plan(source(llm), source(slm), precision=precision, prompt_tokens=10, new_tokens=20)


def test_published_parameter_counts() -> None:
    made = sized("t5-xl", "t5-small")
    assert made.parameters.llm == 2_849_757_184  # T5 1.1 XL, with the output head of its own
    assert made.parameters.slm == 60_506_624
    assert made.parameters.llm_encoder == 1_223_527_424
    encoder = made.graphs[0]
    assert encoder.bytes == 4 * 1_223_527_424


@pytest.mark.parametrize(
    "slm", [TINY_T5, TINY_LLAMA, TINY_LLAMA | {"tie_word_embeddings": True}], ids=["t5", "llama", "tied"]
)
def test_the_bundle_holds_every_weight_once(slm: dict[str, object]) -> None:
    made = sized(TINY_T5, slm)
    built = sum(p.numel() for p in model_from_config(slm).parameters())
    assert made.parameters.slm == built
    whole = made.parameters.llm_encoder + made.parameters.projector + built
    assert made.bundle_bytes == 4 * whole


def test_int8_takes_a_byte_and_a_share_of_a_scale() -> None:
    full, small = sized("t5-xl", "t5-small"), sized("t5-xl", "t5-small", INT8)
    assert small.graphs[0].bytes / full.graphs[0].bytes == pytest.approx(INT8_BYTES / 4, rel=1e-3)
    assert small.graphs[1].bytes == full.graphs[1].bytes


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


def test_no_weights_are_made() -> None:
    assert torch.get_default_device().type == "cpu"
    sized("t5-xxl", "t5-small")  # 11 G parameters: it would not fit
    assert torch.get_default_device().type == "cpu"


def test_an_unknown_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CompositionError, match="nobody/nothing") as caught:
        sized("nobody/nothing", "t5-small")
    assert "check the name" in caught.value.remedy


def test_unsupported_types_are_both_named() -> None:
    with pytest.raises(CompositionError, match="LLM of type 'gpt2'"):
        sized("gpt2", "t5-small")
