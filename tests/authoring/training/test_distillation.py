"""The LLM as the teacher of its SLM: its own responses, made once, kept, and counted where they are of no use."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from llm2slm_export.authoring.models.loading import config_from, llm_from_config, load_full, load_tokenizer
from llm2slm_export.authoring.recipe import Recipe, TeacherSettings
from llm2slm_export.authoring.training import distillation as module
from llm2slm_export.authoring.training import train as train_module
from llm2slm_export.authoring.training.distillation import Teacher, TeacherResponses
from llm2slm_export.authoring.training.train import train
from llm2slm_export.bundle.prompt_template import PromptTemplate
from llm2slm_export.errors import CompositionError, DataError, RecipeError
from tests.support.tiny_models import LLM_CONFIG, SLM_CONFIGS
from tests.support.tiny_recipe import changed, tiny_recipe

PROMPTS = ["abc de", "a", "a longer prompt than the others", "x y z", "some words", "abc", "de", "fgh ij"]
BART = {
    "model_type": "bart", "vocab_size": 307, "d_model": 36, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
    "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}  # fmt: skip


@pytest.fixture
def make_recipe(save_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """make(slm_type, **training) → a recipe over tiny data."""
    return partial(tiny_recipe, tmp_path, save_model)


def teacher(directory: Path, **changes: Any) -> Teacher:
    """A teacher that a directory holds."""
    options: dict[str, Any] = {
        "name": str(directory), "revision": None, "tokenizer": load_tokenizer(str(directory)), "template": PromptTemplate(),
        "settings": TeacherSettings(batch_size=3), "max_prompt_tokens": 50, "max_new_tokens": 9,
        "device": torch.device("cpu"), "bf16": True,
    }  # fmt: skip
    return Teacher(**options | changes)


def scripted(monkeypatch: pytest.MonkeyPatch, respond: Callable[[str], str | None]) -> list[int]:
    """Let a function of the prompt answer in the LLM's place; returns the sizes of the batches, as they come."""
    batches: list[int] = []

    def generate(self: Teacher, _: Any, prompts: list[list[int]]) -> list[str | None]:
        batches.append(len(prompts))
        return [respond(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in prompts]

    monkeypatch.setattr(Teacher, "_generate", generate)
    return batches


def cached(directory: Path) -> list[dict[str, Any]]:
    """The lines of the one file of responses."""
    (path,) = directory.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "fields", [LLM_CONFIG, BART, SLM_CONFIGS["llama"], SLM_CONFIGS["gpt2"]], ids=lambda f: f["model_type"]
)
def test_responses_are_the_llms_own_whatever_the_batch(
    save_generating_model: Callable[..., Path], tmp_path: Path, fields: dict[str, Any], num_beams: int
) -> None:
    directory = save_generating_model(fields)
    answers = teacher(directory, settings=TeacherSettings(batch_size=3, num_beams=num_beams)).answer(PROMPTS, tmp_path)
    model: Any = load_full(str(directory))
    model.generation_config.forced_eos_token_id = None
    tokenizer = load_tokenizer(str(directory))
    expected, unfinished = {}, 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        cache = {"cache": EncoderDecoderCache(DynamicCache(), DynamicCache())} if fields in (LLM_CONFIG, BART) else {}
        row = model.generate(ids, max_new_tokens=9, num_beams=num_beams, do_sample=False, **cache)[0].tolist()
        row = row[1:] if cache else row[ids.shape[1] :]
        ends = [i for i, id in enumerate(row) if id == 1 or (id >= 5 and id % 5 == 0)]
        if not ends:
            unfinished += 1
        elif text := tokenizer.decode(row[: ends[0]], skip_special_tokens=True).strip():
            expected[prompt] = text
    assert answers.responses == expected
    assert expected
    assert (answers.unfinished, answers.prompts, answers.too_long) == (unfinished, len(PROMPTS), 0)
    assert answers.empty == len(PROMPTS) - unfinished - len(expected)


def test_an_end_forced_at_the_limit_is_no_end(save_generating_model: Callable[..., Path], tmp_path: Path) -> None:
    directory = save_generating_model(BART)
    path = directory / "generation_config.json"
    options = json.loads(path.read_text())
    assert options["forced_eos_token_id"] == 1
    path.write_text(json.dumps(options | {"eos_token_id": 1}))
    assert teacher(directory).answer(PROMPTS, tmp_path).unfinished > 0


def test_an_interrupted_teacher_goes_on_where_it_was(
    save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_model(LLM_CONFIG)
    batches = scripted(monkeypatch, str.upper)
    answer = Teacher._generate

    def halted(self: Teacher, model: Any, prompts: list[list[int]]) -> Any:
        if len(batches) == 2:
            raise KeyboardInterrupt
        return answer(self, model, prompts)

    monkeypatch.setattr(Teacher, "_generate", halted)
    with pytest.raises(KeyboardInterrupt):
        teacher(directory).answer(PROMPTS, tmp_path)
    assert len(cached(tmp_path)) == 6
    (path,) = tmp_path.iterdir()
    with path.open("a") as file:
        file.write(
            '5\n[1]\n{"prompt": "x"}\n{"prompt": 1, "response": "y"}\n' + "[" * 100_000 + "\n"
        )  # written by somebody
        file.write('{"prompt": "abc", "resp')  # killed while it wrote
    monkeypatch.setattr(Teacher, "_generate", answer)
    answers = teacher(directory).answer(PROMPTS, tmp_path)
    assert batches == [3, 3, 2]
    assert answers.responses == {prompt: prompt.upper() for prompt in PROMPTS}

    load = module.load_writing
    monkeypatch.setattr(module, "load_writing", lambda *_: pytest.fail("everything is known: no model is needed"))
    assert teacher(directory).answer([*PROMPTS, *PROMPTS], tmp_path) == answers
    assert len(batches) == 3

    monkeypatch.setattr(module, "load_writing", load)
    scripted(monkeypatch, lambda _: "new")
    more = teacher(directory).answer(["other", *PROMPTS[:2]], tmp_path)
    assert more.responses == {"other": "new"} | {prompt: prompt.upper() for prompt in PROMPTS[:2]}, "asked for one"


def test_prompts_are_asked_once_the_longest_first_and_those_over_the_limit_not(
    save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = scripted(monkeypatch, str.upper)
    answers = teacher(save_model(LLM_CONFIG), max_prompt_tokens=10).answer([*PROMPTS, *PROMPTS[:3]], tmp_path)
    assert sum(batches) == len(PROMPTS) - 2
    assert (answers.too_long, answers.prompts) == (2, len(PROMPTS))
    lengths = [len(line["prompt"]) for line in cached(tmp_path)]
    assert lengths == sorted(lengths, reverse=True)


def test_another_llm_template_or_option_is_another_file(
    save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = scripted(monkeypatch, str.upper)
    directory = save_model(LLM_CONFIG)
    changes: list[dict[str, Any]] = [
        {}, {"template": PromptTemplate("say {prompt}")}, {"max_new_tokens": 8}, {"settings": TeacherSettings(num_beams=2)},
        {"name": str(save_model(LLM_CONFIG, seed=1))},
    ]  # fmt: skip
    for count, change in enumerate(changes, start=1):
        for _ in range(2):
            teacher(directory, **change).answer(PROMPTS, tmp_path)
            assert len(list(tmp_path.iterdir())) == count
    asked = len(batches)
    teacher(directory, settings=TeacherSettings(batch_size=5, rows="both")).answer(PROMPTS, tmp_path)
    assert len(batches) == asked, "what does not change a response does not ask again"


def test_rows_without_a_usable_response_are_left_out() -> None:
    rows = [("a", "1"), ("b", "2"), ("c", "3"), ("a", "4")]
    answers = TeacherResponses({"a": "A", "c": "C"}, unfinished=1, empty=0, too_long=0)
    assert answers.distilled(rows) == [("a", "A"), ("c", "C")]
    assert answers.distilled(rows, how="both") == [
        ("a", "1"), ("a", "A"), ("b", "2"), ("c", "3"), ("c", "C"), ("a", "4"),
    ]  # fmt: skip
    assert answers.distilled(rows, ["c", "d", "a"]) == [("a", "A"), ("c", "C")]
    assert answers.distilled(rows[:2], ["c", "d"], how="both") == [("a", "1"), ("a", "A"), ("b", "2"), ("c", "C")]
    assert answers.distilled(rows[:2], ["c", "d"], how="kept") == [("a", "1"), ("b", "2"), ("c", "C")]
    with pytest.raises(DataError, match="no usable response"):
        TeacherResponses({}, unfinished=3, empty=0, too_long=0).distilled(rows)


def test_training_rows_are_distilled_validation_rows_are_not(
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def respond(prompt: str) -> str | None:
        assert prompt.startswith("say ")
        return None if prompt.startswith("say abc") else "" if prompt.startswith("say de") else prompt[:6]

    scripted(monkeypatch, respond)
    rows: list[Any] = []
    tokenize = train_module.tokenize
    monkeypatch.setattr(train_module, "tokenize", lambda given, *rest: rows.append(given) or tokenize(given, *rest))
    recipe = changed(make_recipe(epochs=0.2, teacher={"batch_size": 10}), prompt_template="say {prompt}")
    train(recipe, tmp_path / "runs" / "pair")
    own = [tuple(json.loads(line).values()) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    held_out = [tuple(json.loads(line).values()) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    kept = [prompt for prompt, _ in own if not prompt.startswith(("abc", "de"))]
    assert rows == [[(prompt, f"say {prompt}"[:6]) for prompt in kept], held_out]
    unfinished = sum(prompt.startswith("abc") for prompt, _ in own)
    record = json.loads((tmp_path / "runs" / "pair" / "training.json").read_text())
    assert record["teacher"] == {
        "num_beams": 1, "batch_size": 10, "rows": "replaced", "further_prompts": None,
        "model": f"…/{Path(str(recipe.llm.model)).name}", "prompts": 96,
        "unfinished": unfinished, "empty": 96 - unfinished - len(kept), "too_long": 0, "rows_before": 96,
        "rows_after": len(kept),
    }  # fmt: skip
    assert record["rows"]["train"] == len(kept)
    assert f"{unfinished} unfinished responses" in capsys.readouterr().out


def test_the_teacher_answers_further_prompts(
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted(monkeypatch, str.upper)
    more = tmp_path / "more.jsonl"
    more.write_text('{"prompt": "ij"}\n{"prompt": "k k"}\n{"prompt": "ij"}\n')
    recipe = make_recipe(epochs=0.2, teacher={"further_prompts": str(more)})
    train(recipe, tmp_path / "runs" / "pair")
    record = json.loads((tmp_path / "runs" / "pair" / "training.json").read_text())
    assert (record["rows"]["train"], record["teacher"]["prompts"]) == (98, 98)
    assert record["recipe"]["training"]["teacher"]["further_prompts"] == "…/more.jsonl"
    assert "96 rows and 3 further prompts became 98 rows" in capsys.readouterr().out
    kept = make_recipe(epochs=0.2, teacher={"further_prompts": str(more), "rows": "kept"})
    own = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["prompt"]
    more.write_text(more.read_text() + json.dumps({"prompt": own}) + "\n")
    train(kept, tmp_path / "runs" / "kept")
    record = json.loads((tmp_path / "runs" / "kept" / "training.json").read_text())
    assert (record["rows"]["train"], record["teacher"]["prompts"]) == (98, 2), "training prompts are not put to it"
    held_out = json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[0])["prompt"]
    more.write_text(json.dumps({"prompt": held_out.upper()}))
    with pytest.raises(DataError, match="1 of 16 validation prompts are also training prompts"):
        train(recipe, tmp_path / "runs" / "other")
    train(recipe, tmp_path / "runs" / "llm", part="llm")  # which has no teacher


def test_the_pair_and_its_baselines_share_the_responses(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = scripted(monkeypatch, str.upper)
    recipe = make_recipe(epochs=0.2, teacher={"rows": "both"})
    for part in ("slm-alone", "slm", "pair"):
        train(recipe, tmp_path / "runs" / part, part=part)
    assert batches == [64, 32]
    assert len(cached(tmp_path / "runs" / "cache" / "teacher")) == 96
    assert json.loads((tmp_path / "runs" / "pair" / "training.json").read_text())["rows"]["train"] == 192


def test_the_llm_is_not_its_own_teacher(
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches = scripted(monkeypatch, str.upper)
    train(make_recipe(epochs=0.2, teacher={}), tmp_path / "out", part="llm")
    assert batches == []
    assert json.loads((tmp_path / "out" / "training.json").read_text())["teacher"] is None
    assert "training.teacher is ignored" in capsys.readouterr().out


def test_an_architecture_does_not_teach(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(teacher={})
    llm = {"model": None, "config": LLM_CONFIG, "tokenizer": recipe.llm.model}
    with pytest.raises(RecipeError, match="no trained LLM"):
        train(changed(recipe, llm=llm), tmp_path / "out", part="slm-alone")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert", "vocab_size": 307, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
         "a bert is an encoder"),
        (LLM_CONFIG, "T5EncoderModel"),
        (SLM_CONFIGS["llama"], "lm_head.weight"),  # which was not saved
    ],
)  # fmt: skip
def test_an_llm_that_only_reads_does_not_teach(
    save_model: Callable[..., Path], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    llm_config: Any = llm_from_config(config_from(fields))
    if fields is LLM_CONFIG:
        from transformers import T5EncoderModel

        llm_config = T5EncoderModel(config_from(LLM_CONFIG))
    llm_config.save_pretrained(tmp_path / "llm")
    load_tokenizer(str(save_model(LLM_CONFIG))).save_pretrained(tmp_path / "llm")
    with pytest.raises(CompositionError, match=r"has no decoder and cannot generate text|lacks 1 weights") as caught:
        teacher(tmp_path / "llm").answer(PROMPTS, tmp_path / "cache")
    assert message in str(caught.value)


def test_positions_that_the_llm_does_not_know_are_refused(save_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match="cannot be a teacher") as caught:
        teacher(save_model({**SLM_CONFIGS["gpt2"], "n_positions": 36})).answer(PROMPTS, tmp_path)
    assert "it needs 41 positions and has 36" in caught.value.evidence
    long = teacher(save_model({**BART, "max_position_embeddings": 30}), max_new_tokens=40)
    with pytest.raises(CompositionError, match="cannot be a teacher") as caught:
        long.answer(PROMPTS, tmp_path)
    assert len(caught.value.evidence) == 2


def test_a_hub_models_responses_are_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / "0123abc"
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda *_, **__: str(snapshot / "config.json"))
    assert module._origin("t5-small", None) == "google-t5/t5-small@0123abc"
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda *_, **__: None)
    assert module._origin("t5-small", None) is None
