"""Disk cache of a frozen LLM's hidden states, written once and read in every epoch."""

import hashlib
import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from llm2slm_export.arrays import Array
from llm2slm_export.authoring.models.reference import Layer, llm_width, read
from llm2slm_export.authoring.progress import SILENT, Progress
from llm2slm_export.authoring.training.collate import padded
from llm2slm_export.errors import CompositionError
from llm2slm_export.files.atomic import rename_cached

READ_TOGETHER = 256  # prompts


class HiddenStates:
    """Hidden states of every distinct prompt, in float16 on disk: [tokens of all prompts, encoder_hidden_size].

    The file name is a hash of the LLM's weights, the layer, the compute precision and the prompts. Later runs with the
    same values reuse the file.
    """

    def __init__(self, states: Array, rows: dict[tuple[int, ...], int]) -> None:
        self._states, self._rows = states, rows

    @classmethod
    def build(
        cls,
        llm: nn.Module,
        layer: Layer,
        prompts: list[list[int]],
        directory: Path,
        pad_id: int,
        *,
        bf16: bool,
        progress: Progress = SILENT,
    ) -> "HiddenStates":
        """Encode the distinct prompts, longest first, or map the file of an earlier run.

        An interrupted run's states are kept, and encoding continues after them. Concurrent runs wait for one of them.

        Args:
            llm: a model in evaluation mode whose output has `last_hidden_state` and `hidden_states`.
            layer: index into its hidden states, or several, which are concatenated.
            prompts: token ids.
            directory: of the cache.
            pad_id: pads prompts in a batch.
            bf16: compute matrix products in bfloat16, as in training.
            progress: receives the encoded prompts.

        Raises:
            CompositionError: a hidden state is not finite in float16.
        """
        distinct = sorted({tuple(p) for p in prompts}, key=lambda p: (-len(p), p))
        starts = np.concatenate([[0], np.cumsum([len(p) for p in distinct])])
        rows = {p: int(s) for p, s in zip(distinct, starts[:-1], strict=True)}
        path = directory / f"{_fingerprint(llm, layer, distinct, bf16=bf16)}.npy"
        shape = int(starts[-1]), _width(llm, layer)
        _remove_damaged(path, shape)
        if not path.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            lock, partial = path.with_suffix(".lock"), path.with_suffix(".partial")
            with FileLock(lock):
                if not path.is_file():
                    try:
                        _write(partial, llm, layer, distinct, starts, pad_id, bf16=bf16, progress=progress)
                    except CompositionError:
                        for file in (partial, lock):
                            file.unlink(missing_ok=True)
                        raise
                    rename_cached(partial, path)
                # Other runs that wait for this lock, or create it again, find the states.
                lock.unlink(missing_ok=True)
        return cls(np.load(path, mmap_mode="r"), rows)

    def __getitem__(self, prompt: list[int]) -> Tensor:
        """Hidden states [prompt, encoder_hidden_size] of one prompt's ids."""
        start = self._rows[tuple(prompt)]
        return torch.from_numpy(self._states[start : start + len(prompt)].astype(np.float32))


@torch.no_grad()
def _write(
    path: Path,
    llm: nn.Module,
    layer: Layer,
    prompts: list[tuple[int, ...]],
    starts: Array,
    pad_id: int,
    *,
    bf16: bool,
    progress: Progress,
) -> None:
    width = _width(llm, layer)
    device = next(llm.parameters()).device
    with path.open("ab") as file:  # writes append
        begin = _whole_batches(file, starts, width)
        progress.start("encoding prompts", len(prompts))
        progress.advance(begin)
        for i in range(begin, len(prompts), READ_TOGETHER):
            batch = prompts[i : i + READ_TOGETHER]
            ids, mask = padded(batch, pad_id), padded([[1] * len(p) for p in batch], 0)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                hidden = read(llm, ids.to(device), mask.to(device), layer).float().cpu()[mask.bool()]
            _refuse_overflow(hidden)
            file.write(hidden.half().numpy().tobytes())
            file.flush()
            progress.advance(len(batch))


def _width(llm: nn.Module, layer: Layer) -> int:
    """The width of a token's hidden state, over all layers."""
    return llm_width(llm, layer) * (1 if isinstance(layer, int) else len(layer))


def _header(shape: tuple[int, int]) -> bytes:
    """The .npy header for states of a shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _remove_damaged(path: Path, shape: tuple[int, int]) -> None:
    """Remove a truncated or foreign file, with a warning; its prompts are encoded again."""
    if not path.is_file():
        return
    header, size = _header(shape), path.stat().st_size
    with path.open("rb") as file:
        whole = file.read(len(header)) == header and size == len(header) + 2 * shape[0] * shape[1]
    if not whole:
        path.unlink()
        warnings.warn(
            f"{path} does not hold hidden states of {shape[0]} tokens. It was removed, and the prompts are encoded again.",
            RuntimeWarning,
            stacklevel=3,
        )


def _whole_batches(file: BinaryIO, starts: Array, width: int) -> int:
    """The number of prompts in an earlier run's file, in whole batches; the rest of the file is truncated."""
    header = _header((int(starts[-1]), width))
    first, size = len(header), file.tell()
    if size < first:
        file.truncate(0)
        file.write(header)
        return 0
    tokens = (size - first) // (2 * width)
    prompts = int(np.searchsorted(starts, tokens, side="right")) - 1
    if prompts < len(starts) - 1:
        prompts -= prompts % READ_TOGETHER
    file.truncate(first + int(starts[prompts]) * 2 * width)
    return prompts


def _refuse_overflow(hidden: Tensor) -> None:
    largest = hidden.abs().max().item()  # NaN if any value is NaN
    if not largest <= torch.finfo(torch.float16).max:
        raise CompositionError(
            "Hidden states overflow float16, the type of their disk cache.",
            f"the largest value is {largest:.6g}, float16's maximum is {torch.finfo(torch.float16).max:.0f}",
            remedy="set training.cache_hidden_states=false: prompts are then encoded in every epoch",
        )


def _fingerprint(llm: nn.Module, layer: Layer, prompts: list[tuple[int, ...]], *, bf16: bool) -> str:
    digest = hashlib.sha256(repr((layer, bf16)).encode())
    for name, tensor in llm.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(repr(prompts).encode())
    return digest.hexdigest()[:16]
