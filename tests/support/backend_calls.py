"""Calls of a backend without a tokenizer: prompts of made-up ids."""

import numpy as np

from llm2slm_export.inference.runtime.backend import Conditioning, Ids
from llm2slm_export.inference.runtime.onnxruntime.backend import OrtBackend

LENGTHS = [5, 9, 2]


def conditioning_of(
    backend: OrtBackend, lengths: list[int], *, first: int = 0, width: int | None = None
) -> Conditioning:
    """What prompts of these lengths are made into, padded to `width` (None: to the longest); the first has number `first`."""
    ids = np.zeros((len(lengths), width or max(lengths)), np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = np.arange(length) * 7 + 10 * (first + row) + 3
    mask = (ids > 0).astype(np.int64)
    return backend.project(backend.encode(ids, mask), ids, mask)


def ids_of(rows: list[int], call: int) -> Ids:
    """What the rows of these prompts are fed in a call: [batch, 1]."""
    return np.array([[20 * row + call + 3] for row in rows])
