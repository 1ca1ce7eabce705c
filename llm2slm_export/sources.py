"""Which pair a command means: a recipe, a composition, or two models. Says what it is before any model is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from llm2slm_export.contract import GRAPHS, GraphName, Precision
from llm2slm_export.errors import CompositionError, UsageError

if TYPE_CHECKING:
    from llm2slm_export.models.loading import LoadedPair
    from llm2slm_export.recipe import ModelSource, Recipe

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class PairSource:
    """A pair that can be loaded: its name, the precision its recipe asks for, and the call that loads it."""

    name: str
    load: Callable[[], "LoadedPair"]
    precision: Mapping[GraphName, Precision] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildChoice:
    """What the user gave `build` to say which pair: exactly one of the three ways."""

    recipe: str | None = None
    composition: Path | None = None
    llm: str | None = None
    slm: str | None = None
    random_weights: bool = False
    seed: int | None = None


def run_directory(name: str, part: str) -> Path:
    """Where `train` writes a part of a recipe's pair where nothing else is said."""
    return Path("runs") / name / part


def parse_precision(text: str | None, default: Mapping[GraphName, Precision]) -> dict[GraphName, Precision]:
    """`int8`, or `encoder=int8,decoder=int8`; graphs not named keep `default`, and fp32 where that says nothing.

    Raises:
        UsageError: with every part that is not a precision or not a graph.
    """
    chosen: dict[GraphName, Precision] = {graph: default.get(graph, "fp32") for graph in GRAPHS}
    problems = []
    for part in (text or "").split(",") if text is not None else ():
        name, equals, value = part.strip().rpartition("=")
        graphs = [graph for graph in GRAPHS if graph == name] if equals else list(GRAPHS)
        precisions = [precision for precision in PRECISIONS if precision == value]
        if not graphs:
            problems.append(f"{part.strip()!r}: there is no graph {name!r}")
        if not precisions:
            problems.append(f"{part.strip()!r}: there is no precision {value!r}")
        chosen |= {graph: precision for graph in graphs for precision in precisions}
    if problems:
        raise UsageError(
            f"--precision {text!r} cannot be read.",
            *problems,
            remedy=f"use {' or '.join(PRECISIONS)}, or GRAPH=PRECISION,… with the graphs {', '.join(GRAPHS)}",
        )
    return chosen


def one_model_pair(
    recipe: str | None, llm: str | None, slm: str | None
) -> "tuple[Recipe | None, ModelSource, ModelSource]":
    """The two models a `plan` is about, from a recipe or by name.

    Raises:
        UsageError: neither, both, or half of the two.
        RecipeError: the recipe cannot be read.
    """
    from llm2slm_export.recipe import ModelSource, load_recipe

    _exactly_one({"RECIPE": recipe is not None, "--llm and --slm": llm is not None or slm is not None})
    if recipe is not None:
        loaded = load_recipe(recipe)
        return loaded, loaded.llm, loaded.slm
    llm, slm = _both(llm, slm)
    return None, ModelSource.model_validate({"model": llm}), ModelSource.model_validate({"model": slm})


def pair_source(choice: BuildChoice) -> PairSource:
    """The pair that `build` was asked for.

    Raises:
        UsageError: none or several ways given, or an option that does not go with the way.
        RecipeError, CompositionError: it cannot be read, or has not been trained.
    """
    models = choice.llm is not None or choice.slm is not None
    _exactly_one({
        "RECIPE": choice.recipe is not None, "--composition": choice.composition is not None, "--llm and --slm": models,
    })  # fmt: skip
    if not models:
        given = "--random-weights" if choice.random_weights else "--seed" if choice.seed is not None else None
        if given is not None:
            raise UsageError(f"{given} goes with --llm and --slm.", remedy=f"leave {given} out, or name two models")
    if choice.composition is not None:
        return _trained(choice.composition)
    if choice.recipe is not None:
        return _of_recipe(choice.recipe)
    return _of_models(choice)


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
    from llm2slm_export.models.loading import compose_untrained
    from llm2slm_export.recipe import ModelSource

    llm, slm = _both(choice.llm, choice.slm)
    name = f"{Path(llm).name}_{Path(slm).name}"
    load = partial(
        compose_untrained, ModelSource(model=llm), ModelSource(model=slm), random_weights=choice.random_weights,
        seed=choice.seed or 0, name=name,
    )  # fmt: skip
    return PairSource(name, load)


def _trained(directory: Path, precision: Mapping[GraphName, Precision] | None = None) -> PairSource:
    from llm2slm_export.composition import read_composition
    from llm2slm_export.models.loading import load_composition

    return PairSource(read_composition(directory).name, partial(load_composition, directory), precision or {})


def _of_recipe(name: str) -> PairSource:
    from llm2slm_export.composition import COMPOSITION_FILE
    from llm2slm_export.recipe import load_recipe

    recipe = load_recipe(name)
    directory = run_directory(recipe.name, "pair")
    if (directory / COMPOSITION_FILE).is_file():
        return replace(_trained(directory, recipe.export.precision), name=recipe.name)
    if recipe.training is None:
        return PairSource(recipe.name, partial(_untrained, recipe), recipe.export.precision)
    raise CompositionError(
        f"The pair of the recipe {recipe.name!r} has not been trained here.",
        f"looked for {directory / COMPOSITION_FILE}, from {Path.cwd()}",
        remedy=f"llm2slm-export train {name}, or give --composition DIR if it is elsewhere",
    )


def _untrained(recipe: "Recipe") -> "LoadedPair":
    """A recipe's two models as they come, with a fresh projector and the recipe's template and limits."""
    from llm2slm_export.models.loading import compose_untrained

    llm, slm = recipe.llm.model, recipe.slm.model
    if llm is None or slm is None or recipe.fusion != "add":
        raise CompositionError(
            f"The recipe {recipe.name!r} cannot be built untrained.",
            f"llm.model: {llm}, slm.model: {slm}, fusion: {recipe.fusion}",
            remedy="name both models and use `fusion: add`, or add a `training` section and run `llm2slm-export train`",
        )
    pair = compose_untrained(
        recipe.llm, recipe.slm, layer=recipe.llm.layer, d_hidden=recipe.projector.d_hidden, name=recipe.name
    )
    limits = recipe.generation
    changes = {
        "prompt_template": recipe.prompt_template,
        "max_prompt_tokens": limits.max_prompt_tokens,
        "max_new_tokens": limits.max_new_tokens,
    }
    return replace(pair, file=pair.file.model_copy(update=changes))
