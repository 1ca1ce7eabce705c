"""A model by itself, as a bundle: the LLM alone, the SLM alone, on the pair's runtime at the pair's precision.

It is the pair of the model with itself: an untrained projector with `add` gives exactly what the SLM alone would
(DESIGN §3), and nothing of the reading half is run.
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llm2slm_export.build import build
from llm2slm_export.bundle import MANIFEST_FILE, Bundle, Manifest, file_entries, open_bundle
from llm2slm_export.errors import CompositionError
from llm2slm_export.models.loading import load_config
from llm2slm_export.models.pairing import Joint, compose_untrained, positions_known
from llm2slm_export.names import safe_name
from llm2slm_export.recipe import ModelSource
from llm2slm_export.training.parts import refuse_reader


def alone_bundle(model: Path, tokenizer: Path, like: Manifest, directory: Path) -> Bundle:
    """The bundle of one model by itself, in `directory`; one that is there already is taken.

    Args:
        model: a transformers directory with the language-model head.
        tokenizer: a directory with its tokenizer.
        like: the pair's manifest: template, limits and precisions are taken from it.

    Raises:
        CompositionError: the model is not there, cannot write, or has no head.
        ParityError: its graphs do not compute what it does.
    """
    target = directory / f"{safe_name(model.resolve().name)}-{_key(model, tokenizer, like)}"
    if not (target / MANIFEST_FILE).is_file():
        source = ModelSource(model=str(model), tokenizer=str(tokenizer))
        model_with: Any = SimpleNamespace(config=load_config(str(model)))
        known = positions_known(model_with)
        joint = Joint(
            prompt_template=like.template,
            # A model that knows fewer positions than the pair reads: longer prompts are refused, or cut.
            max_prompt_tokens=like.max_prompt_tokens if known is None else min(like.max_prompt_tokens, known),
            max_new_tokens=like.generation.max_new_tokens,
        )
        pair = compose_untrained(source, source, joint=joint, name=target.name)
        precision = {name: graph.precision for name, graph in like.graphs.items()}
        build(pair, target, precision=precision, force=False)
    return open_bundle(target)


def require_writer(model: Path, what: str, option: str) -> None:
    """Refuse a directory that cannot write by itself.

    Raises:
        CompositionError: naming the directory and what to give instead.
    """
    if not (model / "config.json").is_file():
        raise CompositionError(
            f"{what} is not at hand.", f"looked for {model / 'config.json'}", remedy=f"give its directory: {option}=DIR"
        )
    refuse_reader(str(model), None, option)


def _key(model: Path, tokenizer: Path, like: Manifest) -> str:
    digest = hashlib.sha256()
    for directory in (model, tokenizer):
        for entry in file_entries(directory):
            digest.update(f"{entry.path} {entry.sha256}".encode())
    facts = [like.template, like.max_prompt_tokens, like.generation.max_new_tokens, like.tool_versions]
    digest.update(repr([facts, {name: graph.precision for name, graph in like.graphs.items()}]).encode())
    return digest.hexdigest()[:12]
