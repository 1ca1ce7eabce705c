"""Tokenization and batching of training rows."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llm2slm_export.authoring.models.chat_template import tokenized
from llm2slm_export.authoring.training.pairs import Row
from llm2slm_export.bundle.prompt_template import PromptTemplate
from llm2slm_export.errors import CompositionError, DataError


def tokenize(
    rows: list[Row],
    template: PromptTemplate,
    llm_tokenizer: PreTrainedTokenizerFast,
    slm_tokenizer: PreTrainedTokenizerFast,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> tuple[Dataset, int]:
    """Tokenize prompts and responses; responses end with the SLM's EOS.

    Returns:
        a dataset with `input_ids`, `labels` and `length`, and the number of rows dropped because they exceed the limits
        (truncated responses would teach the SLM to stop early).

    Raises:
        DataError: all rows exceed the limits.
        CompositionError: the SLM's tokenizer has no EOS.
    """
    eos = slm_tokenizer.eos_token_id
    if eos is None:
        raise CompositionError(
            "The response tokenizer has no end-of-sequence token: the trained model would never stop.",
            remedy="set eos_token in its tokenizer_config.json",
        )
    prompts = tokenized(llm_tokenizer, template, [prompt for prompt, _ in rows])
    responses = slm_tokenizer([r for _, r in rows], add_special_tokens=False).input_ids
    kept = [
        {"input_ids": p, "labels": [*r, eos], "length": len(p) + len(r) + 1}
        for p, r in zip(prompts, responses, strict=True)
        if len(p) <= max_prompt_tokens and len(r) < max_response_tokens
    ]
    if not kept:
        raise DataError(
            "All rows exceed the limits.",
            f"max_prompt_tokens {max_prompt_tokens}, max_response_tokens {max_response_tokens}",
            remedy="raise training.max_prompt_tokens and training.max_response_tokens",
        )
    return Dataset.from_list(kept), len(rows) - len(kept)


def require_rows(data: Dataset, prompt_rows: int, response_rows: int) -> None:
    """Check that the models' embedding tables have a row for every id.

    Raises:
        DataError: an id is out of range; the message has the largest one.
    """
    problems = [
        f"{what} have the id {most}, the embedding table has {rows} rows"
        for what, column, rows in (("prompts", "input_ids", prompt_rows), ("responses", "labels", response_rows))
        if (most := max((max(ids, default=0) for ids in data[column]), default=0)) >= rows
    ]
    if problems:
        raise DataError(
            "The data has tokens outside a model's embedding table.",
            *problems,
            remedy="enlarge the table (resize_token_embeddings) and save the model again, or use the model's own tokenizer",
        )


def padded(rows: Any, value: int, *, left: bool = False) -> Tensor:
    """Pad ids to [batch, longest], with `longest` rounded up to a multiple of 4, so that fewer shapes occur."""
    longest = -(-max(len(r) for r in rows) // 4) * 4
    fill = [[value] * (longest - len(r)) for r in rows]
    return torch.tensor([[*f, *r] if left else [*r, *f] for r, f in zip(rows, fill, strict=True)])


def collator(
    pad_id: int, states_of: Callable[[list[int]], Tensor] | None
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A collate function for batches of `input_ids`, `attention_mask` [batch, prompt] and `labels` [batch, response].

    Args:
        pad_id: pads prompts.
        states_of: returns the cached hidden states [prompt, encoder_hidden_size] of a prompt's ids; batches then have
            `hidden_states`. None: no cache.
    """

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": padded(prompts, pad_id),
            "attention_mask": padded([[1] * len(p) for p in prompts], 0),
            "labels": padded([row["labels"] for row in rows], -100),
        }
        if states_of is not None:
            states = [states_of(p) for p in prompts]
            longest = batch["input_ids"].shape[1]
            batch["hidden_states"] = torch.stack(
                [torch.nn.functional.pad(s, (0, 0, 0, longest - s.shape[0])) for s in states]
            )
        return batch

    return collate
