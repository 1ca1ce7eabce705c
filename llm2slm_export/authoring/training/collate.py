"""Rows of texts → tokenized, batched."""

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
    """Ids of prompts and responses; the response ends with the SLM's EOS.

    Returns:
        a data set with `input_ids`, `labels` and `length`, and how many rows were left out for being longer than the
        limits (a truncated pair would teach the SLM to stop early).

    Raises:
        DataError: every row is longer than the limits.
        CompositionError: the SLM's tokenizer has no EOS.
    """
    eos = slm_tokenizer.eos_token_id
    if eos is None:
        raise CompositionError(
            "The tokenizer of the responses has no end-of-sequence token: what is trained would never stop.",
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
            "Every row is longer than the limits.",
            f"max_prompt_tokens {max_prompt_tokens}, max_response_tokens {max_response_tokens}",
            remedy="raise training.max_prompt_tokens and training.max_response_tokens",
        )
    return Dataset.from_list(kept), len(rows) - len(kept)


def require_rows(data: Dataset, prompt_rows: int, response_rows: int) -> None:
    """Check that the models' tables have a row for every id.

    Raises:
        DataError: they have not: what is longest past its table.
    """
    problems = [
        f"{what} have the id {most}, and the table has {rows} rows"
        for what, column, rows in (("prompts", "input_ids", prompt_rows), ("responses", "labels", response_rows))
        if (most := max((max(ids, default=0) for ids in data[column]), default=0)) >= rows
    ]
    if problems:
        raise DataError(
            "The data holds tokens that a model has no row for.",
            *problems,
            remedy="enlarge the model's table (resize_token_embeddings) and save it again, or take its own tokenizer",
        )


def padded(rows: Any, value: int, *, left: bool = False) -> Tensor:
    """[batch, longest] ids, padded to a multiple of 4: fewer distinct shapes, fewer kernels to prepare."""
    longest = -(-max(len(r) for r in rows) // 4) * 4
    fill = [[value] * (longest - len(r)) for r in rows]
    return torch.tensor([[*f, *r] if left else [*r, *f] for r, f in zip(rows, fill, strict=True)])


def collator(
    pad_id: int, states_of: Callable[[list[int]], Tensor] | None
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Batches: `input_ids`, `attention_mask` [batch, prompt], `labels` [batch, response], `hidden_states` where cached.

    Args:
        states_of: gives the cached hidden states [prompt, encoder_hidden_size] of a prompt's ids.
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
