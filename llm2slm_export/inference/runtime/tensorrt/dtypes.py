"""Floats as engines store them. numpy has no bfloat16: its bits are the upper half of a float32's, kept as uint16."""

from typing import Any

import numpy as np
import numpy.typing as npt

from llm2slm_export.inference.runtime.backend import Array

STORED: dict[str, npt.DTypeLike] = {
    "int64": np.int64, "int32": np.int32, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16,
}  # fmt: skip


def item_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return np.dtype(STORED[dtype]).itemsize


def to_stored(array: Array, dtype: str) -> Array:
    """An array in an engine's type, rounded to nearest, ties to even; contiguous. What is too large is infinite."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, STORED[dtype])
    bits: npt.NDArray[np.uint32] = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    # Adding could make an infinity of what is not a number.
    return np.where(np.isnan(array), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def from_stored(array: Array, dtype: str) -> Array:
    """The other way round, exactly: floats as float32, integers as they are."""
    if dtype == "bfloat16":
        widened: npt.NDArray[Any] = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return widened
    return array.astype(np.float32) if dtype == "float16" else array
