"""The pair that a command is about: a recipe's, a composition, several heads, or two models. No model is loaded here."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llm2slm_export.contract import (
    DEFAULT_WEIGHT_QUANTIZATION,
    LLM_HEAD,
    MAIN,
    Fusion,
    GraphName,
    Precision,
    TokenizerStrategy,
    WeightQuantization,
)
from llm2slm_export.errors import CompositionError, UsageError
from llm2slm_export.files.names import joined_name

if TYPE_CHECKING:
    from llm2slm_export.authoring.models.pairing import LoadedPair, PairConfig
    from llm2slm_export.authoring.recipe import EngineSettings, LlmSource, ModelSource, Recipe
    from llm2slm_export.authoring.training_record import TrainingRecord


@dataclass(frozen=True)
class PairSource:
    """The pairs of a bundle to build.

    Args:
        name: the bundle's name.
        heads: the call that loads each head's pair.
        llm: the LLM that they share, with its resolved location.
        max_new_tokens: the first head's maximum response length.
        precision, weight_quantization, engines: the recipe's export settings.
        llm_head: precision of the LLM head's graphs in the recipe; None: there is no LLM head.
        inputs: the files and directories that the build reads.
        records: the training record of each head; None: it has none.
    """

    name: str
    heads: Mapping[str, Callable[[], "LoadedPair"]]
    llm: "LlmSource"
    max_new_tokens: int
    precision: Mapping[GraphName, Precision] = field(default_factory=dict)
    weight_quantization: WeightQuantization = DEFAULT_WEIGHT_QUANTIZATION
    engines: "EngineSettings | None" = None
    llm_head: Mapping[GraphName, Precision] | None = None
    inputs: tuple[Path, ...] = ()
    records: Mapping[str, "TrainingRecord | None"] = field(default_factory=dict)


@dataclass(frozen=True)
class FusionOptions:
    """The options that join two models given by name; None: not given."""

    fusion: Fusion | None = None
    tokenizer: TokenizerStrategy | None = None
    layer: str | None = None
    projector: Literal["mlp", "identity"] | None = None

    def given(self) -> list[str]:
        """The names of the options that are given."""
        return [f"--{name}" for name, value in vars(self).items() if value is not None]

    def pair_config(self) -> "PairConfig":
        """The pair's configuration, with defaults for options that are not given.

        Raises:
            UsageError: layers that are no numbers.
        """
        from llm2slm_export.authoring.models.pairing import PairConfig
        from llm2slm_export.authoring.recipe import ProjectorSettings

        return PairConfig(
            fusion=self.fusion or "add",
            tokenizer=self.tokenizer or "shared",
            layer=parse_layer(self.layer) if self.layer is not None else -1,
            projector=ProjectorSettings(kind=self.projector or "mlp"),
        )


@dataclass(frozen=True)
class BuildChoice:
    """The arguments of `build` that name the pair: a recipe, a composition, heads, or two models.

    `join`, `random_weights` and `seed` go with `llm` and `slm`. `llm_head`: add the LLM's own decoder as a head, even if a
    recipe does not say so.
    """

    recipe: str | None = None
    composition: Path | None = None
    heads: tuple[str, ...] = ()
    llm: str | None = None
    slm: str | None = None
    join: FusionOptions = FusionOptions()
    random_weights: bool = False
    seed: int | None = None
    llm_head: bool = False


def run_directory(name: str, part: str) -> Path:
    """The directory that `train` writes a part of a recipe's pair to by default."""
    return Path("runs") / name / part


@dataclass(frozen=True)
class NamedPair:
    """The two models of a `plan`, their configuration as a pair, and the recipe's export settings."""

    llm: "ModelSource"
    slm: "ModelSource"
    pair_config: "PairConfig"
    precision: Mapping[GraphName, Precision]
    weight_quantization: WeightQuantization
    llm_head: Mapping[GraphName, Precision] | None = None


def named_pair(recipe: str | None, llm: str | None, slm: str | None, join: FusionOptions) -> NamedPair:
    """The two models of a `plan`, from a recipe or by name.

    Raises:
        UsageError: no pair, two pairs, only one model, or options that do not go with the way the pair is named.
        RecipeError: the recipe cannot be read.
    """
    from llm2slm_export.authoring.models.pairing import PairConfig
    from llm2slm_export.authoring.recipe import ModelSource
    from llm2slm_export.authoring.recipe_file import load_recipe

    _exactly_one({"RECIPE": recipe is not None, "--llm and --slm": llm is not None or slm is not None})
    if recipe is not None:
        _refuse_with_names(join.given())
        loaded = load_recipe(recipe)
        return NamedPair(
            loaded.llm, loaded.slm, PairConfig.of(loaded), loaded.export.precision, loaded.export.weight_quantization,
            _llm_head_precision(loaded),
        )  # fmt: skip
    llm, slm = _both(llm, slm)
    return NamedPair(
        ModelSource(model=llm), ModelSource(model=slm), join.pair_config(), {}, DEFAULT_WEIGHT_QUANTIZATION
    )


def pair_source(choice: BuildChoice) -> PairSource:
    """The pair or pairs that `build` is to export.

    Raises:
        UsageError: no pair, several pairs, or options that do not go with the way the pair is named.
        RecipeError, CompositionError: the pair cannot be read, or has not been trained; or its LLM cannot be a head.
    """
    source = _pair_source(choice)
    if choice.llm_head and source.llm_head is None:
        source = replace(source, llm_head={})
    return source if source.llm_head is None else _with_llm_head(source, random_weights=choice.random_weights)


def _pair_source(choice: BuildChoice) -> PairSource:
    models = choice.llm is not None or choice.slm is not None
    _exactly_one({
        "RECIPE": choice.recipe is not None, "--composition": choice.composition is not None,
        "--head": bool(choice.heads), "--llm and --slm": models,
    })  # fmt: skip
    if not models:
        random = {"--random-weights": choice.random_weights, "--seed": choice.seed is not None}
        _refuse_with_names([*choice.join.given(), *(option for option, used in random.items() if used)])
    if choice.heads:
        return _of_heads(choice.heads)
    if choice.composition is not None:
        return _trained(choice.composition)
    if choice.recipe is not None:
        return _of_recipe(choice.recipe)
    return _of_models(choice)


def _with_llm_head(source: PairSource, *, random_weights: bool) -> PairSource:
    """The source with the LLM's own decoder as one more head, with the prompts of the first."""
    from llm2slm_export.authoring.models.llm_head import load_llm_head, require_llm_head

    (first, load), *_ = source.heads.items()
    if source.llm.model is not None:  # else the load of the first head says that it has none
        require_llm_head(source.llm, source.llm.layer, source.max_new_tokens, random_weights=random_weights)
    return replace(
        source,
        heads={**source.heads, LLM_HEAD: partial(load_llm_head, load, source.llm)},
        records={**source.records, LLM_HEAD: source.records.get(first)},
    )


def _llm_head_precision(recipe: "Recipe") -> Mapping[GraphName, Precision] | None:
    settings = recipe.export.llm_head
    return None if settings is None else {graph: settings.precision[graph] for graph in settings.precision}


def _refuse_with_names(options: list[str]) -> None:
    if options:
        raise UsageError(
            f"{', '.join(options)} {'goes' if len(options) == 1 else 'go'} with --llm and --slm.",
            remedy="leave out the options named, or name two models",
        )


def parse_layer(text: str) -> int | tuple[int, ...]:
    """One layer, `-1`, or several layers to fuse, `4,8,-1`.

    Raises:
        UsageError: the text is no list of whole numbers.
    """
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--layer {text!r} cannot be read.", remedy="give a whole number, or several: --layer 4,8,-1"
        ) from None
    return layers if len(layers) > 1 else layers[0]


def _of_heads(given: tuple[str, ...]) -> PairSource:
    named: dict[str, Path] = {}
    problems = []
    for item in given:
        name, equals, directory = item.partition("=")
        if not equals or not directory or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            problems.append(f"{item!r} is not NAME=COMPOSITION, with a name of letters, digits, - and _")
        elif name == LLM_HEAD:
            problems.append(f"{item!r}: the head {LLM_HEAD!r} is the LLM's own decoder (--llm-head)")
        elif name in named:
            problems.append(f"{item!r}: there is a head {name!r} already")
        else:
            named[name] = Path(directory)
    if problems:
        raise UsageError(
            "The heads cannot be read.", *problems, remedy="build --head fr=compositions/fr --head es=compositions/es"
        )
    heads: dict[str, Callable[[], LoadedPair]] = {}
    first: PairSource | None = None
    inputs: list[Path] = []
    records: dict[str, TrainingRecord | None] = {}
    for name, path in named.items():
        try:
            head = _trained(path)
            first = first or head
            heads[name] = head.heads[MAIN]
            inputs += head.inputs
            records[name] = head.records[MAIN]
        except CompositionError as error:
            problems += [f"{name}: {error.fact}", *error.evidence]
    if problems or first is None:
        raise CompositionError(
            f"{len(named) - len(heads)} of {len(named)} heads cannot be built.",
            *problems,
            remedy="give the directories that `llm2slm-export train` wrote",
        )
    return replace(first, name="_".join(heads), heads=heads, inputs=tuple(inputs), records=records)


def _exactly_one(ways: Mapping[str, bool]) -> None:
    given = [way for way, is_given in ways.items() if is_given]
    if len(given) != 1:
        raise UsageError(
            f"Give {' or '.join(ways)}.",
            f"given: {' and '.join(given) or 'none of them'}",
            remedy="`llm2slm-export recipes ls` lists recipes; --llm t5-xl --slm t5-small names two models",
        )


def _both(llm: str | None, slm: str | None) -> tuple[str, str]:
    if llm is None or slm is None:
        have, lack = ("--slm", "--llm") if llm is None else ("--llm", "--slm")
        raise UsageError(f"{have} {slm if llm is None else llm} is given without {lack}.", remedy=f"add {lack} MODEL")
    return llm, slm


def _of_models(choice: BuildChoice) -> PairSource:
    from llm2slm_export.authoring.models.pairing import compose_untrained
    from llm2slm_export.authoring.recipe import LlmSource, ModelSource

    llm, slm = _both(choice.llm, choice.slm)
    name, pair_config = joined_name(llm, slm), choice.join.pair_config()
    load = partial(
        compose_untrained, ModelSource(model=llm), ModelSource(model=slm), pair_config=pair_config,
        random_weights=choice.random_weights, seed=choice.seed or 0, name=name,
    )  # fmt: skip
    source = LlmSource(model=llm, layer=pair_config.layer)
    return PairSource(name, {MAIN: load}, source, pair_config.max_new_tokens, inputs=(Path(llm), Path(slm)))


def _trained(directory: Path) -> PairSource:
    from llm2slm_export.authoring.composition import read_composition
    from llm2slm_export.authoring.models.pairing import composition_llm, load_composition
    from llm2slm_export.authoring.training_record import read_record

    file = read_composition(directory)
    read = [directory / part for part in (file.llm.model, file.llm.tokenizer, file.slm.model) if part is not None]
    return PairSource(
        file.name, {MAIN: partial(load_composition, directory)}, composition_llm(directory, file), file.max_new_tokens,
        inputs=(directory, *read), records={MAIN: read_record(directory)},
    )  # fmt: skip


def _of_recipe(name: str) -> PairSource:
    from llm2slm_export.authoring.composition import COMPOSITION_FILE
    from llm2slm_export.authoring.recipe_file import find_recipe, load_recipe

    recipe, file = load_recipe(name), find_recipe(name)
    directory = run_directory(recipe.name, "pair")
    export = recipe.export
    if (directory / COMPOSITION_FILE).is_file():
        trained = _trained(directory)
        return replace(
            trained, name=recipe.name, precision=export.precision, weight_quantization=export.weight_quantization,
            engines=export.engines, llm_head=_llm_head_precision(recipe), inputs=(file, *trained.inputs),
        )  # fmt: skip
    if recipe.training is None:
        heads = {MAIN: partial(_untrained, recipe)}
        named = (recipe.llm.model, recipe.llm.tokenizer, recipe.slm.model, recipe.slm.tokenizer)
        inputs = (file, *(Path(part) for part in named if part is not None))
        return PairSource(
            recipe.name, heads, recipe.llm, recipe.generation.max_new_tokens, export.precision,
            export.weight_quantization, export.engines, _llm_head_precision(recipe), inputs,
        )  # fmt: skip
    raise CompositionError(
        f"The pair of the recipe {recipe.name!r} has not been trained here.",
        f"looked for {directory / COMPOSITION_FILE}, from {Path.cwd()}",
        remedy=f"llm2slm-export train {name}, or give --composition DIR if the composition is elsewhere",
    )


def _untrained(recipe: "Recipe") -> "LoadedPair":
    """The pair of a recipe without training: its two models, joined by a new projector."""
    from llm2slm_export.authoring.models.pairing import PairConfig, compose_untrained

    if recipe.llm.model is None or recipe.slm.model is None:
        raise CompositionError(
            f"The recipe {recipe.name!r} cannot be built untrained.",
            f"llm.model: {recipe.llm.model}, slm.model: {recipe.slm.model}",
            remedy="name both models, or add a `training` section and run `llm2slm-export train`",
        )
    return compose_untrained(recipe.llm, recipe.slm, pair_config=PairConfig.of(recipe), name=recipe.name)
