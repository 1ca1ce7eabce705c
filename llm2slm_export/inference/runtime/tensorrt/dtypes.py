"""NumPy storage of the engines' types. NumPy lacks bfloat16: it is stored as uint16, the upper half of a float32's bits."""

import numpy as np
import numpy.typing as npt

from llm2slm_export.arrays import Array

STORED: dict[str, npt.DTypeLike] = {
    "int64": np.int64, "int32": np.int32, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16,
}  # fmt: skip


def item_bytes(dtype: str) -> int:
    """Bytes per element of a type."""
    return np.dtype(STORED[dtype]).itemsize


def to_stored(array: Array, dtype: str) -> Array:
    """Convert to a contiguous array in an engine's type. Rounds to nearest, ties to even; overflow becomes infinity."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, STORED[dtype])
    bits: npt.NDArray[np.uint32] = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    # Rounding could turn a NaN into infinity, so NaNs are converted separately.
    return np.where(np.isnan(array), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def from_stored(array: Array, dtype: str) -> Array:
    """Convert from an engine's type: floats exactly to float32, integers unchanged."""
    if dtype == "bfloat16":
        widened: Array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return widened
    return array.astype(np.float32) if dtype == "float16" else array
