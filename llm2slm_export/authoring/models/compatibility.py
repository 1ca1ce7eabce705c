"""Whether the parts of a pair fit: refusals of models and tokenizers, and the limits that the models set."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from llm2slm_export.authoring.composition import CompositionFile
from llm2slm_export.authoring.models.projector import Projector
from llm2slm_export.authoring.models.reference import (
    Layer,
    context_width,
    is_encoder_decoder,
    llm_layers,
    llm_width,
)
from llm2slm_export.authoring.models.special_tokens import prompt_pad, slm_special_ids
from llm2slm_export.contract import Fusion, TokenizerStrategy, context_per_token, reads_ids
from llm2slm_export.errors import CompositionError

# Sentences on which two tokenizers must agree: plain words, case, punctuation, digits, accents, scripts, spacing,
# symbols.
PROBES = (
    "The quick brown fox jumps over the lazy dog.", "Where is the station?", "It's 3:45 p.m. — 1,234.50 €!",
    "translate English to French: I don't know.", "Où est la gare ? Ça va être très difficile.", "ÄÖÜß ñ ç œ Ł",
    "Привет, мир", "日本語のテキスト", "العربية", "😀👍🏽", "  two  spaces\tand a tab\n", "CamelCase snake_case x+y=z {a: [1]}", "a",
)  # fmt: skip


def require_compatible_parts(llm: nn.Module, projector: Projector, slm: nn.Module, file: CompositionFile) -> None:
    """Check fusion, layers, positions and widths.

    Raises:
        CompositionError: the message lists every incompatibility.
    """
    problems = [*_fusion_problems(slm, file), *_layer_problems(llm, file), *_position_problems(llm, slm, file)]
    if not problems:
        problems = list(_width_problems(llm, projector, slm, file))
    if problems:
        raise CompositionError(
            "The parts of the pair are not compatible.",
            *problems,
            remedy="fix these values, or train the pair again with these models",
        )


def require_same_tokenization(llm: PreTrainedTokenizerFast, slm: PreTrainedTokenizerFast) -> None:
    """Check that both tokenizers of the strategy `shared` give the same ids: fusion adds states position by position.

    Raises:
        CompositionError: the message counts the probe sentences that differ, and shows the first.
    """
    differing = [text for text in PROBES if llm(text).input_ids != slm(text).input_ids]
    if differing:
        text = differing[0]
        raise CompositionError(
            f"The LLM and the SLM tokenize prompts differently ({len(differing)} of {len(PROBES)} probe sentences), "
            "so position i of one is not position i of the other.",
            f"{text!r}: LLM ids {llm(text).input_ids[:12]}, SLM ids {slm(text).input_ids[:12]}",
            remedy="use `tokenizer: llm` (the prompt in the LLM's tokens, through an adapter), or models that share a "
            "tokenizer",
        )


def require_special_tokens(
    slm: nn.Module,
    llm_tokenizer: PreTrainedTokenizerFast,
    slm_tokenizer: PreTrainedTokenizerFast,
    strategy: TokenizerStrategy,
) -> None:
    """Check the SLM's special ids: present, equal to its tokenizer's and, with `shared`, equal to the LLM tokenizer's.

    Raises:
        CompositionError: the message lists every mismatch.
    """
    model: Any = slm
    ids = slm_special_ids(slm)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    problems = []
    if not ids.eos:
        problems.append("the SLM's generation_config has no eos_token_id: generation would never stop")
    elif slm_tokenizer.eos_token_id is not None and slm_tokenizer.eos_token_id not in ids.eos:
        problems.append(f"the SLM's eos_token_id is {list(ids.eos)}, its tokenizer's is {slm_tokenizer.eos_token_id}")
    if model.config.is_encoder_decoder and ids.decoder_start is None:
        problems.append("the SLM has no decoder_start_token_id")
    beyond = [id for id in (*ids.eos, ids.decoder_start) if id is not None and not 0 <= id < vocab]
    if beyond:
        problems.append(f"special ids {beyond} are outside the SLM's vocabulary of {vocab}")
    if strategy == "shared":
        for name in ("eos_token_id", "pad_token_id"):
            theirs, ours = getattr(llm_tokenizer, name), getattr(slm_tokenizer, name)
            # Padding is masked, so a tokenizer without a padding token is compatible.
            harmless = name == "pad_token_id" and None in (theirs, ours)
            if theirs != ours and not harmless:
                problems.append(f"{name}: {theirs} in the LLM's tokenizer, {ours} in the SLM's")
    if prompt_pad(llm_tokenizer) is None:
        problems.append("the LLM's tokenizer has neither a padding nor an end-of-sequence token")
    if problems:
        raise CompositionError(
            "The special tokens of the pair are not compatible.",
            *problems,
            remedy="fix generation_config.json or tokenizer_config.json of these models",
        )


def require_known_ids(llm: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that the LLM has embeddings for its tokenizer's ids, on probe sentences and for the padding.

    Prompts with other unknown tokens, such as image placeholders, are refused one by one at run time.

    Raises:
        CompositionError: the message lists the unknown ids; or the tokenizer splits special tokens by default, which
            bundles do not support.
    """
    if tokenizer.split_special_tokens:
        raise CompositionError(
            "The LLM's tokenizer splits special tokens in the text by default.",
            "split_special_tokens is true in its tokenizer_config.json",
            remedy="set it to false there, and give split_special_tokens=True (--split-special-tokens) with the prompts",
        )
    model: Any = llm
    rows = model.get_input_embeddings().num_embeddings
    written = {id for text in PROBES for id in tokenizer(text).input_ids} | {prompt_pad(tokenizer) or 0}
    beyond = sorted(id for id in written if id >= rows)
    if beyond:
        raise CompositionError(
            f"The prompt's tokenizer gives ids beyond the {rows} rows of the LLM's embedding table.",
            f"ids: {', '.join(map(str, beyond[:8]))}{' …' if len(beyond) > 8 else ''}",
            remedy="give the LLM's own tokenizer; for an LLM and an SLM with two vocabularies use `tokenizer: llm` "
            "(--tokenizer llm)",
        )


def positions_known(model: Any) -> int | None:
    """The model's max_position_embeddings; None if positions are relative and unbounded (T5)."""
    config = model.config.get_text_config(decoder=model.config.is_encoder_decoder)
    return getattr(config, "max_position_embeddings", None)


def prompt_limit(llm: nn.Module, slm: nn.Module, fusion: Fusion) -> int | None:
    """The longest prompt, in tokens, that the positions of LLM and SLM encoder allow; None: unlimited."""
    limits = [positions_known(llm)]
    if is_encoder_decoder(slm) and fusion != "cross_attention":
        model: Any = slm
        known = positions_known(model.get_encoder())
        limits.append(known // context_per_token(fusion) if known is not None else None)
    return min((limit for limit in limits if limit is not None), default=None)


def prompt_rows(llm: nn.Module, slm: nn.Module, file: CompositionFile) -> int:
    """Rows of the embedding tables that prompt ids index: the LLM's and, if the fusion uses it, the SLM's."""
    tables: list[Any] = [llm]
    if file.tokenizer == "shared" and reads_ids(file.fusion):
        tables.append(slm)
    return min(int(model.get_input_embeddings().num_embeddings) for model in tables)


def without_cross_attention(slm: nn.Module, fusion: Fusion) -> Iterator[str]:
    """The problem of a fusion that the SLM does not support, if there is one."""
    if fusion == "cross_attention" and not is_encoder_decoder(slm):
        config: Any = slm.config
        yield f"fusion cross_attention needs an SLM with cross-attention; {config.model_type} is decoder-only"


def layers_outside(llm: nn.Module, layer: Layer) -> Iterator[str]:
    """The problem of layers that the LLM does not have, if there is one."""
    layers = llm_layers(llm)
    several = (layer,) if isinstance(layer, int) else layer
    outside = [i for i in several if not -layers - 1 <= i <= layers]
    if outside:
        yield f"LLM layer {', '.join(map(str, outside))} of {layers} layers; choose {-layers - 1} to {layers}"


def _fusion_problems(slm: nn.Module, file: CompositionFile) -> Iterator[str]:
    yield from without_cross_attention(slm, file.fusion)
    wants_adapter = file.tokenizer == "llm" and reads_ids(file.fusion)
    if wants_adapter != (file.projector.d_embedding is not None):
        yield (
            f"fusion {file.fusion} with tokenizer {file.tokenizer} {'needs an' if wants_adapter else 'has no'} adapter; "
            f"projector.d_embedding is {file.projector.d_embedding}"
        )


def _layer_problems(llm: nn.Module, file: CompositionFile) -> Iterator[str]:
    yield from layers_outside(llm, file.llm.layer)
    count = 1 if isinstance(file.llm.layer, int) else len(file.llm.layer)
    if count != file.projector.layers:
        yield f"the composition uses {count} LLM layers, the projector fuses {file.projector.layers}"


def _position_problems(llm: nn.Module, slm: nn.Module, file: CompositionFile) -> Iterator[str]:
    most = prompt_limit(llm, slm, file.fusion)
    if most is not None and file.max_prompt_tokens > most:
        yield f"max_prompt_tokens is {file.max_prompt_tokens}; the models' positions end at {most} prompt tokens"

    limit = positions_known(slm)
    context = 0 if is_encoder_decoder(slm) else context_per_token(file.fusion)  # of the shortest prompt
    if limit is not None and context + file.max_new_tokens > limit:
        yield f"max_new_tokens is {file.max_new_tokens}; the SLM's decoder has {limit} positions"


def _width_problems(llm: nn.Module, projector: Projector, slm: nn.Module, file: CompositionFile) -> Iterator[str]:
    entry, width = projector.entry, llm_width(llm, file.llm.layer)
    if entry.d_in != width:
        yield f"projector d_in is {entry.d_in}, the LLM's hidden size is {width}"
    wanted = context_width(slm, file.fusion)
    if entry.d_out != wanted:
        yield f"projector d_out is {entry.d_out}, the SLM's hidden size is {wanted}"
    model: Any = llm
    table = model.get_input_embeddings().embedding_dim
    if entry.d_embedding not in (None, table):
        yield f"projector d_embedding is {entry.d_embedding}, the LLM's embedding size is {table}"
