"""Teacher forcing: the decoder's inputs, call by call, with the reference's tokens as history."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
from llm2slm_export.inference.runtime.backend import Ids

Feed = dict[str, Any]  # input name → Tensor or Array

CONTEXT_MASK = "context_mask"  # passed with the conditioning: [batch, context]
_SPARE = 3  # unused positions of the cache


@dataclass(frozen=True)
class ResponseCall:
    """Positions of a response whose logits one decoder call returns.

    Args:
        starts: [batch], the first position of each row.
        count: number of positions.
    """

    starts: Ids
    count: int


def in_turn(batch: int, counts: Iterable[int]) -> tuple[ResponseCall, ...]:
    """Calls of these numbers of positions, one after another, the same for every row."""
    starts = accumulate(counts, initial=0)
    return tuple(ResponseCall(np.full(batch, start), count) for start, count in zip(starts, counts, strict=False))


def apart(batch: int, length: int) -> tuple[ResponseCall, ...]:
    """Calls in which rows are at different positions: every other row is set back and repeats two of its positions.

    Args:
        batch: number of rows.
        length: positions of the response, at least 5.
    """
    behind = 2 * (np.arange(batch) % 2)
    return (*in_turn(batch, (3, 1)), ResponseCall(4 - behind, length - 4), ResponseCall(np.full(batch, length - 2), 2))


def prompt_feed(case: ReferenceBatch) -> Feed:
    """The inputs of a case's prompts."""
    return {contract.INPUT_IDS: case.input_ids, contract.ATTENTION_MASK: case.attention_mask}


def context_mask(shape: PairShape, case: ReferenceBatch) -> Tensor:
    """The mask [batch, context] of the graphs' context, padded on the right."""
    return case.attention_mask.repeat_interleave(shape.context_per_token, dim=1)


@torch.no_grad()
def reference_logits(reference: Reference, case: ReferenceBatch, context: Tensor) -> Tensor:
    """Logits [batch, response, vocab_size] of the unmodified SLM for `context` [batch, context, hidden_size]."""
    mask = context_mask(reference.shape, case)
    # `fuse` pads a decoder-only SLM's context on the left, as transformers' `generate` requires.
    mask = mask if is_encoder_decoder(reference.slm) else mask.flip(1)
    return response_logits(reference.slm, context, mask, case.generated, reference.fusion)


@torch.no_grad()
def conditioning(reference: Reference, ids: SpecialIds, case: ReferenceBatch) -> tuple[Feed, Tensor]:
    """The decoder's conditioning, computed by the unmodified SLM.

    Returns:
        the conditioning tensors with `CONTEXT_MASK`, and the fused prompt [batch, context, hidden_size] behind them, padded
        as `Reference.fuse` pads it.
    """
    context, mask = reference.fuse(case.hidden_states, case.input_ids, case.attention_mask)
    given = _conditioning(reference, ids, context, mask)
    return given | {CONTEXT_MASK: context_mask(reference.shape, case)}, context


def _conditioning(reference: Reference, ids: SpecialIds, context: Tensor, mask: Tensor) -> Feed:
    model: Any = reference.slm
    if not is_encoder_decoder(model):
        rows = zip(context, mask.bool(), strict=True)
        return {contract.PROMPT_EMBEDS: torch.stack([torch.cat([row[real], row[~real]]) for row, real in rows])}
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
    shape: PairShape, ids: SpecialIds, case: ReferenceBatch, given: Feed, calls: Iterable[ResponseCall]
) -> Iterator[tuple[ResponseCall, Feed]]:
    """The decoder's inputs without the cache, for a response in the given calls.

    A decoder-only SLM's first token is predicted by its prompt pass, a call of its own.

    Args:
        shape: the pair's sizes.
        ids: the pair's special ids.
        case: the response.
        given: the conditioning and `CONTEXT_MASK`.
        calls: the calls. A row's later call repeats or follows its earlier ones.
    """
    made = _encoder_decoder_feed if shape.slm_kind == "encoder-decoder" else _decoder_only_feed
    for call in calls:
        parts = [call]
        if shape.slm_kind == "decoder-only" and not call.starts.any():
            parts = [ResponseCall(call.starts, 1), ResponseCall(call.starts + 1, call.count - 1)]
        for part in parts:
            if part.count:
                yield part, made(ids, case, given, part)


def forced_logits(
    decoder: Callable[[Feed], dict[str, Array]],
    shape: PairShape,
    ids: SpecialIds,
    case: ReferenceBatch,
    given: Feed,
    calls: Iterable[ResponseCall],
) -> Array:
    """A decoder graph's logits [batch, response, vocab_size], with the reference's tokens as history.

    Args:
        decoder: runs the graph.
        shape, ids, case, given, calls: as in `feeds`. A position that is repeated counts the last time.
    """
    past = empty_cache(shape, case, given)
    logits = np.full((*case.generated.shape, shape.vocab_size), np.nan, np.float32)
    rows = np.arange(len(logits))[:, None]
    for call, feed in feeds(shape, ids, case, given, calls):
        got = decoder(feed | past)
        logits[rows, call.starts[:, None] + np.arange(call.count)] = got[contract.LOGITS]
        past = {s.past.name: got[s.present.name] for s in contract.state(shape)}
    return logits


def _encoder_decoder_feed(ids: SpecialIds, case: ReferenceBatch, given: Feed, call: ResponseCall) -> Feed:
    start = np.full((case.generated.shape[0], 1), ids.decoder_start)
    tokens = np.concatenate([start, case.generated[:, :-1].numpy()], axis=1)
    return {
        contract.INPUT_IDS: _called(tokens, call.starts, call.count),
        contract.ENCODER_ATTENTION_MASK: given[CONTEXT_MASK],
        contract.PAST_LENGTH: call.starts,
    } | given


def _decoder_only_feed(ids: SpecialIds, case: ReferenceBatch, given: Feed, call: ResponseCall) -> Feed:  # noqa: ARG001
    """The prompt embeddings, whose last one predicts the first token, or ids of the response."""
    embeds, context = np.asarray(given[contract.PROMPT_EMBEDS]), np.asarray(given[CONTEXT_MASK]).sum(axis=1)
    if not call.starts.any():
        return {
            contract.INPUT_IDS: np.zeros((len(embeds), 0), np.int64),
            contract.PROMPT_EMBEDS: embeds,
            contract.PAST_LENGTH: call.starts,
            contract.LOGITS_TO_KEEP: context[:, None] - 1,
        }
    return {
        contract.INPUT_IDS: _called(case.generated.numpy(), call.starts - 1, call.count),
        contract.PROMPT_EMBEDS: embeds[:, :0],
        contract.PAST_LENGTH: context + call.starts - 1,
        contract.LOGITS_TO_KEEP: np.tile(np.arange(call.count), (len(embeds), 1)),
    }


def _called(tokens: Ids, starts: Ids, count: int) -> Ids:
    """`count` tokens of each row of [batch, length], from the row's start on."""
    called: Ids = np.take_along_axis(tokens, starts[:, None] + np.arange(count), axis=1)
    return called


def whole_responses(
    reference: Reference, ids: SpecialIds, cases: Sequence[ReferenceBatch]
) -> Iterator[tuple[dict[str, Array], dict[int, Array]]]:
    """The decoder's inputs for whole responses in one call, and masks of their real positions.

    A decoder-only SLM's call has a prompt and its response, which follows it without padding: one row a call.

    Yields:
        inputs by name, and masks [batch, length] by length.
    """
    for case in cases:
        given, _ = conditioning(reference, ids, case)
        if reference.shape.slm_kind == "encoder-decoder":
            batch, length = case.generated.shape
            ((_, feed),) = feeds(reference.shape, ids, case, given, in_turn(batch, (length,)))
            inputs = feed | empty_cache(reference.shape, case, given)
            yield {n: np.asarray(v) for n, v in inputs.items()}, {case.written.shape[1]: case.written.numpy()}
            continue
        for row in range(len(case.generated)):
            yield _whole_row(reference.shape, case, given, row)


def _whole_row(
    shape: PairShape, case: ReferenceBatch, given: Feed, row: int
) -> tuple[dict[str, Array], dict[int, Array]]:
    """A decoder-only SLM's inputs for a row's prompt and response in one call, and masks of its positions by length."""
    response = case.generated.numpy()[row][case.written.numpy()[row]]
    context = int(given[CONTEXT_MASK][row].sum())
    inputs = {
        contract.INPUT_IDS: response[None, :-1],
        contract.PROMPT_EMBEDS: np.asarray(given[contract.PROMPT_EMBEDS])[row : row + 1, :context],
        contract.PAST_LENGTH: np.zeros(1, np.int64),
        contract.LOGITS_TO_KEEP: np.arange(context - 1, context - 1 + len(response))[None],
    }
    cache = {name: array[row : row + 1] for name, array in empty_cache(shape, case, given).items()}
    lengths = len(response), context + len(response) - 1
    return inputs | cache, {length: np.ones((1, length), bool) for length in lengths}
