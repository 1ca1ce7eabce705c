"""Rows of texts → tokenized, batched, with a frozen reader's hidden states kept on disk."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from llm2slm_export.errors import CompositionError, DataError
from llm2slm_export.models.reference import Layer, read, reader_width
from llm2slm_export.training.pairs import Row

READ_TOGETHER = 256  # prompts


def tokenize(
    rows: list[Row],
    template: str,
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
    prompts = llm_tokenizer([template.replace("{prompt}", p) for p, _ in rows]).input_ids
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


class HiddenStates:
    """A frozen reader's hidden states of every distinct prompt, float16 on disk: [tokens of all prompts, d_llm].

    They are written once and read by every epoch; the file is keyed by the reader's weights, the layer, the precision
    it was read with and the prompts, and reused by a later run with the same.
    """

    def __init__(self, states: np.ndarray[Any, Any], rows: dict[tuple[int, ...], int]) -> None:
        self._states, self._rows = states, rows

    @classmethod
    def build(
        cls, reader: nn.Module, layer: Layer, prompts: list[list[int]], directory: Path, pad_id: int, *, bf16: bool
    ) -> "HiddenStates":
        """Encode the distinct prompts, longest first, or map the file of an earlier run.

        Args:
            reader: a model whose output has `last_hidden_state` and `hidden_states`, in evaluation mode.
            layer: index into its hidden states, or several, side by side.
            bf16: matrix products in bfloat16, as in training.

        Raises:
            CompositionError: a hidden state is larger than float16 holds, or is not a number.
        """
        distinct = sorted({tuple(p) for p in prompts}, key=lambda p: (-len(p), p))
        starts = np.concatenate([[0], np.cumsum([len(p) for p in distinct])])
        rows = {p: int(s) for p, s in zip(distinct, starts[:-1], strict=True)}
        path = directory / f"{_fingerprint(reader, layer, distinct, bf16=bf16)}.npy"
        if not path.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            # Of a name of its own: two runs that share the directory may want the same states at the same time.
            partial = path.with_suffix(f".{os.getpid()}.partial")
            try:
                _write(partial, reader, layer, distinct, starts, pad_id, bf16=bf16)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return cls(np.load(path, mmap_mode="r"), rows)

    def __getitem__(self, prompt: list[int]) -> Tensor:
        """[prompt, d_llm] of one prompt's ids."""
        start = self._rows[tuple(prompt)]
        return torch.from_numpy(self._states[start : start + len(prompt)].astype(np.float32))


@torch.no_grad()
def _write(
    path: Path,
    reader: nn.Module,
    layer: Layer,
    prompts: list[tuple[int, ...]],
    starts: np.ndarray[Any, Any],
    pad_id: int,
    *,
    bf16: bool,
) -> None:
    width = reader_width(reader, layer) * (1 if isinstance(layer, int) else len(layer))
    states = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(int(starts[-1]), width))
    device = next(reader.parameters()).device
    for i in tqdm(range(0, len(prompts), READ_TOGETHER), desc="encoding prompts"):
        batch = prompts[i : i + READ_TOGETHER]
        ids, mask = padded(batch, pad_id), padded([[1] * len(p) for p in batch], 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = read(reader, ids.to(device), mask.to(device), layer).float().cpu()[mask.bool()]
        _refuse_overflow(hidden)
        states[starts[i] : starts[i + len(batch)]] = hidden.numpy()
    states.flush()


def _refuse_overflow(hidden: Tensor) -> None:
    largest = hidden.abs().max().item()  # not a number where any of them is none
    if not largest <= torch.finfo(torch.float16).max:
        raise CompositionError(
            "Hidden states do not fit into float16, in which they are kept on disk.",
            f"the largest value seen is {largest:.6g}, float16 ends at {torch.finfo(torch.float16).max:.0f}",
            remedy="set training.cache_hidden_states=false: every prompt is then read again in every epoch",
        )


def _fingerprint(reader: nn.Module, layer: Layer, prompts: list[tuple[int, ...]], *, bf16: bool) -> str:
    digest = hashlib.sha256(repr((layer, bf16)).encode())
    for name, tensor in reader.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(repr(prompts).encode())
    return digest.hexdigest()[:16]


def padded(rows: Any, value: int, *, left: bool = False) -> Tensor:
    """[batch, longest] ids, padded to a multiple of 4: fewer distinct shapes, fewer kernels to prepare."""
    longest = -(-max(len(r) for r in rows) // 4) * 4
    fill = [[value] * (longest - len(r)) for r in rows]
    return torch.tensor([[*f, *r] if left else [*r, *f] for r, f in zip(rows, fill, strict=True)])


def collator(pad_id: int, hidden: HiddenStates | None) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Batches: `input_ids`, `attention_mask` [batch, prompt], `labels` [batch, response], `hidden_states` where cached."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": padded(prompts, pad_id),
            "attention_mask": padded([[1] * len(p) for p in prompts], 0),
            "labels": padded([row["labels"] for row in rows], -100),
        }
        if hidden is not None:
            states = [hidden[p] for p in prompts]
            longest = batch["input_ids"].shape[1]
            batch["hidden_states"] = torch.stack(
                [torch.nn.functional.pad(s, (0, 0, 0, longest - s.shape[0])) for s in states]
            )
        return batch

    return collate
