"""A recipe over tiny data: repeat the prompt's last word."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm2slm_export.authoring.recipe import Recipe
from tests.support.tiny_models import LLM_CONFIG, SLM_CONFIGS


def tiny_recipe(directory: Path, save_model: Callable[..., Path], slm_type: str = "t5", **training: Any) -> Recipe:
    """A recipe whose LLM is random and whose SLM is made from a configuration; its data is in `directory`."""
    words = ["abc", "de", "fgh", "ij", "k"]
    prompts = [list(three) for three in itertools.product(words, repeat=3)]
    random.Random(0).shuffle(prompts)
    for name, rows in (("train", prompts[:96]), ("validation", prompts[96:112])):
        lines = [json.dumps({"prompt": " ".join(r), "response": r[-1]}) for r in rows]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    llm = str(save_model(LLM_CONFIG))
    settings = {
        "data": {"train": str(directory / "train.jsonl"), "validation": str(directory / "validation.jsonl")},
        "epochs": 2, "batch_size": 16, "learning_rate": 0.01, "warmup_steps": 2, "bf16": False,
    } | training  # fmt: skip
    return Recipe.model_validate({
        "name": "tiny", "llm": {"model": llm}, "slm": {"config": SLM_CONFIGS[slm_type], "tokenizer": llm},
        "training": settings,
    })  # fmt: skip


def changed(recipe: Recipe, **sections: Any) -> Recipe:
    """The recipe with some keys of its sections replaced: changed(recipe, slm={"model": "x", "config": None})."""
    fields = recipe.model_dump()
    for section, values in sections.items():
        fields[section] = fields[section] | values if isinstance(values, dict) else values
    return Recipe.model_validate(fields)
