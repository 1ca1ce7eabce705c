"""Teacher forcing: the decoder's inputs, call by call, with the reference's tokens as history."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from llm2slm_export import contract
from llm2slm_export.arrays import Array
from llm2slm_export.authoring.models.reference import Reference, conditioned_on, is_encoder_decoder, response_logits
from llm2slm_export.authoring.parity.reference_outputs import ReferenceBatch
from llm2slm_export.bundle.manifest import SpecialIds
from llm2slm_export.contract import PairShape

Feed = dict[str, Any]  # input name → Tensor or Array

CONTEXT_MASK = "context_mask"  # passed with the conditioning: [batch, context]
_SPARE = 3  # unused positions of the cache


def prompt_feed(case: ReferenceBatch) -> Feed:
    """The inputs of a case's prompts."""
    return {contract.INPUT_IDS: case.input_ids, contract.ATTENTION_MASK: case.attention_mask}


def context_mask(shape: PairShape, case: ReferenceBatch) -> Tensor:
    """The mask [batch, context], padded on the decoder's side."""
    mask = case.attention_mask.repeat_interleave(shape.context_per_token, dim=1)
    return mask if shape.slm_kind == "encoder-decoder" else mask.flip(1)


@torch.no_grad()
def reference_logits(reference: Reference, case: ReferenceBatch, context: Tensor) -> Tensor:
    """Logits [batch, response, vocab_size] of the unmodified SLM for `context` [batch, context, hidden_size]."""
    mask = context_mask(reference.shape, case)
    return response_logits(reference.slm, context, mask, case.generated, reference.fusion)


@torch.no_grad()
def conditioning(reference: Reference, ids: SpecialIds, case: ReferenceBatch) -> tuple[Feed, Tensor]:
    """The decoder's conditioning, computed by the unmodified SLM.

    Returns:
        the conditioning tensors with `CONTEXT_MASK`, and the fused prompt [batch, context, hidden_size] behind them.
    """
    context, mask = reference.fuse(case.hidden_states, case.input_ids, case.attention_mask)
    return _conditioning(reference, ids, context, mask) | {CONTEXT_MASK: mask}, context


def _conditioning(reference: Reference, ids: SpecialIds, context: Tensor, mask: Tensor) -> Feed:
    model: Any = reference.slm
    if not is_encoder_decoder(model):
        return {contract.PROMPT_EMBEDS: context}
    start = torch.full((context.shape[0], 1), ids.decoder_start or 0)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    model(
        **conditioned_on(context, reference.fusion), attention_mask=mask, decoder_input_ids=start,
        cache=cache, use_cache=True,
    )  # fmt: skip
    flat = [t for layer in cache.cross_attention_cache.layers for t in (layer.keys, layer.values)]
    return {spec.name: t for spec, t in zip(contract.cross_attention(reference.shape), flat, strict=True)}


def empty_cache(shape: PairShape, case: ReferenceBatch, given: Feed) -> Feed:
    """A cache for a case's response, with spare positions; for a decoder-only SLM it has room for the prompt too.

    Unwritten positions hold 100, so that a graph that reads them fails the comparison.
    """
    batch, response = case.generated.shape
    capacity = response + _SPARE + (given[CONTEXT_MASK].shape[1] if shape.slm_kind == "decoder-only" else 0)
    unwritten = np.full((batch, shape.num_key_value_heads, capacity, shape.head_dim), 100.0, np.float32)
    return {state.past.name: unwritten for state in contract.state(shape)}


def feeds(
    shape: PairShape, ids: SpecialIds, case: ReferenceBatch, given: Feed, calls: tuple[int, ...]
) -> Iterator[Feed]:
    """The decoder's inputs without the cache, for a response in calls of the given lengths.

    Args:
        shape: the pair's sizes.
        ids: the pair's special ids.
        case: the response.
        given: the conditioning and `CONTEXT_MASK`.
        calls: number of tokens of each call.
    """
    made = _encoder_decoder_feeds if shape.slm_kind == "encoder-decoder" else _decoder_only_feeds
    length = 0
    for feed in made(ids, case, given, calls):
        yield feed | {contract.PAST_LENGTH: np.array([length])}
        length += sum(feed[name].shape[1] for name in (contract.INPUT_IDS, contract.PROMPT_EMBEDS) if name in feed)


def forced_logits(
    decoder: Callable[[Feed], dict[str, Array]],
    shape: PairShape,
    ids: SpecialIds,
    case: ReferenceBatch,
    given: Feed,
    calls: tuple[int, ...],
) -> Array:
    """A decoder graph's logits [batch, response, vocab_size], with the reference's tokens as history.

    Args:
        decoder: runs the graph.
        shape, ids, case, given, calls: as in `feeds`.
    """
    past, outputs = empty_cache(shape, case, given), []
    for feed in feeds(shape, ids, case, given, calls):
        got = decoder(feed | past)
        outputs.append(got[contract.LOGITS])
        past = {s.past.name: got[s.present.name] for s in contract.state(shape)}
    return np.concatenate(outputs, axis=1)


def _encoder_decoder_feeds(
    ids: SpecialIds, case: ReferenceBatch, given: Feed, calls: tuple[int, ...]
) -> Iterator[Feed]:
    start = np.full((case.generated.shape[0], 1), ids.decoder_start)
    tokens = np.concatenate([start, case.generated[:, :-1].numpy()], axis=1)
    position = 0
    for count in calls:
        called = tokens[:, position : position + count]
        position += count
        yield {contract.INPUT_IDS: called, contract.ENCODER_ATTENTION_MASK: given[CONTEXT_MASK]} | given


def _decoder_only_feeds(ids: SpecialIds, case: ReferenceBatch, given: Feed, calls: tuple[int, ...]) -> Iterator[Feed]:  # noqa: ARG001
    """The first call holds the prompt embeddings and one token less: the last embedding predicts the first token."""
    embeds, mask = np.asarray(given[contract.PROMPT_EMBEDS]), np.asarray(given[CONTEXT_MASK])
    context, tokens, position = embeds.shape[1], case.generated[:, :-1].numpy(), 0
    # The mask covers the whole cache; unwritten positions are not padding.
    mask = np.concatenate([mask, np.ones((len(mask), sum(calls) + _SPARE), np.int64)], axis=1)
    for index, count in enumerate(calls):
        first = index == 0
        called = tokens[:, position : position + count - first]
        position += called.shape[1]
        yield {
            contract.INPUT_IDS: called,
            contract.PROMPT_EMBEDS: embeds if first else embeds[:, :0],
            contract.ATTENTION_MASK: mask,
            contract.LOGITS_TO_KEEP: np.arange(count) + (context - 1 if first else 0),
        }


def whole_responses(
    reference: Reference, ids: SpecialIds, cases: Sequence[ReferenceBatch]
) -> Iterator[tuple[dict[str, Array], dict[int, Array]]]:
    """The decoder's inputs for each case's whole response in one call, and masks of its real positions.

    Yields:
        inputs by name, and masks [batch, length] by length.
    """

    for case in cases:
        given, _ = conditioning(reference, ids, case)
        (feed,) = feeds(reference.shape, ids, case, given, (case.generated.shape[1],))
        called = written = case.written.numpy()
        if reference.shape.slm_kind == "decoder-only":
            called = np.concatenate([given[CONTEXT_MASK].numpy().astype(bool), written[:, :-1]], axis=1)
        inputs = feed | empty_cache(reference.shape, case, given)
        yield {n: np.asarray(v) for n, v in inputs.items()}, {m.shape[1]: m for m in (written, called)}
