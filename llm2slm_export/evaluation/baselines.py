"""A model by itself, as a bundle: the LLM alone, the SLM alone, on the pair's runtime and, where it can, at its precision.

It is the pair of the model with itself: an untrained projector with `add` gives exactly what the SLM alone would
(DESIGN §3), and nothing of the reading half is run.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llm2slm_export.authoring.build import build
from llm2slm_export.authoring.models.loading import load_config
from llm2slm_export.authoring.models.pairing import PairConfig, compose_untrained, positions_known
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
    """A model by itself.

    Args:
        note: why its precision is another one than the pair's; None: it is the pair's, or the one that was asked for.
    """

    bundle: Bundle
    note: str | None = None


def alone_bundle(
    model: Path,
    tokenizer: Path,
    like: Manifest,
    directory: Path,
    *,
    precision: Mapping[GraphName, Precision] | None = None,
) -> BaselineBundle:
    """The bundle of one model by itself, in `directory`; one that is there already is taken.

    Args:
        model: a transformers directory with the language-model head.
        tokenizer: a directory with its tokenizer.
        like: the pair's manifest: template, limits and precisions are taken from it.
        precision: of every graph. None: the pair's, and fp32 where the model loses too much at the pair's.

    Raises:
        CompositionError: the model is not there, cannot write, or has no head.
        ParityError: its graphs do not compute what it does.
    """
    wanted = precision or {name: graph.precision for name, graph in like.graphs.items()}
    finest: dict[GraphName, Precision] = dict.fromkeys(GRAPHS, "fp32")
    made = _target(model, tokenizer, like, directory, wanted)
    # By its name, an earlier call's answer that the model loses too much.
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
        open_bundle(instead), f"it is at fp32: at the pair's {shown} it does not write what transformers writes"
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
        # A model that knows fewer positions than the pair reads: longer prompts are refused, or cut.
        max_prompt_tokens=like.max_prompt_tokens if known is None else min(like.max_prompt_tokens, known),
        max_new_tokens=like.generation.max_new_tokens,
    )
    build(
        compose_untrained(source, source, pair_config=pair_config, name=target.name),
        target,
        precision=precision,
        force=False,
    )


def require_decoder(model: Path, what: str, option: str) -> None:
    """Refuse a directory that cannot write by itself.

    Raises:
        CompositionError: naming the directory and what to give instead.
    """
    if not (model / "config.json").is_file():
        raise CompositionError(
            f"{what} is not at hand.", f"looked for {model / 'config.json'}", remedy=f"give its directory: {option}=DIR"
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
    """Where the bundle of all this is kept."""
    digest = hashlib.sha256()
    for source in (model, tokenizer):
        for entry in file_entries(source):
            digest.update(f"{entry.path} {entry.sha256}".encode())
    facts = [like.template, like.max_prompt_tokens, like.generation.max_new_tokens, like.tool_versions]
    precisions = [[(name, used[name]) for name in GRAPHS] if used else None for used in (precision, instead_of)]
    digest.update(repr([facts, precisions]).encode())
    return directory / f"{safe_name(model.resolve().name)}-{digest.hexdigest()[:12]}"
