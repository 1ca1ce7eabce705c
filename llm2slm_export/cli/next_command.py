"""The next command to run, by which results exist already. It is printed, never run."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm2slm_export.authoring.composition import COMPOSITION_FILE
from llm2slm_export.authoring.pair_sources import run_directory
from llm2slm_export.authoring.recipe import Recipe
from llm2slm_export.authoring.recipe_file import load_recipe
from llm2slm_export.authoring.training.inputs import TrainingPart, is_made
from llm2slm_export.bundle.manifest import MANIFEST_FILE

if TYPE_CHECKING:
    from llm2slm_export.evaluation.compared_systems import EvaluationRequest

_LONGEST = 60  # characters of an example prompt


def example_prompt(prompts: Sequence[str]) -> str:
    """The first prompt that fits a shell's line, quoted for the shell; a long one is cut if no other fits."""
    plain = [prompt for prompt in prompts if prompt.isprintable() and prompt.strip() and not prompt.startswith("-")]
    if not plain:
        return '"How are you?"'
    first = next((prompt for prompt in plain if len(prompt) <= _LONGEST), None)
    return shlex.quote(first or plain[0][:_LONGEST].rsplit(" ", 1)[0])


def after_copying(recipe: Path) -> str:
    """After `recipes cp`: train the LLM if it does not exist and the recipe can make it, else train the pair."""
    loaded, named = load_recipe(str(recipe)), shlex.quote(str(recipe))
    if loaded.llm.config is not None and not is_made(loaded, "llm"):
        return f"train {named} --only llm"
    return f"train {named}"


def after_training(named: str, recipe: Recipe, part: TrainingPart, target: Path) -> str:
    """After `train`: the command that uses the result.

    Args:
        named: the recipe as the user typed it.
        target: the directory that was written.
    """
    typed, out = shlex.quote(named), shlex.quote(str(target))
    pair, bundle = run_directory(recipe.name, "pair"), Path("engines") / recipe.name
    trained, built = (pair / COMPOSITION_FILE).is_file(), (bundle / MANIFEST_FILE).is_file()
    if part == "pair":
        way = typed if target == pair else f"--composition {out}"
        return f"build {way}" + (" --force" if built else "")
    if part == "slm-alone":
        if not trained:
            return f"train {typed}"
        if not built:
            return f"build {typed}"
        held_out = recipe.training.data.validation if recipe.training is not None else "FILE"
        other = "" if target == pair.with_name("slm-alone") else f"={out}"
        return f"eval {bundle} --data {shlex.quote(held_out)} --baseline slm{other}"
    model = recipe.llm.model if part == "llm" else recipe.slm.model
    changed = "" if model is not None and Path(model) == target else f" {part}.model={out}"
    # An existing pair was trained with another model.
    return f"train {typed}{changed}" + (" --force" if trained else "")


def after_evaluation(
    choice: "EvaluationRequest", data: Path, fields: Mapping[str, str | None], composition: str | None
) -> str:
    """After `eval`: the same with the comparisons that are missing, else `bench` with the same systems.

    Args:
        fields: the data's fields, as they were typed.
        composition: the directory of the bundle's composition; None: it was not found.
    """
    bundle = shlex.quote(str(choice.bundle)) + (f" --head {choice.head}" if choice.head is not None else "")
    more = [*choice.baselines]
    if composition is not None:
        names = {baseline.partition("=")[0] for baseline in more}
        if "llm" not in names and _writes(Path(composition)):
            more.append("llm")
        if "slm" not in names and Path(composition).with_name("slm-alone").is_dir():
            more.append("slm")
    baselines = "".join(f" --baseline {shlex.quote(baseline)}" for baseline in more)
    given = f" --composition {shlex.quote(str(choice.composition))}" if choice.composition is not None else ""
    controls = choice.controls or composition is None
    if len(more) == len(choice.baselines) and controls:
        return f"bench {bundle}{given}{baselines}"
    typed = "".join(f" --{name}-field {shlex.quote(field)}" for name, field in fields.items() if field is not None)
    wanted = "" if composition is None else " --controls"
    return f"eval {bundle} --data {shlex.quote(str(data))}{typed}{given}{baselines}{wanted}"


def _writes(composition: Path) -> bool:
    """Whether the LLM of a composition is local and can generate by itself, by its config.json."""
    from llm2slm_export.authoring.composition import read_composition

    path = composition / read_composition(composition).llm.model / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return any("Generation" in name or "LMHead" in name or "CausalLM" in name for name in fields["architectures"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
