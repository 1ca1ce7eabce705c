"""The LLM head: the LLM's own decoder over the bundle's encoder, through an identity projector.

It is the LLM by itself: a pair whose SLM is the whole LLM, with the fusion `cross_attention`.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from llm2slm_export.authoring.composition import SlmEntry
from llm2slm_export.authoring.models.architectures import LLM_ARCHITECTURES, SLM_ARCHITECTURES
from llm2slm_export.authoring.models.byte_tokenizer import byte_tokenizer
from llm2slm_export.authoring.models.compatibility import positions_known
from llm2slm_export.authoring.models.loading import load_config, load_full
from llm2slm_export.authoring.models.pairing import LoadedPair, PairConfig, compose, model_source, projector_entry
from llm2slm_export.authoring.models.projector import Projector
from llm2slm_export.authoring.models.reference import Layer
from llm2slm_export.authoring.recipe import ModelSource, ProjectorSettings
from llm2slm_export.errors import CompositionError

LLM_HEAD_CONFIG = PairConfig(fusion="cross_attention", projector=ProjectorSettings(kind="identity"))

_DECODER_TENSOR = re.compile(r"(^|\.)decoder\.")
# Classes that transformers saves without a decoder: T5EncoderModel, BartEncoder, T5Stack.
_READS_ONLY = re.compile(r"(EncoderModel|Encoder|Stack)$")


def require_llm_head(llm: ModelSource, layer: Layer, max_new_tokens: int, *, random_weights: bool = False) -> None:
    """Check that an LLM can be a head, from its configuration and the names of its tensors.

    Args:
        llm: the LLM; it names a `model`.
        layer: the layers that the bundle's encoder returns.
        max_new_tokens: the pair's maximum response length.
        random_weights: the checkpoint's weights are not read.

    Raises:
        CompositionError: the message lists every reason against it.
    """
    name = str(llm.model)
    config = load_config(name, llm.revision)
    saved = [] if random_weights else _without_decoder_tensors(name)
    require_own_decoder(config, layer, max_new_tokens, saved)


def require_own_decoder(
    config: PreTrainedConfig, layer: Layer, max_new_tokens: int, found: "list[str] | None" = None
) -> None:
    """Check that an LLM of a configuration can be a head. `found`: reasons against its checkpoint.

    Raises:
        CompositionError: the message lists every reason against it.
    """
    problems, remedies = [], []
    if layer != -1:
        layers = ", ".join(map(str, (layer,) if isinstance(layer, int) else layer))
        problems.append(f"the pair reads LLM layer {layers}; the LLM's own decoder attends to its output, layer -1")
        remedies.append("a pair that reads layer -1 (with --llm and --slm leave out --layer)")
    decoder = [*_decoder_problems(config), *(found or ())]
    if decoder:
        problems += decoder
        remedies.append(
            "an LLM of encoder and decoder, and its whole checkpoint (of a composition: llm.model in composition.json)"
        )
    positions = None if decoder else positions_known(SimpleNamespace(config=config))
    if positions is not None and max_new_tokens > positions:
        problems.append(f"max_new_tokens is {max_new_tokens}; the LLM's decoder has {positions} positions")
        remedies.append(f"a pair whose max_new_tokens is at most {positions}")
    if problems:
        raise CompositionError(
            "The LLM's own decoder cannot be a head.",
            *problems,
            remedy=f"give {', and '.join(remedies)}; or leave out --llm-head (in a recipe, export.llm_head)",
        )


def load_llm_head(load: Callable[[], LoadedPair], llm: ModelSource) -> LoadedPair:
    """The LLM as a head beside the pair that `load` loads.

    Prompts are tokenized and limited as the pair's are, and the response may be as long. The response is in the LLM's
    tokens, and generation options are those of the LLM's generation_config.

    Args:
        load: loads the pair; random weights are drawn again, and are the same.
        llm: the pair's LLM, with its resolved location.

    Raises:
        CompositionError: the LLM cannot be loaded with its decoder, or is not compatible with the pair's prompts.
    """
    pair, name = load(), str(llm.model)
    random = pair.sources["llm"]["weights"] == "random"
    # Of a random pair the encoder must be the same; of any other it is read again with its decoder.
    drawn = pair.reference.llm.state_dict() if random else None
    pair = replace(pair, reference=None)  # type: ignore[arg-type]
    whole: Any = load_full(name, llm.revision, random=random)
    encoder = whole.get_encoder()
    if drawn is not None:
        encoder.load_state_dict(drawn)
    tokenizer = pair.llm_tokenizer
    if pair.stand_in_tokenizer:
        own = byte_tokenizer(whole.config)  # with the LLM's special ids, which the pair's stand-in may not have
        tokenizer = tokenizer if _same(own, tokenizer) else own
    entry = projector_entry(encoder, whole, LLM_HEAD_CONFIG)
    file = pair.file.model_copy(
        update={
            "slm": SlmEntry(model=pair.file.llm.model), "projector": entry, "fusion": LLM_HEAD_CONFIG.fusion,
            "tokenizer": "shared" if tokenizer is pair.llm_tokenizer else "llm",
        }
    )  # fmt: skip
    source = pair.sources["llm"]
    return replace(
        pair,
        reference=compose(encoder, Projector(entry), whole, file, pair.llm_tokenizer, tokenizer),
        file=file,
        slm_tokenizer=tokenizer,
        sources={"llm": source, "slm": source | {"parameters": model_source(name, whole)["parameters"]}},
        trained=not random,
    )


def _same(one: Any, other: Any) -> bool:
    return bool(one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str())


def _decoder_problems(config: PreTrainedConfig) -> Iterator[str]:
    kind, model_type = LLM_ARCHITECTURES.get(config.model_type), config.model_type
    if kind == "decoder-only":
        yield f"LLM of type {model_type!r} is decoder-only: it has no decoder apart from what reads the prompt"
    elif kind == "encoder-only":
        yield f"LLM of type {model_type!r} is encoder-only: it has no decoder"
    elif SLM_ARCHITECTURES.get(model_type) != "encoder-decoder":
        supported = [name for name, of in SLM_ARCHITECTURES.items() if of == "encoder-decoder"]
        yield f"LLM of type {model_type!r}: its decoder is not supported; supported: {', '.join(supported)}"
    else:
        saved_as = list(config.architectures or ())
        reads_only = bool(saved_as) and all(_READS_ONLY.search(name) for name in saved_as)
        if reads_only or not config.is_encoder_decoder:
            yield (
                f"the LLM was saved without its decoder: config.json has architectures {', '.join(saved_as) or 'none'}, "
                f"is_encoder_decoder {str(bool(config.is_encoder_decoder)).lower()}"
            )


def _without_decoder_tensors(name: str) -> list[str]:
    """The problem of a local checkpoint whose tensors' names can be read, and name no decoder."""
    try:
        names = _tensor_names(Path(name))
    except (OSError, ValueError, SafetensorError):
        return []  # transformers reports the error
    if not names or any(_DECODER_TENSOR.search(tensor) for tensor in names):
        return []
    return [f"the LLM's checkpoint {name} has {len(names)} tensors, none of them of a decoder"]


def _tensor_names(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return list(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}))
    whole = directory / "model.safetensors"
    if not whole.is_file():
        return []
    with safe_open(whole, framework="pt") as file:
        return list(file.keys())
