"""Training: the projector and the SLM learn, the LLM does not change, a run can go on where it was stopped."""

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file, save_file

from llm2slm_export.authoring.models.loading import load_full, load_llm, load_tokenizer
from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.authoring.recipe import Recipe
from llm2slm_export.authoring.training import hidden_state_cache
from llm2slm_export.authoring.training.checkpoints import WEIGHTS_FILE, last_checkpoint
from llm2slm_export.authoring.training.collate import padded, require_rows
from llm2slm_export.authoring.training.hf_trainer import ByLength, PartTrainer
from llm2slm_export.authoring.training.hidden_state_cache import HiddenStates
from llm2slm_export.authoring.training.train import train
from llm2slm_export.authoring.training.trainable import StandaloneModel, load_part
from llm2slm_export.cli.console import WorkLog
from llm2slm_export.errors import CompositionError, DataError, RecipeError, TrainingError, UsageError
from tests.support.recorded_progress import RecordedProgress
from tests.support.tiny_models import LLM_CONFIG, SLM_CONFIGS
from tests.support.tiny_recipe import changed, tiny_recipe


@pytest.fixture
def make_recipe(save_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """make(slm_type, **training) → a recipe over tiny data."""
    return partial(tiny_recipe, tmp_path, save_model)


@pytest.mark.parametrize("slm_type", ["t5", "llama"])
def test_training_lowers_the_loss_and_freezes_the_llm(
    make_recipe: Callable[..., Recipe], tmp_path: Path, slm_type: str
) -> None:
    recipe = make_recipe(slm_type, epochs=4, optimizer="adafactor")
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
    before = load_llm(str(recipe.llm.model)).state_dict()
    after = pair.reference.llm.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_composition_names_the_tokenizer_that_the_recipe_names(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(epochs=0.2)
    bare = tmp_path / "bare"
    shutil.copytree(str(recipe.llm.model), bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CompositionError, match="holds no tokenizer"):
        train(changed(recipe, llm={"model": str(bare)}), tmp_path / "out")
    train(changed(recipe, llm={"model": str(bare), "tokenizer": recipe.llm.model}), tmp_path / "out")
    assert load_composition(tmp_path / "out").llm_tokenizer("abc de").input_ids == (
        load_tokenizer(str(recipe.llm.model))("abc de").input_ids
    )


@pytest.mark.parametrize(
    ("llm_config", "slm_type", "fusion", "tokenizer", "layer"),
    [
        (LLM_CONFIG, "t5", "prefix", "llm", -1),
        (LLM_CONFIG, "t5", "cross_attention", "shared", (1, 2, -1)),
        (SLM_CONFIGS["llama"], "gpt2", "prefix", "shared", 1),
        (SLM_CONFIGS["gpt2"], "llama", "add", "llm", (1, -1)),
        (SLM_CONFIGS["llama"], "t5", "replace", "llm", 2),
    ],
)
def test_every_fusion_trains_whatever_it_adds(
    make_recipe: Callable[..., Recipe],
    save_model: Callable[..., Path],
    tmp_path: Path,
    llm_config: dict[str, Any],
    slm_type: str,
    fusion: str,
    tokenizer: str,
    layer: int | tuple[int, ...],
) -> None:
    fields = make_recipe(slm_type, epochs=3).model_dump()
    fields["llm"] |= {"model": str(save_model(llm_config)), "layer": layer}
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
    recipe = make_recipe(epochs=3)
    train(recipe, tmp_path / "whole")

    original = PartTrainer.compute_loss

    def interrupted(self: Any, model: Any, inputs: Any, **options: Any) -> Any:
        if model.training and self.state.global_step >= 8:
            raise KeyboardInterrupt
        return original(self, model, inputs, **options)

    monkeypatch.setattr(PartTrainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "halted")
    assert not (tmp_path / "halted").exists()
    monkeypatch.setattr(PartTrainer, "compute_loss", original)
    with pytest.raises(UsageError, match="--resume"):
        train(recipe, tmp_path / "halted")
    train(recipe, tmp_path / "halted", resume=True)

    for file in ("projector.safetensors", "slm/model.safetensors"):
        whole, resumed = load_file(tmp_path / "whole" / file), load_file(tmp_path / "halted" / file)
        for name in whole:
            torch.testing.assert_close(resumed[name], whole[name])


def test_an_untied_head_survives_fine_tuning_and_saving(
    make_recipe: Callable[..., Recipe], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model({**SLM_CONFIGS["t5"], "tie_word_embeddings": False})
    weights = with_a_head_of_its_own(directory)
    recipe = make_recipe(epochs=1, learning_rate=1e-6)
    recipe = recipe.model_copy(update={"slm": recipe.slm.model_copy(update={"model": str(directory), "config": None})})
    train(recipe, tmp_path / "out")
    head = load_composition(tmp_path / "out").reference.slm.get_output_embeddings().weight  # type: ignore[operator]
    torch.testing.assert_close(head, weights["lm_head.weight"], atol=1e-3, rtol=1e-3)


def test_a_recipe_without_training_cannot_train(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe().model_copy(update={"training": None})
    with pytest.raises(RecipeError, match="training"):
        train(recipe, tmp_path / "out")


def test_a_recipe_without_an_llm_says_how_to_make_one(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe()
    llm = recipe.llm.model_copy(update={"model": None, "config": LLM_CONFIG, "tokenizer": recipe.llm.model})
    with pytest.raises(RecipeError, match="--only llm"):
        train(recipe.model_copy(update={"llm": llm}), tmp_path / "out")


def test_two_tokenizers_are_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = tmp_path / "words"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>").save_pretrained(other)
    recipe = make_recipe()
    recipe = recipe.model_copy(update={"slm": recipe.slm.model_copy(update={"tokenizer": str(other)})})
    with pytest.raises(CompositionError, match="tokenize prompts differently"):
        train(recipe, tmp_path / "out")


def record(directory: Path) -> dict[str, Any]:
    """What training.json in a directory says."""
    content: dict[str, Any] = json.loads((directory / "training.json").read_text())
    return content


def losses(directory: Path) -> list[float]:
    """The validation losses of a run, in order."""
    return [entry["eval_loss"] for entry in record(directory)["history"]]


# --- what is trained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["llm", "slm", "slm-alone"])
def test_one_model_by_itself_is_a_transformers_directory(
    make_recipe: Callable[..., Recipe], tmp_path: Path, part: Any
) -> None:
    train(make_recipe(epochs=1), tmp_path / "out", part=part)
    load_full(str(tmp_path / "out"))
    assert record(tmp_path / "out")["part"] == part


def test_a_pair_and_its_baseline_start_from_the_model_and_only_from_the_configuration(
    make_recipe: Callable[..., Recipe], save_model: Callable[..., Path]
) -> None:
    directory = save_model(SLM_CONFIGS["t5"], seed=8)
    known = load_full(str(directory)).state_dict()["shared.weight"]
    recipe = changed(make_recipe(), slm={"model": str(directory)})
    for part in ("pair", "slm-alone"):
        assert torch.equal(load_part(recipe, part).model.slm.state_dict()["shared.weight"], known)
    assert not torch.equal(load_part(recipe, "slm").model.slm.state_dict()["shared.weight"], known)
    without = changed(recipe, slm={"model": None})
    drawn = load_part(without, "slm-alone").model.slm.state_dict()["shared.weight"]
    assert not torch.equal(drawn, known)


def test_the_slm_alone_reads_with_its_own_tokenizer_and_needs_no_llm(
    make_recipe: Callable[..., Recipe], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model(SLM_CONFIGS["t5"], seed=8)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["z"] = vocab["z"], vocab["a"]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = changed(
        make_recipe(epochs=1),
        llm={"model": "nowhere"},
        slm={"model": str(directory), "tokenizer": None, "config": None},
    )
    seen: list[list[int]] = []
    original = PartTrainer.compute_loss

    def spied(self: Any, model: Any, inputs: Any, **options: Any) -> Any:
        seen.extend(inputs["input_ids"].tolist())
        return original(self, model, inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartTrainer, "compute_loss", spied)
        train(recipe, tmp_path / "out", part="slm-alone")
    wanted = load_tokenizer(str(directory))("abc abc de").input_ids
    assert vocab["a"] in wanted
    assert wanted in [row[: len(wanted)] for row in seen]
    assert load_tokenizer(str(tmp_path / "out"))("a").input_ids == load_tokenizer(str(directory))("a").input_ids


def test_the_llm_can_be_fine_tuned_where_there_is_no_configuration(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(epochs=1, learning_rate=1e-5)
    train(recipe, tmp_path / "out", part="llm")
    before, after = load_full(str(recipe.llm.model)).state_dict(), load_full(str(tmp_path / "out")).state_dict()
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    assert not torch.equal(after["shared.weight"], before["shared.weight"])


def test_what_is_read_is_not_written_over(
    make_recipe: Callable[..., Recipe], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    llm = tmp_path / "models" / "llm"
    llm.parent.mkdir()
    save_model(LLM_CONFIG).rename(llm)
    recipe = changed(make_recipe(), llm={"model": str(llm)})
    for out, how in ((llm, "it is"), (llm.parent, "it holds")):
        for part in ("llm", "pair"):
            with pytest.raises(UsageError) as caught:
                train(recipe, out, part=part, force=True)
            assert f"{how} {llm}, which is read" in caught.value.evidence
    with pytest.raises(UsageError, match=r"train\.jsonl"):
        train(recipe, tmp_path, force=True)
    (tmp_path / "more").mkdir()
    distilled = changed(recipe, training={"teacher": {"further_prompts": str(tmp_path / "more" / "prompts.jsonl")}})
    (tmp_path / "more" / "prompts.jsonl").write_text('{"prompt": "ij"}\n')
    with pytest.raises(UsageError, match=r"prompts\.jsonl"):
        train(distilled, tmp_path / "more", force=True)
    made = changed(recipe, llm={"config": LLM_CONFIG, "tokenizer": str(recipe.slm.tokenizer)}, training={"epochs": 0.1})
    with pytest.raises(UsageError, match="not an output of `train`"):
        train(made, llm, part="llm", force=True)
    for force in (False, True):
        train(made, tmp_path / "made", part="llm", work=tmp_path / f"work-{force}", force=force)
    (tmp_path / "made" / "README.md").write_text("by hand")
    with pytest.raises(UsageError, match=r"README\.md is no part of it"):
        train(made, tmp_path / "made", part="llm", work=tmp_path / "third", force=True)


def test_what_is_replaced_holds_neither_checkpoints_nor_caches(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="contains directories that the run writes to") as caught:
        train(make_recipe(), out, work=out, cache=out / "cache")
    assert caught.value.evidence == (f"--work {out}", f"--cache {out / 'cache'}")


def test_directories_with_names_of_checkpoints_are_not_rotated_away(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    photos = tmp_path / "work" / "checkpoint-1"
    photos.mkdir(parents=True)
    (photos / "holiday.jpg").touch()
    with pytest.raises(UsageError, match=r"holiday\.jpg is no part of it"):
        train(make_recipe(), tmp_path / "out", work=tmp_path / "work")
    (photos / "holiday.jpg").rename(photos / "trainable.safetensors")  # half of one of ours
    train(make_recipe(epochs=1), tmp_path / "out", work=tmp_path / "work")
    listed = json.loads((tmp_path / "out" / "training.json").read_text())["files"]
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted([*listed, "training.json"]) == sorted(path.relative_to(tmp_path / "out").as_posix() for path in found)
    mode = (tmp_path / "out" / "training.json").stat().st_mode & 0o777
    assert {path.stat().st_mode & 0o777 for path in found} == {mode}, "as the umask says, weights too"


def test_validation_prompts_are_no_training_prompts(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe()
    with (tmp_path / "validation.jsonl").open("a") as file:
        first = json.loads((tmp_path / "train.jsonl").read_text().split("\n")[0])["prompt"]
        file.write(json.dumps({"prompt": f" {first.upper()}", "response": "x"}) + "\n")
    with pytest.raises(DataError, match="1 of 17 validation prompts") as caught:
        train(recipe, tmp_path / "out")
    assert first.upper() in caught.value.evidence[0]


# --- what of it learns ------------------------------------------------------------------------------------------


def test_with_a_frozen_slm_only_the_projector_learns(
    make_recipe: Callable[..., Recipe], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model(SLM_CONFIGS["t5"], seed=8)
    recipe = changed(make_recipe(epochs=4, slm="frozen"), slm={"model": str(directory)})
    train(recipe, tmp_path / "out")
    reference = load_composition(tmp_path / "out").reference
    for name, weight in load_full(str(directory)).state_dict().items():
        assert torch.equal(reference.slm.state_dict()[name], weight), name
    assert reference.projector.fc_out.weight.abs().sum() > 0
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    trained = sum(weight.numel() for weight in reference.projector.parameters())
    assert record(tmp_path / "out")["parameters"]["trained"] == trained
    checkpoint = last_checkpoint(tmp_path / "out.work")
    assert checkpoint is not None
    assert set(load_file(checkpoint / WEIGHTS_FILE)) == {
        f"projector.{name}" for name in reference.projector.state_dict()
    }


@pytest.mark.parametrize("part", ["slm", "slm-alone"])
def test_a_frozen_slm_alone_has_nothing_to_train(make_recipe: Callable[..., Recipe], tmp_path: Path, part: Any) -> None:
    with pytest.raises(RecipeError, match="frozen"):
        train(make_recipe(slm="frozen"), tmp_path / "out", part=part)


def test_a_pair_in_which_nothing_learns_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = changed(make_recipe(slm="frozen"), projector={"kind": "identity"}, slm={"config": LLM_CONFIG})
    with pytest.raises(RecipeError, match="nothing to train"):
        train(recipe, tmp_path / "out")


def test_what_no_gradient_reaches_is_not_counted_as_trained(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(changed(make_recipe(epochs=0.2), fusion="cross_attention"), tmp_path / "out")
    reference = load_composition(tmp_path / "out").reference
    table: Any = reference.slm.get_input_embeddings()  # type: ignore[operator]
    encoder = sum(p.numel() for p in reference.slm.get_encoder().parameters() if p is not table.weight)  # type: ignore[operator]
    parameters = record(tmp_path / "out")["parameters"]
    assert parameters["unreached"] == encoder > 0
    whole = sum(p.numel() for p in [*reference.slm.parameters(), *reference.projector.parameters()])
    assert parameters["trained"] == whole - encoder
    assert parameters["frozen"] == sum(p.numel() for p in reference.llm.parameters()) + encoder


# --- a frozen encoder -------------------------------------------------------------------------------------------

BART = {
    "model_type": "bart", "vocab_size": 307, "d_model": 36, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
    "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "fields", "cached"),
    [
        ("llm", LLM_CONFIG, True),
        ("llm", BART, True),
        ("slm", SLM_CONFIGS["t5"], True),
        ("slm-alone", SLM_CONFIGS["t5"], False),
    ],
)
def test_a_frozen_encoder_stays_bit_for_bit_while_the_decoder_learns(
    make_recipe: Callable[..., Recipe],
    save_model: Callable[..., Path],
    tmp_path: Path,
    part: Any,
    fields: dict[str, Any],
    cached: bool,
) -> None:
    directory = str(save_model(fields, seed=3))
    source = {"model": directory, "config": fields if part == "slm" else None, "tokenizer": directory}
    recipe = changed(
        make_recipe(epochs=4, freeze_encoder=True, cache_hidden_states=cached), **{part.removesuffix("-alone"): source}
    )
    train(recipe, tmp_path / "out", part=part)
    if part == "slm":
        torch.manual_seed(0)
        before: Any = load_part(recipe, "slm").model.slm
    else:
        before = load_full(directory)
    after: Any = load_full(str(tmp_path / "out"))
    frozen = after.get_encoder().state_dict()
    assert all(torch.equal(weight, frozen[name]) for name, weight in before.get_encoder().state_dict().items())
    assert torch.equal(after.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert torch.equal(after.get_output_embeddings().weight, before.get_output_embeddings().weight), "it is the table"
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    assert bool(list((tmp_path / "cache").glob("hidden_states/*.npy"))) == cached
    ids = load_tokenizer(directory)("abc de", return_tensors="pt").input_ids
    assert after.generate(ids, max_new_tokens=4).shape[1] > 1


def with_a_head_of_its_own(directory: Path) -> dict[str, torch.Tensor]:
    """Give a T5 on disk a head that is not its embeddings' table; its weights then."""
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(307, 32)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return weights


def test_beside_a_frozen_encoder_an_untied_head_learns(
    make_recipe: Callable[..., Recipe], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = save_model(SLM_CONFIGS["t5"])
    before = with_a_head_of_its_own(directory)
    recipe = changed(make_recipe(epochs=1, freeze_encoder=True), slm={"model": str(directory)})
    train(recipe, tmp_path / "out", part="slm-alone")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["shared.weight"], before["shared.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_a_frozen_encoder_computes_the_same(save_model: Callable[..., Path]) -> None:
    model = load_full(str(save_model(BART)))
    ids = padded([[5, 6, 7, 1], [9, 1]], 0)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": padded([[8, 1], [4, 3, 1]], -100)}
    with torch.no_grad():
        torch.testing.assert_close(
            StandaloneModel(model, freeze_encoder=True).eval()(**batch), StandaloneModel(model).eval()(**batch)
        )
    trained = StandaloneModel(model, freeze_encoder=True).train()
    assert not trained.encoder.training
    assert trained.slm.training


def test_a_frozen_encoder_and_the_pair_share_their_hidden_states(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(epochs=0.2)
    train(changed(recipe, training={"freeze_encoder": True}), tmp_path / "llm", part="llm")
    train(recipe, tmp_path / "pair")
    assert len(list((tmp_path / "cache" / "hidden_states").iterdir())) == 1


@pytest.mark.parametrize(("part", "message"), [("slm", "llama"), ("slm-alone", "llama"), ("pair", "pair")])
def test_an_encoder_that_is_not_there_is_not_frozen(
    make_recipe: Callable[..., Recipe], tmp_path: Path, part: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match="freeze_encoder") as caught:
        train(make_recipe("llama", freeze_encoder=True), tmp_path / "out", part=part)
    assert message in str(caught.value)


def test_a_model_that_only_reads_is_not_trained_to_write(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    bert = tmp_path / "bert"
    llm_config = {
        "model_type": "bert",
        "vocab_size": 307,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    from llm2slm_export.authoring.models.loading import config_from, llm_from_config

    llm_from_config(config_from(llm_config)).save_pretrained(bert)  # type: ignore[operator]
    tokenizer = str(make_recipe().llm.model)
    with pytest.raises(CompositionError, match="a bert is an encoder"):
        load_part(changed(make_recipe(), llm={"model": str(bert), "tokenizer": tokenizer}), "llm")


def test_on_a_terminal_the_lines_of_losses_stay_above_the_progress_bar(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, behind = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", behind)
    with WorkLog(Console(file=shown, force_terminal=True, width=200)) as log:
        train(make_recipe(epochs=0.2), tmp_path / "out", progress=log)
    assert "validation loss" in shown.getvalue(), "the console of the bar prints it"
    assert "validation loss" not in behind.getvalue(), "it is in the middle of the bar"


# --- what runs share --------------------------------------------------------------------------------------------


def test_runs_share_one_cache(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, progress = make_recipe(epochs=0.2), RecordedProgress()
    train(recipe, tmp_path / "runs" / "one", progress=progress)
    (_, prompts, _), (_, steps, _) = progress.tasks
    assert progress.tasks == [("encoding prompts", prompts, prompts), ("training", steps, steps)]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines[-1].startswith(f"step {steps} of {steps}: epoch ")
    assert "validation loss" in lines[-1]
    (file,) = (tmp_path / "runs" / "cache" / "hidden_states").iterdir()
    assert not (tmp_path / "runs" / "one.work" / "hidden_states").exists()
    written = file.stat().st_mtime_ns
    again = RecordedProgress()
    train(recipe, tmp_path / "runs" / "two", progress=again)
    assert again.tasks == progress.tasks[1:]
    assert list(file.parent.iterdir()) == [file]
    assert file.stat().st_mtime_ns == written
    train(recipe, tmp_path / "runs" / "three", cache=tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere" / "hidden_states").iterdir())) == 1


def test_states_read_in_bfloat16_are_kept_apart(save_composition: Callable[..., Path], tmp_path: Path) -> None:
    llm = load_composition(save_composition("t5")).reference.llm
    prompts = [[5, 6, 7, 1], [9, 1]]
    exact = HiddenStates.build(llm, -1, prompts, tmp_path, 0, bf16=False)
    fast = HiddenStates.build(llm, -1, prompts, tmp_path, 0, bf16=True)
    assert len(list(tmp_path.iterdir())) == 2
    torch.testing.assert_close(fast[prompts[0]], exact[prompts[0]], atol=0.05, rtol=0.05)
    assert not torch.equal(fast[prompts[0]], exact[prompts[0]])


@pytest.mark.parametrize(("share", "batches_left"), [(0, 5), (0.003, 5), (0.6, 3), (0.99, 1), (1, 0)])
def test_states_go_on_where_a_run_was_cut_off(
    save_composition: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    batches_left: int,
) -> None:
    llm = load_composition(save_composition("t5")).reference.llm
    prompts = [[5 + i % 50, 6, *[7] * (i % 5), 1] for i in range(40)]
    monkeypatch.setattr(hidden_state_cache, "READ_TOGETHER", 8)
    HiddenStates.build(llm, -1, prompts, tmp_path / "whole", 0, bf16=False)
    (whole,) = (tmp_path / "whole").iterdir()
    partial = tmp_path / "cut" / whole.with_suffix(".partial").name
    partial.parent.mkdir()
    partial.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    calls, read = [], hidden_state_cache.read
    monkeypatch.setattr(hidden_state_cache, "read", lambda *given: calls.append(given) or read(*given))
    progress = RecordedProgress()
    states = HiddenStates.build(llm, -1, prompts, tmp_path / "cut", 0, bf16=False, progress=progress)
    (file,) = (tmp_path / "cut").iterdir()
    assert file.read_bytes() == whole.read_bytes()
    assert len(calls) == batches_left
    assert progress.tasks == [("encoding prompts", 40, 40)]
    assert states[prompts[3]].shape == (6, LLM_CONFIG["d_model"])


@pytest.mark.parametrize("damage", [lambda c: c[:-2], lambda c: c[:0], lambda c: c + b"x", lambda c: b"x" + c[1:]])
def test_states_whose_file_is_damaged_are_made_again(
    save_composition: Callable[..., Path], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    llm = load_composition(save_composition("t5")).reference.llm
    prompts = [[5, 6, 7, 1], [9, 1]]
    HiddenStates.build(llm, -1, prompts, tmp_path, 0, bf16=False)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(RuntimeWarning, match="does not hold hidden states of 6 tokens. It was removed"):
        HiddenStates.build(llm, -1, prompts, tmp_path, 0, bf16=False)
    assert file.read_bytes() == whole


def test_bfloat16_is_used_where_it_is_not_emulated(
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def trained(name: str, *, bf16: bool) -> dict[str, Any]:
        train(make_recipe(epochs=0.5, bf16=bf16), tmp_path / name, cache=tmp_path / f"{name}.cache")
        record: dict[str, Any] = json.loads((tmp_path / name / "training.json").read_text())
        return record

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert not trained("asked", bf16=True)["hardware"]["bf16"]
    assert "training.bf16 is ignored: this cpu has no bfloat16 instructions" in capsys.readouterr().out
    assert not trained("plain", bf16=False)["hardware"]["bf16"]
    assert "bf16" not in capsys.readouterr().out
    asked, plain = (load_file(tmp_path / name / "slm" / "model.safetensors") for name in ("asked", "plain"))
    assert all(torch.equal(asked[name], plain[name]) for name in plain)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"neon": True, "bf16": True})
    assert trained("native", bf16=True)["hardware"]["bf16"]
    assert "bf16" not in capsys.readouterr().out


@pytest.mark.parametrize(("scale", "message"), [(1e6, "e+06"), (float("nan"), "nan")])
def test_states_that_float16_does_not_hold_are_refused(
    make_recipe: Callable[..., Recipe], save_model: Callable[..., Path], tmp_path: Path, scale: float, message: str
) -> None:
    directory = save_model(LLM_CONFIG)
    weights = load_file(directory / "model.safetensors")
    weights["encoder.final_layer_norm.weight"] *= scale
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    recipe = changed(make_recipe(epochs=0.2), llm={"model": str(directory)})
    with pytest.raises(CompositionError, match="float16") as caught:
        train(recipe, tmp_path / "out")
    assert message in caught.value.evidence[0]
    assert "cache_hidden_states=false" in caught.value.remedy
    assert list((tmp_path / "cache" / "hidden_states").iterdir()) == []
    if scale == 1e6:
        train(changed(recipe, training={"cache_hidden_states": False}), tmp_path / "out")


# --- numbers that stop being numbers ----------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, step: int, row: int | None = None) -> None:
    """Make the SLM's embeddings, or one row of them, not a number after a training step."""
    original = PartTrainer.training_step

    def poisoned(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        loss = original(self, model, *arguments, **options)
        if self.state.global_step == step - 1:
            # What the optimizer makes of a spoilt gradient, a moment early.
            weight = model.slm.get_input_embeddings().weight
            weight.grad[slice(None) if row is None else row] = float("nan")
        return loss

    monkeypatch.setattr(PartTrainer, "training_step", poisoned)
    for measured in ("_clip_grad_norm", "_get_grad_norm"):  # which spread it to every weight
        monkeypatch.setattr(PartTrainer, measured, lambda *_, **__: None)


def test_a_loss_that_is_not_a_number_names_the_step_and_that_there_is_no_checkpoint(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, step=2)
    with pytest.raises(TrainingError, match=r"The loss is nan in step 3\.") as caught:
        train(make_recipe(epochs=5), tmp_path / "out")
    assert "there is no checkpoint yet" in caught.value.evidence
    assert not (tmp_path / "out").exists()
    assert last_checkpoint(tmp_path / "out.work") is None


def test_a_loss_that_is_not_a_number_names_the_last_good_checkpoint(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, step=12)  # which is an evaluation's, and a checkpoint's
    with pytest.raises(TrainingError, match=r"The loss is nan in the evaluation after step 12\.") as caught:
        train(make_recipe(epochs=5), tmp_path / "out")
    good = tmp_path / "out.work" / "checkpoint-6"
    assert f"the last complete checkpoint is {good}" in caught.value.evidence
    assert all(weight.isfinite().all() for weight in load_file(good / WEIGHTS_FILE).values())
    assert last_checkpoint(tmp_path / "out.work") == good


def test_weights_that_are_no_numbers_are_not_kept_though_no_loss_saw_them(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, step=12, row=300)  # of no token in the data
    with pytest.raises(TrainingError, match="not finite after step 12") as caught:
        train(make_recipe("llama", epochs=5), tmp_path / "out")
    good = tmp_path / "out.work" / "checkpoint-6"
    assert {f"the last complete checkpoint is {good}", "slm.model.embed_tokens.weight"} <= set(caught.value.evidence)
    assert last_checkpoint(tmp_path / "out.work") == good


# --- checkpoints, batches ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_not_written_to_its_end_is_none(tmp_path: Path) -> None:
    for step, files in ((6, [WEIGHTS_FILE, "complete.json"]), (12, [WEIGHTS_FILE, "trainer_state.json"])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for file in files:
            (tmp_path / f"checkpoint-{step}" / file).touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_of_other_settings_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(epochs=1)
    train(recipe, tmp_path / "out", work=tmp_path / "work")
    with pytest.raises(TrainingError, match="other settings") as caught:
        train(
            changed(recipe, training={"slm": "frozen", "epochs": 2}), tmp_path / "more", work=tmp_path / "work",
            resume=True,
        )  # fmt: skip
    assert any(line.endswith("in the checkpoint, nothing in the model") for line in caught.value.evidence)


def test_the_order_of_rows_is_the_seeds_and_the_epochs() -> None:
    lengths = [i % 7 for i in range(200)]
    epoch = 0
    rows = ByLength(lengths, 16, 5, lambda: epoch)
    torch.manual_seed(1)
    first = list(rows)
    torch.manual_seed(2)
    assert list(rows) == first, "whatever else is drawn"
    assert sorted(first) == list(range(200))
    epoch = 1
    assert list(rows) != first
    assert list(ByLength(lengths, 16, 6, lambda: 0)) != first


def test_accumulated_batches_are_one_large_batch(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    still = {**SLM_CONFIGS["t5"], "dropout_rate": 0.0}
    recipe = changed(make_recipe(epochs=2, learning_rate=1e-3), slm={"config": still})
    train(recipe, tmp_path / "whole")
    halves = {"batch_size": 8, "gradient_accumulation_steps": 2}
    train(changed(recipe, training=halves), tmp_path / "halves")
    one, two = (load_file(tmp_path / name / "slm" / "model.safetensors") for name in ("whole", "halves"))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)


def test_a_projector_starts_at_zero_or_as_it_is_drawn(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    zero = load_part(recipe, "pair").model.projector
    assert zero.fc_out.weight.abs().sum() == 0
    drawn = recipe.model_copy(update={"projector": recipe.projector.model_copy(update={"start": "random"})})
    projector = load_part(drawn, "pair").model.projector
    assert projector.fc_out.weight.std() > 0.01


@pytest.mark.parametrize("part", ["pair", "slm"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"vocab_size": 100},
            r"slm\.config\.vocab_size is 100.*\n.*the tokenizer's largest id is 257\n.*vocab_size to 258",
        ),
        ({"decoder_start_token_id": 999_999}, r"slm\.config\.decoder_start_token_id is 999999"),
        ({"pad_token_id": -1}, r"slm\.config\.pad_token_id is -1"),
        ({"decoder_start_token_id": {"x": 1}}, r"slm\.config\.decoder_start_token_id is {'x': 1}"),
        ({"model_type": ["t5"]}, r"no model type \['t5'\]"),
        ({"d_kv": 0}, r"d_kv: 0; expected at least 1"),
        ({"model_type": "t6"}, r"no model type 't6'.\n.*'t5'"),
        ({"d_model": "wide"}, r"d_model.*expected int.*'wide'"),
    ],
)
def test_a_configuration_that_makes_no_model_is_named(
    make_recipe: Callable[..., Recipe], config: dict[str, Any], message: str, part: Any
) -> None:
    recipe = make_recipe()
    fields = {**(recipe.slm.config or {}), **config}
    with pytest.raises((RecipeError, CompositionError), match=message):
        load_part(changed(recipe, slm={"config": fields}), part)


def test_sizes_that_show_at_the_first_batch_only_are_named(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe("llama")
    fields = {**(recipe.slm.config or {}), "num_key_value_heads": 4}
    with pytest.raises(TrainingError, match=r"cannot compute the first batch\.\n.*Error: .*\n.*slm\.config"):
        train(changed(recipe, slm={"config": fields}), tmp_path / "out", part="slm")
    assert not (tmp_path / "out").exists()


def test_ids_of_the_data_that_a_table_lacks_are_refused() -> None:
    data = Dataset.from_list([{"input_ids": [1, 9], "labels": [3, 12]}, {"input_ids": [2], "labels": [1]}])
    require_rows(data, 10, 13)
    with pytest.raises(DataError, match="prompts have the id 9, the embedding table has 9 rows") as caught:
        require_rows(data, 9, 12)
    assert len(caught.value.evidence) == 2
