"""Recipes: every mistake at once, with the value at fault and what to write instead."""

import random
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from llm2slm_export.authoring.recipe import Recipe, with_teacher
from llm2slm_export.authoring.recipe_file import find_recipe, list_recipes, load_recipe
from llm2slm_export.errors import RecipeError
from tests.support.hostile import PUT_INTO_YAML
from tests.support.paths import RECIPES

MINIMAL: dict[str, Any] = {"name": "mine", "llm": {"model": "t5-xl"}, "slm": {"model": "t5-small"}}


def write(directory: Path, **changes: Any) -> str:
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes), encoding="utf-8")
    return str(path)


def refusal(path: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    return caught.value


def test_a_minimal_recipe_gets_the_papers_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert (recipe.fusion, recipe.projector.kind, recipe.tokenizer) == ("add", "mlp", "shared")


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_under_its_own_name(path: Path) -> None:
    assert load_recipe(str(path)).name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_the_shipped_recipes_are_those_listed() -> None:
    assert {path.stem for path in RECIPES.rglob("*.yaml")} == {path.stem for path in list_recipes()}


def test_an_unknown_key_suggests_the_near_miss(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, projector={"d_hiden": 8}))
    assert "projector.d_hiden: unknown key; did you mean 'd_hidden'?" in error.evidence


def test_a_wrong_type_shows_the_value(tmp_path: Path) -> None:
    (line,) = refusal(write(tmp_path, projector={"d_hidden": "wide"})).evidence
    assert line.startswith("projector.d_hidden:")
    assert "'wide'" in line


def test_several_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, fuson="add", fusion="blend", prompt_template="none", llm={}))
    message = str(error)
    assert "mistakes" in error.fact
    for place in ("fuson", "fusion", "llm", "prompt_template"):
        assert f"- {place}: " in message


def test_a_recipe_says_how_two_models_are_joined(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(
            tmp_path, llm={"model": "t5-xl", "layer": [4, 8, -1]}, projector={"kind": "identity"}, fusion="prefix",
            tokenizer="llm", prompt_template="chat",
        )
    )  # fmt: skip
    assert (recipe.llm.layer, recipe.projector.kind, recipe.projector.d_hidden) == ((4, 8, -1), "identity", None)
    assert (recipe.fusion, recipe.tokenizer, recipe.prompt_template) == ("prefix", "llm", "chat")
    assert load_recipe(write(tmp_path), ["llm.layer=[1, 2]", "fusion=cross_attention"]).llm.layer == (1, 2)
    assert load_recipe(write(tmp_path), ["llm.layer=-2"]).llm.layer == -2


def test_what_joins_nothing_is_named_at_once(tmp_path: Path) -> None:
    error = refusal(
        write(
            tmp_path, llm={"model": "t5-xl", "layer": "last"}, projector={"kind": "linear"}, fusion="multiply",
            tokenizer="own", prompt_template="Chat",
        )
    )  # fmt: skip
    for place, value in (
        ("llm.layer", "last"), ("projector.kind", "linear"), ("fusion", "multiply"), ("tokenizer", "own"),
    ):  # fmt: skip
        assert any(line.startswith(place) and f"(got {value!r})" in line for line in error.evidence)
    assert "llm.layer" in str(refusal(write(tmp_path), "llm.layer=[]"))


def test_the_llm_head_has_a_precision_of_its_own(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path)).export.llm_head is None
    head = load_recipe(write(tmp_path), ["export.llm_head={}"]).export.llm_head
    assert head is not None
    assert head.precision == {}
    export = {"llm_head": {"precision": {"decoder": "int4"}}, "block_size": 64, "quantize_lm_head": True}
    head = load_recipe(write(tmp_path, export=export)).export.llm_head
    assert head is not None
    assert head.precision == {"decoder": "int4"}


@pytest.mark.parametrize(
    ("export", "line"),
    [
        ({"llm_heads": {}}, "export.llm_heads: unknown key; did you mean 'llm_head'?"),
        ({"llm_head": {"precison": {}}}, "export.llm_head.precison: unknown key; did you mean 'precision'?"),
        ({"llm_head": {"precision": {"encoder": "int8"}}}, "export.llm_head.precision.encoder"),
        ({"llm_head": {"precision": {"decoder": "w8a8"}}}, "(got 'w8a8')"),
        ({"llm_head": "int8"}, "export.llm_head: "),
        ({"llm_head": {"precision": {"decoder": "fp16"}}, "block_size": 64}, "no graph is int8 or int4"),
    ],
)
def test_a_wrong_llm_head_is_named(tmp_path: Path, export: dict[str, object], line: str) -> None:
    assert line in str(refusal(write(tmp_path, export=export)))


@pytest.mark.parametrize("template", ["no place", "{prompt} {prompt}"])
def test_a_template_holds_the_prompt_once(tmp_path: Path, template: str) -> None:
    assert template in str(refusal(write(tmp_path, prompt_template=template)))


def test_overrides_are_read_as_yaml(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["projector.d_hidden=64", "export.precision.decoder=int8", "fusion=replace"])
    assert (recipe.projector.d_hidden, recipe.fusion) == (64, "replace")
    assert recipe.export.precision == {"decoder": "int8"}


@pytest.mark.parametrize(
    ("override", "value", "remedy"),
    [
        ("fusion", "'fusion' is not an override", "key.sub=value"),
        ("=3", "'=3' is not an override", "key.sub=value"),
        ("name.first=x", "'name' is not a section", "key.sub=value"),
        ("projector.d_hiden=3", "did you mean 'd_hidden'?", "recipes show"),
        ("projector.d_hidden=-1", "got -1", "recipes show"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, value: str, remedy: str) -> None:
    message = str(refusal(write(tmp_path), override))
    assert value in message
    assert remedy in message


@pytest.mark.parametrize(
    ("text", "value"), [("a: [", "is not YAML"), ("- a\n- b\n", "got: list"), ("", "got: NoneType")]
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, value: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    assert value in str(refusal(str(path)))


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="tatoeba-en-fr") as caught:
        find_recipe("tatoeba")
    assert "recipes ls" in caught.value.remedy


def test_a_recipe_survives_its_own_json(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def undocumented(model: type[BaseModel], where: str = "") -> list[str]:
    """The keys of a section, and of the sections in it, that have no description."""
    missing = []
    for name, field in model.model_fields.items():
        if not field.description:
            missing.append(where + name)
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                missing += undocumented(part, f"{where}{name}.")
    return missing


def test_every_key_says_what_it_is() -> None:
    assert undocumented(Recipe) == []


TRAINING = {"data": {"train": "a.jsonl", "validation": "b.jsonl"}}


def test_training_can_have_a_teacher_and_adapters(tmp_path: Path) -> None:
    plain = load_recipe(write(tmp_path, training=TRAINING))
    assert plain.training is not None
    assert (plain.training.teacher, plain.training.slm, plain.training.freeze_encoder) == (None, "full", False)
    chosen = with_teacher(plain).training
    assert chosen is not None
    assert chosen.teacher is not None
    assert (chosen.teacher.num_beams, chosen.teacher.batch_size, chosen.teacher.rows) == (1, 64, "replaced")
    with pytest.raises(RecipeError, match="the LLM has no prompts to respond to"):
        load_recipe(write(tmp_path, training=TRAINING), ["training.teacher.rows=kept"])
    training = with_teacher(load_recipe(write(tmp_path, training=TRAINING), ["training.teacher.num_beams=4"])).training
    assert training is not None
    assert training.teacher is not None
    assert training.teacher.num_beams == 4
    lora = load_recipe(
        write(tmp_path, training=TRAINING), ["training.slm=lora", "training.lora.target_modules=[q, v]"]
    ).training
    assert lora is not None
    assert lora.lora is not None
    assert (lora.lora.r, lora.lora.alpha, lora.lora.dropout, lora.lora.target_modules) == (8, 16, 0.0, ("q", "v"))
    assert with_teacher(load_recipe(write(tmp_path))).training is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lora.r=4", "`lora` has no effect with slm: full"),
        ("training.slm=partly", "training.slm"),
        ("training.lora.rank=4", "training.lora.rank: unknown key"),
        ("training.lora.target_modules=[]", "training.lora.target_modules"),
        ("training.teacher.num_beam=4", "did you mean 'num_beams'?"),
        ("training.teacher.num_beams=0", "training.teacher.num_beams"),
    ],
)
def test_training_settings_that_mean_nothing(tmp_path: Path, override: str, message: str) -> None:
    assert message in str(refusal(write(tmp_path, training=TRAINING), override))


@pytest.mark.parametrize("precision", [{}, {"decoder": "bf16"}, {"encoder": "int8"}])
def test_rounding_that_no_graph_has_use_for_is_refused(tmp_path: Path, precision: dict[str, str]) -> None:
    export = {"precision": precision, "block_size": 128, "quantize_lm_head": True}
    (line,) = refusal(write(tmp_path, export=export)).evidence
    assert "`quantize_lm_head: true` has no effect" in line
    assert ("`block_size: 128` has no effect" in line) == ("int8" not in precision.values())


def test_a_block_size_is_a_whole_number(tmp_path: Path) -> None:
    path = write(tmp_path, export={"precision": {"decoder": "int4"}, "block_size": 32.0})
    assert "export.block_size: must be a whole number (got 32.0)" in str(refusal(path))


def test_rounding_is_of_engines_too(tmp_path: Path) -> None:
    engines = {"backend": "tensorrt-rtx", "precision": {"decoder": "int4"}, "prompt_buckets": [64, 256]}
    export = load_recipe(write(tmp_path, export={"engines": engines, "quantize_lm_head": True})).export
    assert export.engines is not None
    assert export.engines.prompt_buckets == (64, 256)
    assert export.weight_quantization.quantize_lm_head
    assert "export.engines.precision.decoder" in str(refusal(write(tmp_path), "export.engines.precision.decoder=fp8"))


def test_rounding_that_a_graph_has_use_for_is_taken(tmp_path: Path) -> None:
    export = {"precision": {"decoder": "int4"}, "block_size": 128, "quantize_lm_head": True}
    assert load_recipe(write(tmp_path, export=export)).export.weight_quantization.block_size == 128


@pytest.mark.parametrize(
    "override",
    [
        "training.epochs={", "training.epochs=!!python/name:os.system", "training.epochs=!!int x", "training.bf16=!!bool x",
        'training.epochs=!!float ""', "name=!!timestamp x", "name=!!timestamp 2001-13-41", "training.seed=" + "1" * 5000,
        "llm.config=" + "[" * 3000, "llm.config=&a [*a]", "llm.config=&a {b: *a}", "training.epochs=.inf", "training.epochs=.nan",
        "training.epochs=1e999", "training.learning_rate=.inf", "training.learning_rate=-1", "training.seed=-1",
        f"training.seed={2**200}", f"training.batch_size={2**70}", "training.seed=1:30", "llm.layer=100000000000",
        "llm={model: a, model: b}", 'llm.model="\\0"', 'llm.model="\\ud800"', "llm.config={1: 2}", "llm.config={x: !!binary eA==}",
        "llm.config={model_type: t5, x: !!set {a, b}}", "a..b=1", "=1", ".=1", "a" * 300 + "=1", ".".join("a" * 100) + "=1",
    ],
)  # fmt: skip
def test_nonsense_is_a_mistake_of_the_recipe(tmp_path: Path, override: str) -> None:
    data = {"data": {"train": "a.tsv", "validation": "b.tsv"}}
    path = write(tmp_path, training=data)
    assert len(str(refusal(path, override))) < 2000
    with pytest.raises(RecipeError):
        load_recipe(path, [override, "fusion=add"])


def test_mistakes_of_overrides_are_told_at_once(tmp_path: Path) -> None:
    error = refusal(write(tmp_path), "training.epochs={", "nonsense", "name.x=1")
    assert len(error.evidence) == 3
    assert error.fact.endswith("has 3 mistakes.")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nllm: {model: x}\nslm: {model: y}\nname: b\n", encoding="utf-8")
    assert "'name' is given twice" in str(refusal(str(path)))


def test_times_and_dates_are_text(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["llm.model=1:30", "slm.model=2001-01-01"])
    assert (recipe.llm.model, recipe.slm.model) == ("1:30", "2001-01-01")


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = Path(write(tmp_path))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_recipe(str(path)).name == "mine"


@pytest.mark.slow
def test_mutated_recipes_and_overrides_end_in_a_recipe_error(tmp_path: Path) -> None:
    chance, path = random.Random(23), tmp_path / "mutated.yaml"
    original = (RECIPES / "tatoeba-en-fr.yaml").read_bytes().partition(b"\nname")[2]
    original, refused = b"name" + original, 0
    for number in range(300):
        raw = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(raw))
            raw[at : at + chance.choice((0, 0, 1, 5))] = chance.choice((*PUT_INTO_YAML, bytes([chance.randrange(256)])))
        key = chance.choice(
            ("training.epochs", "training.seed", "llm.config", "fusion", "llm", "generation.max_new_tokens")
        )
        value = b"".join(chance.choices(PUT_INTO_YAML, k=chance.randint(1, 3))).decode("utf-8", "replace")
        path.write_bytes(raw if number % 2 else original)
        try:
            load_recipe(str(path), [] if number % 2 else [f"{key}={value}"])
        except RecipeError:
            refused += 1
    assert 150 < refused <= 300
