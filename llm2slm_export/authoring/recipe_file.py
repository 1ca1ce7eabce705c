"""Recipe files: found by name, read, and changed by overrides."""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llm2slm_export.authoring.recipe import Recipe
from llm2slm_export.errors import RecipeError
from llm2slm_export.files.bounded_yaml import MOST_CHARACTERS, MOST_DEPTH, parse_yaml, require_plain
from llm2slm_export.files.validation_problems import shortened, validation_problems


def recipe_directories() -> list[Path]:
    """The search path for recipes by name: the installed package, then the source tree."""
    package = Path(str(resources.files("llm2slm_export")))
    return [d for d in (package / "recipes", package.parent / "recipes") if d.is_dir()]


def list_recipes() -> list[Path]:
    """Every recipe that ships with the package, sorted by name."""
    found = {path.stem: path for d in reversed(recipe_directories()) for path in d.glob("*.yaml")}
    return [found[name] for name in sorted(found)]


def find_recipe(name: str) -> Path:
    """The file of a recipe, given as a path or as the name of a recipe that ships with the package."""
    path = Path(name)
    try:
        if path.is_file():
            return path
    except OSError:  # the name is too long, or its directory is not readable
        pass
    known = {p.stem: p for p in list_recipes()}
    if name in known:
        return known[name]
    raise RecipeError(
        f"There is no recipe {name!r}.",
        f"not a file: {os.path.abspath(name)}",
        f"recipes in the package: {', '.join(known) or 'none'}",
        remedy="give the path of a YAML file, or a name from `llm2slm-export recipes ls`",
    )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        name: a path, or the name of a recipe that ships with the package.
        overrides: `key.sub=value`; the value is parsed as YAML.

    Raises:
        RecipeError: every mistake in the file and the overrides, in one error.
    """
    path = find_recipe(name)
    mistakes: list[str] = []
    raw = _file(path, mistakes)
    readable = not mistakes
    for override in overrides:
        _override(raw, override, mistakes)
    recipe = None
    # An unreadable file has one mistake; its missing fields are not mistakes of their own.
    if readable:
        try:
            recipe = Recipe.model_validate(raw)
        except ValidationError as error:
            mistakes.extend(validation_problems(error, Recipe, whole="recipe"))
    if recipe is None or mistakes:
        raise RecipeError(
            f"{path} has {len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}.",
            *mistakes,
            remedy="fix these fields; `llm2slm-export recipes show tatoeba-en-fr` prints a complete recipe",
        )
    return recipe


def _file(path: Path, mistakes: list[str]) -> dict[str, Any]:
    """The file's mapping. If it has none, append the mistake and return an empty mapping."""
    try:
        with path.open("rb") as file:
            raw = parse_yaml(file.read(4 * MOST_CHARACTERS).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        mistakes.append(f"the file is not UTF-8: {error.reason} at byte {error.start}")
    except ValueError as error:
        mistakes.append(f"the file is not YAML that a recipe can hold: {error}")
    else:
        if isinstance(raw, dict):
            return raw
        mistakes.append(f"the file does not hold a mapping (got: {type(raw).__name__})")
    return {}


def _override(raw: dict[str, Any], override: str, mistakes: list[str]) -> None:
    """Set the override's field, or append its mistake."""
    shown = shortened(override)
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        mistakes.append(f"{shown} is not an override; write key.sub=value, for example training.epochs=5")
        return
    if len(parents) >= MOST_DEPTH:
        mistakes.append(f"{shown} nests deeper than {MOST_DEPTH} levels")
        return
    try:
        value = parse_yaml(text)
        require_plain(key)
    except ValueError as error:
        mistakes.append(f"{shown}: {error}")
        return
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            mistakes.append(
                f"{shown}: {parent!r} is not a section of the recipe, it holds {shortened(child)}; write key.sub=value with its keys"
            )
            return
        node = child
    node[last] = value
