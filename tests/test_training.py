"""Training: the projector and the SLM learn, the LLM does not change, a run can go on where it was stopped."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2slm_export.errors import CompositionError, DataError, RecipeError, UsageError
from llm2slm_export.models.loading import load_full, load_reader
from llm2slm_export.models.pairing import load_composition
from llm2slm_export.recipe import DataSettings, Recipe
from llm2slm_export.training.data import HiddenStates, padded, read_pairs
from llm2slm_export.training.trainer import train
from tests.conftest import READER, WRITERS


@pytest.fixture
def make_recipe(save_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """make(writer, **training) → a recipe over tiny data: repeat the prompt's last word."""
    rng = random.Random(0)
    words = ["abc", "de", "fgh", "ij"]
    for name, count in (("train", 96), ("validation", 16)):
        rows = [rng.choices(words, k=3) for _ in range(count)]
        lines = [json.dumps({"prompt": " ".join(r), "response": r[-1]}) for r in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def make(writer: str = "t5", **training: Any) -> Recipe:
        reader = str(save_model(READER))
        settings = {
            "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")},
            "epochs": 2, "batch_size": 16, "learning_rate": 0.01, "warmup_steps": 2, "bf16": False,
        } | training  # fmt: skip
        return Recipe.model_validate({
            "name": "tiny", "llm": {"model": reader},
            "slm": {"config": WRITERS[writer], "tokenizer": reader},
            "training": settings,
        })  # fmt: skip

    return make


@pytest.mark.parametrize("writer", ["t5", "llama"])
def test_training_lowers_the_loss_and_freezes_the_llm(
    make_recipe: Callable[..., Recipe], tmp_path: Path, writer: str
) -> None:
    recipe = make_recipe(writer, epochs=4, optimizer="adafactor")
    result = train(recipe, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    losses = [entry["eval_loss"] for entry in record["history"]]
    assert min(losses) < losses[0]
    assert result.metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-3), "the best checkpoint is what is kept"
    assert record["rows"] == {"train": 96, "validation": 16}
    assert record["prompts"]

    pair = load_composition(tmp_path / "out")
    assert pair.trained
    assert pair.reference.projector.fc_out.weight.abs().sum() > 0
    before = load_reader(str(recipe.llm.model)).state_dict()
    after = pair.reference.llm.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("reader", "writer", "fusion", "tokenizer", "layer"),
    [
        (READER, "t5", "prefix", "llm", -1),
        (READER, "t5", "cross_attention", "shared", (1, 2, -1)),
        (WRITERS["llama"], "gpt2", "prefix", "shared", 1),
        (WRITERS["gpt2"], "llama", "add", "llm", (1, -1)),
        (WRITERS["llama"], "t5", "replace", "llm", 2),
    ],
)
def test_every_fusion_trains_whatever_it_adds(
    make_recipe: Callable[..., Recipe],
    save_model: Callable[..., Path],
    tmp_path: Path,
    reader: dict[str, Any],
    writer: str,
    fusion: str,
    tokenizer: str,
    layer: int | tuple[int, ...],
) -> None:
    fields = make_recipe(writer, epochs=3).model_dump()
    fields["llm"] |= {"model": str(save_model(reader)), "layer": layer}
    recipe = Recipe.model_validate(fields | {"fusion": fusion, "tokenizer": tokenizer})
    train(recipe, tmp_path / "out")
    losses = [e["eval_loss"] for e in json.loads((tmp_path / "out" / "training.json").read_text())["history"]]
    assert losses[-1] < losses[0]
    projector = load_composition(tmp_path / "out").reference.projector
    assert (projector.adapter is not None) == (tokenizer == "llm" and fusion in ("add", "prefix"))
    assert projector.fc_out.weight.abs().sum() > 0
    if isinstance(layer, tuple):
        assert projector.layer_fusion is not None
        assert projector.layer_fusion.weight.abs().min() > 0, "drawn as zero"


def test_resuming_reaches_the_result_of_an_uninterrupted_run(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm2slm_export.training import trainer

    recipe = make_recipe(epochs=3)
    train(recipe, tmp_path / "whole")

    original = trainer._Trainer.compute_loss

    def interrupted(self: Any, model: Any, inputs: Any, **options: Any) -> Any:
        if model.training and self.state.global_step >= 8:
            raise KeyboardInterrupt
        return original(self, model, inputs, **options)

    monkeypatch.setattr(trainer._Trainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "halted")
    assert not (tmp_path / "halted").exists()
    monkeypatch.setattr(trainer._Trainer, "compute_loss", original)
    with pytest.raises(UsageError, match="--resume"):
        train(recipe, tmp_path / "halted")
    train(recipe, tmp_path / "halted", resume=True)

    for file in ("projector.safetensors", "slm/model.safetensors"):
        whole, resumed = load_file(tmp_path / "whole" / file), load_file(tmp_path / "halted" / file)
        for name in whole:
            torch.testing.assert_close(resumed[name], whole[name])


@pytest.mark.parametrize("part", ["llm", "slm"])
def test_one_model_by_itself_is_a_transformers_directory(
    make_recipe: Callable[..., Recipe], tmp_path: Path, part: Any
) -> None:
    train(make_recipe(epochs=1), tmp_path / "out", part=part)
    load_full(str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "training.json").read_text())["part"] == part


def test_cached_hidden_states_are_the_encoders(save_composition: Callable[..., Path], tmp_path: Path) -> None:
    reference = load_composition(save_composition("t5")).reference
    prompts = [[5, 6, 7, 1], [9, 1], [5, 6, 7, 1]]
    cache = HiddenStates.build(reference, prompts, tmp_path, pad_id=0)
    for prompt in prompts:
        alone = reference.hidden_states(padded([prompt], 0), padded([[1] * len(prompt)], 0))[0, : len(prompt)]
        torch.testing.assert_close(cache[prompt], alone, atol=2e-3, rtol=2e-3)  # kept as float16
    files = list(tmp_path.glob("*.npy"))
    HiddenStates.build(reference, prompts, tmp_path, pad_id=0)
    assert list(tmp_path.glob("*.npy")) == files, "the same prompts and weights reuse the file"


def test_an_untied_head_survives_fine_tuning_and_saving(
    make_recipe: Callable[..., Recipe], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model({**WRITERS["t5"], "tie_word_embeddings": False})
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(307, 32)
    from safetensors.torch import save_file

    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    recipe = make_recipe(epochs=1, learning_rate=1e-6)
    recipe = recipe.model_copy(update={"slm": recipe.slm.model_copy(update={"model": str(directory), "config": None})})
    train(recipe, tmp_path / "out")
    head = load_composition(tmp_path / "out").reference.slm.get_output_embeddings().weight  # type: ignore[operator]
    torch.testing.assert_close(head, weights["lm_head.weight"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("empty.jsonl", "", "no"),
        ("bad.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt"\n{"prompt": "c"}\n', "line 2"),
        ("bad.jsonl", '{"prompt": "a", "response": ""}\n', "line 1"),
        ("bad.tsv", "a\tb\nc\n", "line 2"),
    ],
)
def test_bad_data_is_refused_with_line_numbers(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    fields: tuple[str | int, str | int] = (0, 1) if name.endswith("tsv") else ("prompt", "response")
    settings = DataSettings(train="", validation="", prompt_field=fields[0], response_field=fields[1])
    with pytest.raises(DataError, match=said):
        read_pairs(str(path), settings)


def test_missing_data_is_refused(tmp_path: Path) -> None:
    settings = DataSettings(train="", validation="")
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        read_pairs(str(tmp_path / "nowhere.jsonl"), settings)


def test_a_recipe_without_training_cannot_train(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe().model_copy(update={"training": None})
    with pytest.raises(RecipeError, match="training"):
        train(recipe, tmp_path / "out")


def test_a_recipe_without_a_reader_says_how_to_make_one(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe()
    llm = recipe.llm.model_copy(update={"model": None, "config": READER, "tokenizer": recipe.llm.model})
    with pytest.raises(RecipeError, match="--only llm"):
        train(recipe.model_copy(update={"llm": llm}), tmp_path / "out")


def test_a_loss_that_is_not_a_number_stops_training(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from llm2slm_export.errors import TrainingError

    with pytest.raises(TrainingError, match="step"):
        train(make_recipe(epochs=5, learning_rate=1e20, max_grad_norm=1e20, warmup_steps=0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_tokenizers_are_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = tmp_path / "words"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>").save_pretrained(other)
    recipe = make_recipe()
    recipe = recipe.model_copy(update={"slm": recipe.slm.model_copy(update={"tokenizer": str(other)})})
    with pytest.raises(CompositionError, match="split prompts differently"):
        train(recipe, tmp_path / "out")


def test_a_pair_starts_from_the_model_and_only_from_the_configuration(
    make_recipe: Callable[..., Recipe], save_model: Callable[..., Path]
) -> None:
    from llm2slm_export.training.trainer import _model

    directory = save_model(WRITERS["t5"], seed=8)
    known = load_full(str(directory)).state_dict()["shared.weight"]
    recipe = make_recipe()
    recipe = recipe.model_copy(update={"slm": recipe.slm.model_copy(update={"model": str(directory)})})
    pair, _, _ = _model(recipe, "pair")
    assert torch.equal(pair.slm.state_dict()["shared.weight"], known)
    alone, _, _ = _model(recipe, "slm")
    assert not torch.equal(alone.slm.state_dict()["shared.weight"], known)
