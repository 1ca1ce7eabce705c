"""What a recipe reads and is not there yet: all of it, and the commands that make it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2slm_export.authoring.recipe import Recipe
from llm2slm_export.authoring.recipe_file import load_recipe
from llm2slm_export.authoring.training.inputs import is_made, refuse_missing, sources_read
from llm2slm_export.errors import DataError
from tests.support.paths import RECIPES


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def missing(part: Any, named: str = "my.yaml", *overrides: str) -> tuple[str, ...]:
    with pytest.raises(DataError, match=f"Inputs of {named} are missing") as caught:
        refuse_missing(load_recipe(named, overrides), part, named)
    return caught.value.evidence


def test_a_copied_recipe_names_what_makes_its_data_tokenizer_and_llm(elsewhere: Path) -> None:
    shipped = (RECIPES / "tatoeba-en-fr.yaml").read_text(encoding="utf-8")
    (elsewhere / "my.yaml").write_text(shipped.replace("name: tatoeba-en-fr", "name: my"), encoding="utf-8")
    assert missing("pair") == (
        "training.data.train: runs/tatoeba-en-fr/data/train.tsv",
        "training.data.validation: runs/tatoeba-en-fr/data/validation.tsv",
        "training.teacher.further_prompts: runs/tatoeba-en-es/data/train.tsv",
        "slm.tokenizer: runs/tatoeba-en-fr/tokenizer",
        "llm.tokenizer: runs/tatoeba-en-fr/tokenizer",
        "llm.model: runs/tatoeba-en-fr/llm",
        "1. python demo/get_data.py runs/tatoeba-en-fr/data",
        "2. python demo/get_data.py runs/tatoeba-en-es/data --language es",
        "3. python demo/train_tokenizer.py runs/tatoeba-en-fr/data/train.tsv runs/tatoeba-en-fr/tokenizer",
        "4. llm2slm-export train my.yaml --only llm --out runs/tatoeba-en-fr/llm",
        "demo/ is in the project's source tree, beside recipes/",
    )
    (elsewhere / "demo").mkdir()
    for name in ("tatoeba-en-fr/data/train.tsv", "tatoeba-en-fr/data/validation.tsv", "tatoeba-en-es/data/train.tsv"):
        (elsewhere / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / "runs" / name).write_text("a\tb\n")
    assert missing("llm") == (
        "llm.tokenizer: runs/tatoeba-en-fr/tokenizer",
        "1. python demo/train_tokenizer.py runs/tatoeba-en-fr/data/train.tsv runs/tatoeba-en-fr/tokenizer",
    )
    (elsewhere / "runs" / "tatoeba-en-fr" / "tokenizer").mkdir()
    assert missing("pair", "my.yaml", "llm.model=runs/my/llm")[-1] == "1. llm2slm-export train my.yaml --only llm"
    loaded = load_recipe("my.yaml")
    refuse_missing(loaded, "llm", "my.yaml")
    refuse_missing(load_recipe("my.yaml", ["training.teacher=null"]), "slm-alone", "my.yaml")
    assert not is_made(loaded, "llm")
    (elsewhere / "runs" / "tatoeba-en-fr" / "llm").mkdir()
    assert is_made(loaded, "llm")
    refuse_missing(loaded, "pair", "my.yaml")


def test_what_a_command_reads_is_made_before_it(elsewhere: Path) -> None:
    del elsewhere
    commands = [line for line in missing("pair", "debian-synopsis") if line[0].isdigit()]
    assert [command.split()[2].removeprefix("demo/") for command in commands] == [
        "get_debian.py", "get_flan_t5_small.py", "prune_vocabulary.py",
    ]  # fmt: skip


def test_what_a_hub_may_have_is_left_to_the_loader(elsewhere: Path) -> None:
    fields = {
        "name": "x", "llm": {"model": "google/flan-t5-small"}, "slm": {"model": "t5-small"},
        "training": {"data": {"train": "owner/set:train", "validation": "set"}},
    }  # fmt: skip
    path = elsewhere / "x.yaml"
    path.write_text(yaml.safe_dump(fields))
    recipe = load_recipe(str(path))
    refuse_missing(recipe, "pair", str(path))
    assert sources_read(recipe, "pair") == {
        "training.data.train": "owner/set:train", "training.data.validation": "set", "llm.model": "google/flan-t5-small",
        "slm.model": "t5-small",
    }  # fmt: skip
    for place in ("./llm", "/x/llm", "a/b/llm", "x" * 5000 + "/llm/x"):
        changed = Recipe.model_validate(fields | {"llm": {"model": place}})
        with pytest.raises(DataError, match=r"llm\.model: ") as caught:
            refuse_missing(changed, "pair", str(path))
        assert "numbered" not in caught.value.remedy, "no command is known"
