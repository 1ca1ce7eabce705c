"""Baselines: a model alone as a bundle (LLM alone, SLM alone), with the pair's runtime and, if possible, its precision.

The bundle is a pair of the model with itself. With `add`, an untrained projector of zeros gives exactly the model's own
output; its encoder graph is not run.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llm2slm_export.authoring.build import build
from llm2slm_export.authoring.build_options import BuildOptions
from llm2slm_export.authoring.models.compatibility import positions_known
from llm2slm_export.authoring.models.loading import load_config
from llm2slm_export.authoring.models.pairing import PairConfig, compose_untrained
from llm2slm_export.authoring.recipe import ModelSource
from llm2slm_export.authoring.training.trainable import refuse_encoder_only
from llm2slm_export.bundle.bundle import Bundle, open_bundle
from llm2slm_export.bundle.files import file_entries
from llm2slm_export.bundle.manifest import MANIFEST_FILE, Manifest
from llm2slm_export.bundle.parity_report import ParityError
from llm2slm_export.contract import GRAPHS, GraphName, Precision
from llm2slm_export.errors import CompositionError
from llm2slm_export.files.names import safe_name


@dataclass(frozen=True)
class BaselineBundle:
    """The bundle of a model alone.

    Args:
        bundle: the opened bundle.
        note: why its precision differs from the pair's; None if it does not, or was requested.
    """

    bundle: Bundle
    note: str | None = None


def standalone_bundle(
    model: Path,
    tokenizer: Path,
    like: Manifest,
    directory: Path,
    *,
    precision: Mapping[GraphName, Precision] | None = None,
) -> BaselineBundle:
    """The bundle of one model alone, in `directory`; an existing one is reused.

    Args:
        model: a transformers directory with the language-model head.
        tokenizer: a directory with its tokenizer.
        like: the pair's manifest, for template, limits and precisions.
        directory: of baseline bundles.
        precision: precision of each graph; None: the pair's, or fp32 if parity fails at the pair's.

    Raises:
        CompositionError: the model is missing, or has no decoder or head.
        ParityError: its graphs do not match it.
    """
    wanted = precision or {name: graph.precision for name, graph in like.graphs.items()}
    finest: dict[GraphName, Precision] = dict.fromkeys(GRAPHS, "fp32")
    made = _target(model, tokenizer, like, directory, wanted)
    # Its existence records that an earlier build failed parity at `wanted`.
    instead = _target(model, tokenizer, like, directory, finest, instead_of=wanted)
    if not _is_there(made) and (precision is not None or not _is_there(instead)):
        try:
            _build(model, tokenizer, like, made, wanted)
        except ParityError:
            if precision is not None or wanted == finest:
                raise
            _build(model, tokenizer, like, instead, finest)
    if _is_there(made):
        return BaselineBundle(open_bundle(made))
    shown = ", ".join(f"{name}={wanted[name]}" for name in GRAPHS)
    return BaselineBundle(
        open_bundle(instead), f"it is at fp32, because it fails the parity check at the pair's precision, {shown}"
    )


def _is_there(bundle: Path) -> bool:
    return (bundle / MANIFEST_FILE).is_file()


def _build(
    model: Path, tokenizer: Path, like: Manifest, target: Path, precision: Mapping[GraphName, Precision]
) -> None:
    source = ModelSource(model=str(model), tokenizer=str(tokenizer))
    model_with: Any = SimpleNamespace(config=load_config(str(model)))
    known = positions_known(model_with)
    pair_config = PairConfig(
        prompt_template=like.template,
        # A model with fewer positions than the pair's maximum: longer prompts are refused or truncated.
        max_prompt_tokens=like.max_prompt_tokens if known is None else min(like.max_prompt_tokens, known),
        max_new_tokens=like.generation.max_new_tokens,
    )
    build(
        compose_untrained(source, source, pair_config=pair_config, name=target.name),
        target,
        BuildOptions(precision),
    )


def require_decoder(model: Path, what: str, option: str) -> None:
    """Refuse a directory without a model that can generate text.

    Raises:
        CompositionError: the directory has no model, or the model has no decoder.
    """
    if not (model / "config.json").is_file():
        raise CompositionError(
            f"{what} was not found.", f"looked for {model / 'config.json'}", remedy=f"give its directory: {option}=DIR"
        )
    refuse_encoder_only(str(model), None, option)


def _target(
    model: Path,
    tokenizer: Path,
    like: Manifest,
    directory: Path,
    precision: Mapping[GraphName, Precision],
    *,
    instead_of: Mapping[GraphName, Precision] | None = None,
) -> Path:
    """The directory of a baseline bundle, named by a hash of what it depends on."""
    digest = hashlib.sha256()
    for source in (model, tokenizer):
        for entry in file_entries(source):
            digest.update(f"{entry.path} {entry.sha256}".encode())
    facts = [like.template, like.max_prompt_tokens, like.generation.max_new_tokens, like.tool_versions]
    precisions = [[(name, used[name]) for name in GRAPHS] if used else None for used in (precision, instead_of)]
    digest.update(repr([facts, precisions]).encode())
    return directory / f"{safe_name(model.resolve().name)}-{digest.hexdigest()[:12]}"
