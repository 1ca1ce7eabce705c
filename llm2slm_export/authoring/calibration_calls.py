"""Calls of the graphs that their quantization is calibrated on."""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from llm2slm_export import contract
from llm2slm_export.authoring.exporters.quantization.calibration import Call
from llm2slm_export.authoring.models.pairing import LoadedPair
from llm2slm_export.authoring.parity.reference_outputs import ReferenceBatch, many_prompts, special_ids
from llm2slm_export.authoring.parity.teacher_forcing import whole_responses


def decoder_calls(pair: LoadedPair, batches: Sequence[ReferenceBatch]) -> Iterable[Call]:
    """The decoder's inputs for each batch's whole responses, with masks of real positions."""
    return whole_responses(pair.reference, special_ids(pair.reference, pair.llm_tokenizer), batches)


def encoder_calls(pair: LoadedPair, prompts: Sequence[str]) -> list[Call]:
    """The encoder's inputs for prompts, in batches, with masks of real positions.

    Raises:
        CompositionError: no prompt fits the pair.
    """
    read = many_prompts(pair, special_ids(pair.reference, pair.llm_tokenizer), prompts)
    return [call for batch in read for call in _calls(*batch)]


def _calls(input_ids: Tensor, attention_mask: Tensor) -> Iterator[Call]:
    """The encoder's inputs for a batch of prompts, with masks of real positions; then for each prompt's first token.

    A single token has the largest attention outputs, because attention has nothing to average.
    """
    for length in {input_ids.shape[1], 1}:
        ids, mask = input_ids[:, :length].numpy(), attention_mask[:, :length].numpy()
        yield {contract.INPUT_IDS: ids, contract.ATTENTION_MASK: mask}, {length: mask.astype(bool)}
