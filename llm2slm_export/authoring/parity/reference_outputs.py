"""Reference outputs: batches of prompts with the outputs of the unmodified models, which bundles are compared with.

The reference is transformers' own forward pass and `generate`; no code of the exported graphs computes it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from llm2slm_export import contract
from llm2slm_export.arrays import Array
from llm2slm_export.authoring.models.chat_template import tokenized
from llm2slm_export.authoring.models.compatibility import positions_known
from llm2slm_export.authoring.models.pairing import LoadedPair
from llm2slm_export.authoring.models.reference import Reference, is_encoder_decoder
from llm2slm_export.authoring.models.special_tokens import prompt_pad, slm_special_ids
from llm2slm_export.authoring.parity.float64 import Double
from llm2slm_export.bundle.manifest import SpecialIds
from llm2slm_export.errors import CompositionError
from llm2slm_export.inference.batching import batches

# Prompts for pairs without recorded prompts: English, French, German, code, one word, a long one.
PROMPTS = (
    "How are you?", "She is reading a book.", "Where is the station?", "I don't know what you mean.", "Yes",
    "Translate English to German: The house is wonderful.", "Je ne sais pas où il habite.", "Das Wetter ist heute schön.",
    "summarize: The three graphs of a pair are the encoder, which reads the prompt once, the projector, which turns what "
    "was read into what the small model is conditioned on, and the decoder, which writes one token at a time.",
    "for i in range(10): print(i)", "What time is it now in New York, and what will it be in three hours?", "1 + 1 = 2",
)  # fmt: skip
GATE_TOKENS = 24  # tokens generated per prompt
_GROUP_SIZE = 32

_Group = tuple[str, Sequence[tuple[str, list[int]]]]  # a batch's name, and its prompts with their ids


@dataclass(frozen=True)
class ReferenceBatch:
    """A batch of prompts with the reference's outputs, padded on the right.

    Args:
        name: for the parity report.
        prompts: texts; empty if the ids were truncated by hand.
        input_ids, attention_mask: [batch, prompt].
        hidden_states: [batch, prompt, encoder_hidden_size].
        generated: [batch, response] greedy ids, padded after a row's EOS.
        written: [batch, response], True up to and including EOS.
        exact: `hidden_states` in float64, for tolerances at fp32.
    """

    name: str
    prompts: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    hidden_states: Tensor
    generated: Tensor
    written: Tensor
    exact: Tensor | None = None

    @property
    def responses(self) -> list[Array]:
        """The greedy ids of every row without padding."""
        return [row[real] for row, real in zip(self.generated.numpy(), self.written.numpy(), strict=True)]


def special_ids(reference: Reference, llm_tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """The special ids of the pair for the bundle; `compose` has checked that they exist."""
    ids, pad = slm_special_ids(reference.slm), prompt_pad(llm_tokenizer)
    assert pad is not None
    assert ids.pad is not None
    return SpecialIds(prompt_pad=pad, pad=ids.pad, eos=ids.eos, decoder_start=ids.decoder_start)


def reference_batches(pair: LoadedPair, ids: SpecialIds, *, exact: bool = False) -> list[ReferenceBatch]:
    """Reference outputs for the pair's prompts: one prompt alone, one token alone, and padded batches of five.

    Args:
        pair: the models and their tokenizers.
        ids: the pair's special ids.
        exact: compute hidden states in float64 too, as the comparison of an fp32 encoder requires.
    """
    kept = _tokenized(pair, pair.prompts or PROMPTS)
    first = kept[0]
    groups: list[_Group] = [("batch 1", [first]), ("batch 1, prompt 1", [("", first[1][:1])])]
    groups += [(f"batch {len(kept[i : i + 5])}, from prompt {i + 1}", kept[i : i + 5]) for i in range(0, len(kept), 5)]
    return list(_reference_batches(pair, ids, groups, exact=exact))


def gate_batches(pair: LoadedPair, ids: SpecialIds, prompts: Sequence[str]) -> list[ReferenceBatch]:
    """Reference outputs for a gate's prompts, in batches of similar length; prompts too long for the pair are left out.

    Raises:
        CompositionError: no prompt fits the pair.
    """
    return list(_reference_batches(pair, ids, _by_length(pair, prompts)))


def many_prompts(pair: LoadedPair, ids: SpecialIds, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Ids and masks [batch, prompt] of the batches of `gate_batches`, without computing the models.

    Raises:
        CompositionError: no prompt fits the pair.
    """
    return [_padded(group, ids) for _, group in _by_length(pair, prompts)]


def _by_length(pair: LoadedPair, prompts: Sequence[str]) -> list[_Group]:
    kept = _tokenized(pair, prompts)
    grouped = batches([len(row) for _, row in kept], size=_GROUP_SIZE)
    return [(f"batch {len(batch)}", [kept[i] for i in batch]) for batch in grouped]


def _padded(group: Sequence[tuple[str, list[int]]], ids: SpecialIds) -> tuple[Tensor, Tensor]:
    """Ids and mask [batch, prompt] of a group, padded on the right."""
    rows = [row for _, row in group]
    width = max(map(len, rows))
    input_ids = torch.tensor([[*r, *[ids.prompt_pad] * (width - len(r))] for r in rows])
    return input_ids, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])


def _reference_batches(
    pair: LoadedPair, ids: SpecialIds, groups: Iterable[_Group], *, exact: bool = False
) -> Iterator[ReferenceBatch]:
    options = _greedy(pair, ids)
    for name, group in groups:
        input_ids, mask = _padded(group, ids)
        with torch.no_grad():
            hidden = pair.reference.hidden_states(input_ids, mask)
            generated = pair.reference.generate(input_ids, mask, hidden, generation_config=options)
        if ids.decoder_start is not None:
            generated = generated[:, 1:].contiguous()
        texts = tuple(text for text, _ in group if text)
        yield ReferenceBatch(
            name, texts, input_ids, mask, hidden, generated, _written(generated, ids.eos),
            _exact_hidden_states(pair.reference, input_ids, mask) if exact else None,
        )  # fmt: skip


def _exact_hidden_states(reference: Reference, input_ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad(), Double():
        return reference.hidden_states(input_ids, mask)


def _written(generated: Tensor, eos: Sequence[int]) -> Tensor:
    """Mask [batch, response]: True up to and including a row's first EOS."""
    is_eos = torch.isin(generated, torch.tensor(eos, dtype=generated.dtype)).long()
    return is_eos.cumsum(dim=1) - is_eos == 0


def _tokenized(pair: LoadedPair, prompts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Prompts with their ids, without prompts that are too long for the pair."""
    ids = tokenized(pair.llm_tokenizer, pair.file.template, prompts)
    most, fact = pair.file.max_prompt_tokens, f"max_prompt_tokens is {pair.file.max_prompt_tokens}"
    known = positions_known(pair.reference.slm)
    if known is not None and not is_encoder_decoder(pair.reference.slm):
        # A decoder-only SLM's positions hold prompt and response.
        room = (known - GATE_TOKENS) // contract.context_per_token(pair.file.fusion)
        if room < most:
            most, fact = room, f"the SLM has {known} positions, of which {GATE_TOKENS} are for the response"
    kept = [(p, row) for p, row in zip(prompts, ids, strict=True) if len(row) <= most]
    if not kept:
        raise CompositionError(
            f"None of the {len(prompts)} prompts of the parity gate fits into the pair's maximum prompt length.",
            f"{fact}, the shortest prompt has {min(map(len, ids))} tokens",
            remedy="raise max_prompt_tokens in composition.json, or choose an SLM with more positions",
        )
    return kept


def _greedy(pair: LoadedPair, ids: SpecialIds) -> GenerationConfig:
    model: Any = pair.reference.slm
    beyond = list(range(len(pair.slm_tokenizer), model.config.vocab_size))
    return GenerationConfig(
        max_new_tokens=GATE_TOKENS,
        do_sample=False,
        eos_token_id=list(ids.eos),
        pad_token_id=ids.pad,
        decoder_start_token_id=ids.decoder_start,
        suppress_tokens=beyond or None,  # ids beyond the tokenizer's vocabulary
    )
