"""Low-rank adapters on the SLM: injected in place, merged before anything is written, and counted rightly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2slm_export.authoring.models.loading import load_full
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.authoring.recipe import LoraSettings, Recipe
from llm2slm_export.authoring.training.checkpoints import WEIGHTS_FILE, last_checkpoint
from llm2slm_export.authoring.training.collate import padded
from llm2slm_export.authoring.training.hf_trainer import PartTrainer
from llm2slm_export.authoring.training.lora import Adapters
from llm2slm_export.authoring.training.train import train
from llm2slm_export.errors import CompositionError, MissingExtraError
from tests.support.tiny_models import SLM_CONFIGS
from tests.support.tiny_recipe import changed, tiny_recipe


@pytest.fixture
def make_recipe(save_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """make(slm_type, **training) → a recipe over tiny data whose SLM learns through adapters."""

    def make(slm_type: str = "t5", **training: Any) -> Recipe:
        recipe = tiny_recipe(tmp_path, save_model, slm_type, **({"slm": "lora"} | training))
        return changed(recipe, slm={"model": str(save_model(SLM_CONFIGS[slm_type], seed=8))})

    return make


@pytest.mark.parametrize("slm_type", ["t5", "llama", "gpt2"])
def test_a_pair_learns_through_adapters_and_is_written_without_them(
    make_recipe: Callable[..., Recipe], tmp_path: Path, slm_type: str
) -> None:
    recipe = make_recipe(slm_type, epochs=4, lora={"r": 4, "alpha": 8})
    result = train(recipe, tmp_path / "out")
    pair = load_composition(tmp_path / "out")
    before: Any = load_full(str(recipe.slm.model))
    after: Any = pair.reference.slm
    assert type(after) is type(before)
    assert set(load_file(tmp_path / "out" / "slm" / "model.safetensors")) == set(
        load_file(Path(str(recipe.slm.model)) / "model.safetensors")
    )
    changed_weights = {n for n, weight in before.state_dict().items() if not torch.equal(weight, after.state_dict()[n])}
    linear = {
        f"{name}.weight" for name, module in before.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not before.get_output_embeddings()
    }  # fmt: skip
    assert changed_weights == linear
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    losses = [entry["eval_loss"] for entry in record["history"]]
    assert losses[-1] < losses[0]
    adapters = sum(4 * sum(before.get_parameter(name).shape) for name in linear)
    projector = sum(weight.numel() for weight in pair.reference.projector.parameters())
    assert record["parameters"]["trained"] == adapters + projector

    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    ids = pair.llm_tokenizer([row["prompt"] for row in rows]).input_ids
    responses = pair.slm_tokenizer([row["response"] for row in rows], add_special_tokens=False).input_ids
    labels = padded([[*r, pair.slm_tokenizer.eos_token_id] for r in responses], -100)
    with torch.no_grad():
        logits = pair.reference(padded(ids, 0), padded([[1] * len(i) for i in ids], 0), labels)
    merged = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert merged.item() == pytest.approx(result.metrics["eval_loss"], rel=2e-3)


@pytest.mark.parametrize("part", ["slm-alone", "llm"])
def test_adapters_are_the_slms(make_recipe: Callable[..., Recipe], tmp_path: Path, part: Any) -> None:
    recipe = make_recipe(epochs=1)
    train(recipe, tmp_path / "out", part=part)
    after = load_full(str(tmp_path / "out"))
    before = load_full(str((recipe.llm if part == "llm" else recipe.slm).model))
    tables = [model.get_input_embeddings().weight for model in (before, after)]  # type: ignore[operator]
    assert torch.equal(*tables) == (part == "slm-alone")


def test_beside_a_frozen_encoder_adapters_are_the_decoders(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(epochs=1, freeze_encoder=True)
    train(recipe, tmp_path / "out", part="slm-alone")
    checkpoint = last_checkpoint(tmp_path / "out.work")
    assert checkpoint is not None
    assert all(name.startswith("slm.decoder.") for name in load_file(checkpoint / WEIGHTS_FILE))
    whole = load_full(str(recipe.slm.model))
    parameters = json.loads((tmp_path / "out" / "training.json").read_text())["parameters"]
    assert parameters["frozen"] == sum(weight.numel() for weight in whole.parameters()), "no adapter is frozen"
    before, after = whole.state_dict(), load_full(str(tmp_path / "out")).state_dict()
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"decoder"}


@pytest.mark.slow
def test_resuming_with_adapters_reaches_the_result_of_an_uninterrupted_run(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(epochs=3, lora={"dropout": 0.1})
    train(recipe, tmp_path / "whole")
    original = PartTrainer.compute_loss

    def interrupted(self: Any, model: Any, inputs: Any, **options: Any) -> Any:
        if model.training and self.state.global_step >= 8:
            raise KeyboardInterrupt
        return original(self, model, inputs, **options)

    monkeypatch.setattr(PartTrainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "halted")
    monkeypatch.setattr(PartTrainer, "compute_loss", original)
    train(recipe, tmp_path / "halted", resume=True)
    for file in ("projector.safetensors", "slm/model.safetensors"):
        torch.testing.assert_close(load_file(tmp_path / "halted" / file), load_file(tmp_path / "whole" / file))


def test_named_layers_alone_are_adapted(save_model: Callable[..., Path]) -> None:
    model: Any = load_full(str(save_model(SLM_CONFIGS["llama"])))
    Adapters(model, LoraSettings(target_modules=("q_proj", "model.layers.1.mlp.up_proj")))
    assert {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
    }  # fmt: skip


def test_layers_that_cannot_be_adapted_are_named_at_once(save_model: Callable[..., Path]) -> None:
    model: Any = load_full(str(save_model(SLM_CONFIGS["t5"])))
    with pytest.raises(CompositionError, match="target_modules") as caught:
        Adapters(model, LoraSettings(target_modules=("q", "query", "shared", "lm_head", "layer_norm")))
    message = str(caught.value)
    for part in ("no 'query'", "shared is a Embedding", "lm_head shares its weight", "T5LayerNorm", "k, lm_head, o, q"):
        assert part in message.replace("k, o, q", "k, lm_head, o, q"), part
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_without_peft_the_pip_line_is_named(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(MissingExtraError, match="peft") as caught:
        train(make_recipe(), tmp_path / "out")
    assert "llm2slm-export[train]" in caught.value.remedy
