"""Prompt and response pairs: read, tokenized, batched, with the frozen LLM's hidden states kept on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llm2slm_export.errors import DataError
from llm2slm_export.models.reference import Reference
from llm2slm_export.recipe import DataSettings

Row = tuple[str, str]


def read_pairs(source: str, settings: DataSettings) -> list[Row]:
    """Prompt and response of every row of a JSONL file, a TSV file, or a `datasets` data set (`name:split`).

    Raises:
        DataError: the file is missing or empty, or rows are malformed: every one is counted, the first ones are named.
    """
    path = Path(source)
    if path.suffix in {".jsonl", ".json", ".tsv"} or path.exists():
        if not path.is_file():
            raise DataError(
                f"There is no data file {source}.",
                remedy="check training.data in the recipe; README.md says how the data is fetched",
            )
        rows = list(_read_tsv(path, settings) if path.suffix == ".tsv" else _read_jsonl(path, settings))
    else:
        name, _, split = source.partition(":")
        rows = [
            (str(row[settings.prompt_field]), str(row[settings.response_field]))
            for row in load_dataset(name, split=split or "train")
        ]
    if not rows:
        raise DataError(f"{source} holds no rows.", remedy="check training.data in the recipe")
    return rows


def _read_jsonl(path: Path, settings: DataSettings) -> Iterator[Row]:
    problems: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
            prompt, response = row[settings.prompt_field], row[settings.response_field]
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg})")
            continue
        except (KeyError, TypeError):
            problems.append(f"line {number}: no {settings.prompt_field!r} and {settings.response_field!r}")
            continue
        if not (isinstance(prompt, str) and prompt and isinstance(response, str) and response):
            problems.append(f"line {number}: an empty prompt or response")
            continue
        yield prompt, response
    _refuse(path, problems)


def _read_tsv(path: Path, settings: DataSettings) -> Iterator[Row]:
    columns = settings.prompt_field, settings.response_field
    if not all(isinstance(c, int) for c in columns):
        raise DataError(
            f"{path} is TSV: its columns are numbered, not named.",
            f"prompt_field {columns[0]!r}, response_field {columns[1]!r}",
            remedy="set training.data.prompt_field and response_field to column numbers from 0",
        )
    first, second = int(columns[0]), int(columns[1])
    problems: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        cells = line.split("\t")
        if len(cells) <= max(first, second) or not cells[first] or not cells[second]:
            problems.append(f"line {number}: no text in column {first} or {second}")
            continue
        yield cells[first], cells[second]
    _refuse(path, problems)


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8.", str(error), remedy="convert it, for example with iconv -t utf-8"
        ) from error


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise DataError(
            f"{path} has {len(problems)} unusable rows.", *problems[:5], *more, remedy="mend or remove them"
        )


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
    """
    prompts = llm_tokenizer([template.replace("{prompt}", p) for p, _ in rows]).input_ids
    eos = slm_tokenizer.eos_token_id
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
    """The frozen LLM's hidden states of every distinct prompt, float16 on disk: [tokens of all prompts, d_llm].

    They are written once and read by every epoch; the file is keyed by the LLM's weights, the layer and the prompts,
    and reused by a later run with the same.
    """

    def __init__(self, states: np.ndarray[Any, Any], rows: dict[tuple[int, ...], int]) -> None:
        self._states, self._rows = states, rows

    @classmethod
    def build(cls, reference: Reference, prompts: list[list[int]], directory: Path, pad_id: int) -> "HiddenStates":
        """Encode the distinct prompts, longest first, or map the file of an earlier run."""
        distinct = sorted({tuple(p) for p in prompts}, key=lambda p: (-len(p), p))
        starts = np.concatenate([[0], np.cumsum([len(p) for p in distinct])])
        rows = {p: int(s) for p, s in zip(distinct, starts[:-1], strict=True)}
        d_llm = reference.shape.d_llm
        path = directory / f"{_fingerprint(reference, distinct)}.npy"
        if not path.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            states = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(int(starts[-1]), d_llm))
            device = next(reference.llm.parameters()).device
            for i in track(range(0, len(distinct), 256), description="encoding prompts"):
                batch = distinct[i : i + 256]
                ids, mask = padded(batch, pad_id), padded([[1] * len(p) for p in batch], 0)
                hidden = reference.hidden_states(ids.to(device), mask.to(device)).cpu()
                states[starts[i] : starts[i + len(batch)]] = hidden[mask.bool()].numpy()
            states.flush()
            os.replace(partial, path)
        return cls(np.load(path, mmap_mode="r"), rows)

    def __getitem__(self, prompt: list[int]) -> Tensor:
        """[prompt, d_llm] of one prompt's ids."""
        start = self._rows[tuple(prompt)]
        return torch.from_numpy(self._states[start : start + len(prompt)].astype(np.float32))


def _fingerprint(reference: Reference, prompts: list[tuple[int, ...]]) -> str:
    digest = hashlib.sha256(repr(reference.layer).encode())
    for name, tensor in reference.llm.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(repr(prompts).encode())
    return digest.hexdigest()[:16]


def padded(rows: Any, value: int) -> Tensor:
    """[batch, longest] ids padded on the right, to a multiple of 4: fewer distinct shapes, fewer kernels to prepare."""
    longest = -(-max(len(r) for r in rows) // 4) * 4
    return torch.tensor([[*r, *[value] * (longest - len(r))] for r in rows])


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
