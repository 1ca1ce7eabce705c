"""What to type next: the first command that has not been run yet, by what lies where. Shown, never run."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm2slm_export.authoring.composition import COMPOSITION_FILE
from llm2slm_export.authoring.pair_sources import run_directory
from llm2slm_export.authoring.recipe import Recipe, load_recipe
from llm2slm_export.authoring.training.inputs import TrainingPart, is_made
from llm2slm_export.bundle.manifest import MANIFEST_FILE

if TYPE_CHECKING:
    from llm2slm_export.evaluation.compared_systems import EvaluationRequest

_LONGEST = 60  # characters of a prompt that is shown as an example


def example_prompt(prompts: Sequence[str]) -> str:
    """The first prompt that one line of a shell shows well, quoted for it; cut where all are long."""
    plain = [prompt for prompt in prompts if prompt.isprintable() and prompt.strip() and not prompt.startswith("-")]
    if not plain:
        return '"How are you?"'
    first = next((prompt for prompt in plain if len(prompt) <= _LONGEST), None)
    return shlex.quote(first or plain[0][:_LONGEST].rsplit(" ", 1)[0])


def after_copying(recipe: Path) -> str:
    """After `recipes cp`: training the LLM where it is not there and the recipe can make it, else the pair."""
    loaded, named = load_recipe(str(recipe)), shlex.quote(str(recipe))
    if loaded.llm.config is not None and not is_made(loaded, "llm"):
        return f"train {named} --only llm"
    return f"train {named}"


def after_training(named: str, recipe: Recipe, part: TrainingPart, target: Path) -> str:
    """After `train`: what the result is for.

    Args:
        named: the recipe as the user named it.
        target: what was written.
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
    # A pair that is there was trained with another model.
    return f"train {typed}{changed}" + (" --force" if trained else "")


def after_evaluation(
    choice: "EvaluationRequest", data: Path, fields: Mapping[str, str | None], composition: str | None
) -> str:
    """After `eval`: the comparison that was not made and can be, else `bench` with the same systems.

    Args:
        fields: of the data, as they were typed.
        composition: where the bundle's composition is, where it is at hand.
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
    """Whether the LLM of a composition is a local one that can write by itself, as far as its config.json says."""
    from llm2slm_export.authoring.composition import read_composition

    path = composition / read_composition(composition).llm.model / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return any("Generation" in name or "LMHead" in name or "CausalLM" in name for name in fields["architectures"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
