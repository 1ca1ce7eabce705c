"""The inputs of a training run (data, models, tokenizers), and the check that they exist. Needs no torch."""

import re
from pathlib import Path
from typing import Literal, get_args

from llm2slm_export.authoring.recipe import ModelSource, Recipe, TrainingSettings
from llm2slm_export.authoring.recipe_file import find_recipe
from llm2slm_export.authoring.training.pairs import is_file_name
from llm2slm_export.errors import DataError, RecipeError

TrainingPart = Literal["pair", "llm", "slm", "slm-alone"]
PARTS: tuple[TrainingPart, ...] = get_args(TrainingPart)


def training_settings(recipe: Recipe) -> TrainingSettings:
    """The recipe's `training` section.

    Raises:
        RecipeError: the recipe has none.
    """
    if recipe.training is None:
        raise RecipeError(
            f"The recipe {recipe.name!r} has no `training` section.", remedy="add one, or `build` the recipe untrained"
        )
    return recipe.training


def from_scratch(source: ModelSource, part: TrainingPart) -> bool:
    """Whether a model is created from its configuration.

    Models trained alone (`llm`, `slm`) are, if they have a configuration. The pair's SLM and its baseline (`slm-alone`)
    are only if the recipe names no model.
    """
    return source.config is not None and (part in ("llm", "slm") or source.model is None)


def sources_read(recipe: Recipe, part: TrainingPart) -> dict[str, str]:
    """The data, tokenizers and models that a run reads, as paths or names, by recipe key."""
    settings = training_settings(recipe)
    read: dict[str, str | None] = {
        "training.data.train": settings.data.train,
        "training.data.validation": settings.data.validation,
    }
    if part != "llm" and settings.teacher is not None:
        read["training.teacher.further_prompts"] = settings.teacher.further_prompts
    trained, name = (recipe.llm, "llm") if part == "llm" else (recipe.slm, "slm")
    read_llm = part == "pair" or (part != "llm" and settings.teacher is not None)
    read[f"{name}.tokenizer"] = trained.tokenizer
    if read_llm:
        read["llm.tokenizer"] = recipe.llm.tokenizer
        read["llm.model"] = recipe.llm.model
    if not from_scratch(trained, part):
        read[f"{name}.model"] = trained.model
    return {key: source for key, source in read.items() if source is not None}


def refuse_missing(recipe: Recipe, part: TrainingPart, named: str) -> None:
    """Refuse a recipe with missing inputs, and list the commands that create or fetch them, in order.

    Names that may be a hub's are left to the loader.

    Args:
        recipe: the recipe.
        part: what is trained.
        named: the recipe's name or path, as given by the user.

    Raises:
        DataError: the message lists every missing input.
    """
    missing = {key: place for key, place in sources_read(recipe, part).items() if _is_missing(recipe, key, place)}
    if not missing:
        return
    commands = _missing_commands(recipe, missing, named)
    numbered = [f"{number}. {command}" for number, command in enumerate(commands, start=1)]
    if any("python demo/" in line for line in numbered) and not Path("demo").is_dir():
        numbered.append("demo/ is in the project's source tree, beside recipes/")
    raise DataError(
        f"Inputs of {named} are missing.",
        *(f"{key}: {place}" for key, place in missing.items()),
        *numbered,
        remedy=("run the numbered commands, or name" if commands else "name")
        + f" other files and models in {named} or with KEY=VALUE",
    )


def is_made(recipe: Recipe, name: Literal["llm", "slm"]) -> bool:
    """Whether a recipe's model exists, or may be a hub's."""
    source = recipe.llm if name == "llm" else recipe.slm
    return source.model is not None and not _is_missing(recipe, f"{name}.model", source.model)


def _is_missing(recipe: Recipe, key: str, place: str) -> bool:
    if key.startswith("training."):
        return is_file_name(place) and not _exists(place)
    source = recipe.llm if key.startswith("llm.") else recipe.slm
    here = is_file_name(place) or ("/" in place and Path(place).parent.is_dir())
    # A model with a configuration is a directory that `train --only` writes.
    made = key.endswith(".model") and source.config is not None and "/" in place
    return (here or made) and not _exists(place)


def _exists(place: str) -> bool:
    try:
        return Path(place).exists()
    except OSError:  # a name that is too long
        return False


def _missing_commands(recipe: Recipe, missing: dict[str, str], named: str) -> list[str]:
    """Commands that create missing inputs: those in the recipe's first comment, in its order, then `train --only`."""
    known, wanted = _commands(find_recipe(named)), list(missing.values())
    found: set[str] = set()
    while wanted:
        command = _writing(wanted.pop(), known)
        if command is not None and command not in found:
            found.add(command)
            # The command's own inputs may be missing too.
            wanted += [word for word in command.split() if "/" in word and not _exists(word)]
    made = [command for command in known if command in found]
    for name, source in (("llm", recipe.llm), ("slm", recipe.slm)):
        place = missing.get(f"{name}.model")
        if place is not None and source.config is not None:
            elsewhere = "" if Path(place) == Path("runs") / recipe.name / name else f" --out {place}"
            made.append(f"llm2slm-export train {named} --only {name}{elsewhere}")
    return made


def _writing(place: str, commands: list[str]) -> str | None:
    """The command whose last path is `place`, or else its directory: the last path is the output."""
    for wanted in (place, str(Path(place).parent)):
        for command in commands:
            words = command.split()
            if wanted in words and words.index(wanted) == _last_path(words):
                return command
    return None


def _last_path(words: list[str]) -> int:
    """The index of a command's last path, its output."""
    return max(index for index, word in enumerate(words) if "/" in word and not word.startswith("-"))


def _commands(file: Path) -> list[str]:
    """The commands in a recipe's first comment, each on one line."""
    lines = []
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [" ".join(line.split()) for line in joined.splitlines() if line.startswith("python ") and "/" in line]
