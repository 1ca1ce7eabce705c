"""The recipe: a YAML file that defines a pair and how it is trained and exported. Data, never code."""

import difflib
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llm2slm_export.contract import Fusion, GraphName, Precision, TokenizerStrategy
from llm2slm_export.errors import RecipeError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelSource(_Part):
    """Where a model comes from: `model` (alias, hub id or local directory), or `config` (train it from scratch).

    With both, `train --only` makes the model from `config`, and the pair starts from `model`.
    """

    model: str | None = None
    revision: str | None = None
    tokenizer: str | None = Field(
        default=None, description="directory or hub id; the model's own where it is not given"
    )
    config: dict[str, Any] | None = Field(default=None, description="a transformers configuration with its model_type")

    @model_validator(mode="after")
    def _has_a_source(self) -> "ModelSource":
        if self.model is None and self.config is None:
            raise ValueError("needs `model` (an alias, a hub id or a directory) or `config` (an architecture)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs a `model_type`, for example t5")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("`config` needs a `tokenizer` beside it: a model made from scratch brings none")
        return self


class LlmSource(ModelSource):
    layer: int | Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        default=-1, description="index into the LLM's hidden states, -1 is its output; several are fused, learned"
    )


class ProjectorSettings(_Part):
    """`mlp`: Linear → ReLU → Linear, output layer zero-initialised; `d_hidden` defaults to the SLM's width.
    `identity`: the LLM's hidden states as they are."""

    kind: Literal["mlp", "identity"] = "mlp"
    d_hidden: int | None = Field(default=None, gt=0)
    activation: Literal["relu"] = "relu"


class DataSettings(_Part):
    """Prompt and response pairs: JSONL, TSV (by file ending) or the name of a `datasets` data set."""

    train: str
    validation: str
    prompt_field: str | int = Field(default="prompt", description="JSONL or data set key, or TSV column number from 0")
    response_field: str | int = "response"


class TrainingSettings(_Part):
    data: DataSettings
    epochs: float = Field(default=3.0, gt=0)
    batch_size: int = Field(default=128, gt=0)
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    lr_scheduler: str = "linear"
    warmup_steps: int = Field(default=200, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    bf16: bool = True
    seed: int = 0
    max_prompt_tokens: int = Field(default=256, gt=0)
    max_response_tokens: int = Field(default=256, gt=0)
    evaluations_per_epoch: int = Field(default=1, gt=0)
    cache_hidden_states: bool = Field(
        default=True, description="encode every prompt once and keep its hidden states on disk"
    )


class ExportSettings(_Part):
    precision: dict[GraphName, Precision] = Field(default_factory=dict, description="fp32 where nothing is said")


class GenerationDefaults(_Part):
    """What `run` uses where the caller says nothing, and the longest prompt the pair is meant for."""

    max_new_tokens: int = Field(default=128, gt=0)
    max_prompt_tokens: int = Field(default=512, gt=0)


class Recipe(_Part):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    llm: LlmSource
    slm: ModelSource
    fusion: Fusion = "add"
    tokenizer: TokenizerStrategy = "shared"
    prompt_template: str = "{prompt}"
    projector: ProjectorSettings = ProjectorSettings()
    training: TrainingSettings | None = None
    export: ExportSettings = ExportSettings()
    generation: GenerationDefaults = GenerationDefaults()

    @field_validator("prompt_template")
    @classmethod
    def _has_the_prompt(cls, template: str) -> str:
        if template != "chat" and template.count("{prompt}") != 1:
            raise ValueError("must hold {prompt} exactly once, or be `chat` for the LLM's own chat template")
        return template


def recipe_directories() -> list[Path]:
    """Where recipes named without a path are looked for: inside the installed package, then beside the source tree."""
    package = Path(str(resources.files("llm2slm_export")))
    return [d for d in (package / "recipes", package.parent / "recipes") if d.is_dir()]


def list_recipes() -> list[Path]:
    """Every recipe that comes with the package, by name."""
    found = {path.stem: path for d in reversed(recipe_directories()) for path in d.glob("*.yaml")}
    return [found[name] for name in sorted(found)]


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or as the name of one that comes with the package."""
    path = Path(name)
    if path.is_file():
        return path
    known = {p.stem: p for p in list_recipes()}
    if name in known:
        return known[name]
    raise RecipeError(
        f"There is no recipe {name!r}.",
        f"not a file: {os.path.abspath(name)}",
        f"recipes that come with the package: {', '.join(known) or 'none'}",
        remedy="give the path of a YAML file, or a name from `llm2slm-export recipes ls`",
    )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        name: a path, or the name of a recipe that comes with the package.
        overrides: `key.sub=value`, the value read as YAML.

    Raises:
        RecipeError: with every mistake in the file and the overrides at once.
    """
    path = find_recipe(name)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML.", str(error), remedy="mend the file") from error
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} does not hold a mapping.", f"got: {type(raw).__name__}", remedy="see `llm2slm-export recipes ls`"
        )
    for override in overrides:
        _override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(
            f"{path} has {error.error_count()} mistake{'s' if error.error_count() > 1 else ''}.",
            *_explain(error),
            remedy="mend the lines named; `llm2slm-export recipes show tatoeba-en-fr` prints a complete recipe",
        ) from error


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"{override!r} is not an override.", remedy="write key.sub=value, for example training.epochs=5"
        )
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(
                f"{override!r}: {parent!r} is not a section of the recipe.",
                f"it holds: {child!r}",
                remedy="write key.sub=value with the keys of the recipe file",
            )
        node = child
    node[last] = yaml.safe_load(value)


def _explain(error: ValidationError) -> Iterable[str]:
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(item["loc"][-1]), _keys_at(item["loc"][:-1]), n=1)
            yield f"{where}: unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
        elif item["type"] == "missing":
            yield f"{where}: required, not given"
        else:
            yield f"{where}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys the recipe has at a location, for near-miss suggestions."""
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
