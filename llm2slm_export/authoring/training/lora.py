"""Low-rank adapters on a model's linear layers, through peft: added in place, merged before the model is saved."""

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llm2slm_export.authoring.recipe import LoraSettings
from llm2slm_export.errors import CompositionError, require_extra


class Adapters:
    """The low-rank adapters of one model. The model's own weights are frozen, and its class is unchanged.

    Args:
        model: a transformers model, changed in place.
        settings: rank, scale and target layers.
        without: a part of the model that gets no adapters.

    Raises:
        MissingExtraError: peft is not installed.
        CompositionError: a target does not exist, is not linear, or is the input embedding table.
    """

    def __init__(self, model: nn.Module, settings: LoraSettings, *, without: nn.Module | None = None) -> None:
        require_extra("train", "peft", purpose="`training.slm: lora`")
        from peft.tuners.lora import LoraConfig, LoraModel

        targets = _targets(model, settings, without)
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
            fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
        )
        self._tuner: Any = LoraModel(model, config, "default")

    def merge(self) -> None:
        """Merge the adapters into the model's weights, and remove them."""
        self._tuner.merge_and_unload(safe_merge=True)


def _targets(model: nn.Module, settings: LoraSettings, without: nn.Module | None) -> list[str]:
    """The full names of the target layers.

    peft does not match them, because it ignores unknown names, and adapts embeddings, which may be tied to the LM head.
    """
    transformer: Any = model
    head, table = transformer.get_output_embeddings(), transformer.get_input_embeddings()
    kept_out = {id(module) for module in without.modules()} if without is not None else set()
    free = {name: module for name, module in model.named_modules() if name and id(module) not in kept_out}
    linear = {name for name, module in free.items() if isinstance(module, nn.Linear | Conv1D)}
    if settings.target_modules == "all-linear":
        return sorted(name for name in linear if free[name] is not head)
    problems, found = [], set[str]()
    for wanted in settings.target_modules:
        named = {name for name in free if name == wanted or name.endswith(f".{wanted}")}
        if not named:
            problems.append(f"there is no {wanted!r}")
        problems += [f"{name} is a {type(free[name]).__name__}" for name in sorted(named - linear)]
        tied = sorted(name for name in named & linear if free[name].weight is table.weight)
        problems += [f"{name} shares its weight with the input embeddings" for name in tied]
        found |= named
    if problems:
        endings = sorted({re.sub(r".*\.", "", name) for name in linear if free[name] is not head})
        raise CompositionError(
            "training.lora.target_modules must name linear layers only.",
            *problems[:10],
            *([f"and {len(problems) - 10} more"] if len(problems) > 10 else []),
            f"linear layers of the SLM: {', '.join(endings)}",
            remedy="name some of these, or use all-linear",
        )
    return sorted(found)
