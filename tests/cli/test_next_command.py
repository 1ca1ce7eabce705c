"""What is proposed next: what has not been done, with what the pair's own training recorded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm2slm_export.authoring.recipe import Recipe
from llm2slm_export.authoring.training_record import read_record, record_of
from llm2slm_export.cli.next_command import after_copying, after_evaluation, after_training, example_prompt
from llm2slm_export.errors import CompositionError

FIELDS: dict[str, Any] = {
    "name": "x", "llm": {"model": "runs/x/llm", "config": {"model_type": "t5"}, "tokenizer": "t"},
    "slm": {"model": "t5-small"}, "training": {"data": {"train": "a.csv", "validation": "my data.csv"}},
}  # fmt: skip
RECIPE = Recipe.model_validate(FIELDS)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(place: str, content: str = "{}") -> None:
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text(content)


def test_after_training_comes_what_is_not_there() -> None:
    pair, alone, llm = Path("runs/x/pair"), Path("runs/x/slm-alone"), Path("runs/x/llm")
    assert after_training("x.yaml", RECIPE, "llm", llm) == "train x.yaml"
    assert after_training("my x.yaml", RECIPE, "llm", Path("o")) == "train 'my x.yaml' llm.model=o"
    assert after_training("x.yaml", RECIPE, "slm", Path("o")) == "train x.yaml slm.model=o"
    assert after_training("x.yaml", RECIPE, "slm-alone", alone) == "train x.yaml"
    assert after_training("x.yaml", RECIPE, "pair", pair) == "build x.yaml"
    assert after_training("x.yaml", RECIPE, "pair", Path("o")) == "build --composition o"
    put("runs/x/pair/composition.json")
    assert after_training("x.yaml", RECIPE, "slm-alone", alone) == "build x.yaml"
    assert after_training("x.yaml", RECIPE, "llm", llm) == "train x.yaml --force", "another LLM, another pair"
    put("engines/x/manifest.json")
    assert after_training("x.yaml", RECIPE, "pair", pair) == "build x.yaml --force"
    for out, baseline in ((alone, "slm"), (Path("o"), "slm=o")):
        assert after_training("x.yaml", RECIPE, "slm-alone", out) == (
            f"eval engines/x --data 'my data.csv' --baseline {baseline}"
        )


def test_after_copying_comes_the_llm_where_it_is_not_there() -> None:
    put("x.yaml", json.dumps(FIELDS))
    assert after_copying(Path("x.yaml")) == "train x.yaml --only llm"
    Path("runs/x/llm").mkdir(parents=True)
    assert after_copying(Path("x.yaml")) == "train x.yaml"


def test_after_an_evaluation_comes_the_comparison_that_was_not_made() -> None:
    def after(composition: str | None, **given: Any) -> str:
        choice = SimpleNamespace(
            **{"bundle": Path("engines/x"), "head": None, "composition": None, "baselines": (), "controls": False}
            | given
        )
        typed = {"prompt": "en", "response": None}
        return after_evaluation(choice, Path("my data.csv"), typed, composition)  # type: ignore[arg-type]

    assert after(None) == "bench engines/x"
    assert (
        after(None, baselines=("other=engines/y",), head="fr") == "bench engines/x --head fr --baseline other=engines/y"
    )
    compositions = {"format": "llm2slm-composition", "version": 1, "name": "x", "llm": {"model": "../llm"},
                    "projector": {"d_in": 8, "d_hidden": 8, "d_out": 8}}  # fmt: skip
    put("runs/x/pair/composition.json", json.dumps(compositions))
    assert after("runs/x/pair") == "eval engines/x --data 'my data.csv' --prompt-field en --controls", (
        "no LLM that writes"
    )
    put("runs/x/llm/config.json", '{"architectures": ["T5EncoderModel"]}')
    assert "--baseline" not in after("runs/x/pair")
    put("runs/x/llm/config.json", '{"architectures": ["T5ForConditionalGeneration"]}')
    Path("runs/x/slm-alone").mkdir()
    assert after("runs/x/pair") == (
        "eval engines/x --data 'my data.csv' --prompt-field en --baseline llm --baseline slm --controls"
    )
    done = ("llm", "slm=o")
    assert after("runs/x/pair", baselines=done, controls=True) == "bench engines/x --baseline llm --baseline slm=o"


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [
        ([], '"How are you?"'),
        (["a\nb", "", "-x", "I'm here; $HOME `x`!"], "'I'\"'\"'m here; $HOME `x`!'"),
        (["word " * 40], f"'{'word ' * 11}word'"),
        (["\x1b[0m"], '"How are you?"'),
    ],
)
def test_an_example_is_one_word_of_a_shell(prompts: list[str], shown: str) -> None:
    assert example_prompt(prompts) == shown


def test_a_record_is_found_by_name_and_read_field_by_field(tmp_path: Path) -> None:
    assert record_of("x") is None
    put("compositions/x/composition.json")
    assert record_of("x") is None, "it has not been trained"
    put("compositions/x/training.json", json.dumps({"recipe": FIELDS | {"later": 1}, "prompts": ["a"], "later": 2}))
    record = record_of("x")
    assert record is not None
    assert (record.prompts, record.data and record.data.train, record.further_prompts) == (("a",), "a.csv", None)
    assert record_of("x", tmp_path) is None
    for content, reason in (
        ("[", "Expecting value"),
        ("[]", "the file: "),
        ('{"prompts": "a"}', "prompts: "),
        ('{"prompts": [1]}', r"prompts.0: "),
        ('{"recipe": {"training": {"data": {"train": 1}}}}', r"recipe.training.data.train: "),
        ("[" * 100_000, "nests deeper"),
        ('{"recipe": ' + "9" * 5000 + "}", "64 bits"),
    ):
        put("compositions/x/training.json", content)
        with pytest.raises(CompositionError, match=reason):
            read_record(Path("compositions/x"))
