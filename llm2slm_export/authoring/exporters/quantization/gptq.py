"""GPTQ: 4-bit quantization with error compensation (Frantar et al., arXiv 2210.17323), symmetric, in blocks.

Columns are quantized one after another. Later columns are adjusted to compensate for the error in the layer's outputs
on the calibration inputs. A block's scale is the one of `STEPS` with the smallest weighted error of its columns.
"""

import numpy as np
import numpy.typing as npt

from llm2slm_export.arrays import Array

ZERO_POINT = 8  # of unsigned 4-bit weights, MatMulNBits' default
# Candidate scales, relative to the scale that maps a block's largest weight to the end of the range; smaller scales
# clip it.
STEPS = np.linspace(1.0, 0.6, 21)
DAMPING = 0.01  # fraction of the mean of the diagonal, added to it: few inputs leave the moments singular


def quantize_int4(
    weight: Array, moments: Array | None, block: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Quantize [rows, columns] floats to 4 bits.

    weight ≈ (q - 8) · scale; a scale may be negative. The last block is padded.

    Args:
        weight: [rows, columns].
        moments: [columns, columns], the sum of x xᵀ over the layer's inputs x; None: all columns have equal weight.
        block: columns per scale.

    Returns:
        [rows, blocks, block / 2] uint8, two weights per byte, the first in the low half; [rows, blocks] float32 scales.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    left = np.zeros((rows, blocks * block))
    left[:, :columns] = weight
    inverse = _inverse_root(moments, columns, blocks * block)
    quantized = np.empty(left.shape, np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    for number in range(blocks):
        start, end = number * block, (number + 1) * block
        own = left[:, start:end]
        # Cost of a column's error after compensation by later columns.
        costs = 1 / np.diag(inverse)[start:end] ** 2
        scales[:, number] = _best_scales(own, costs)
        scale = scales[:, number].astype(np.float64)
        errors = np.empty_like(own)
        for column in range(block):
            q = _rounded(own[:, column], scale)
            quantized[:, start + column] = q
            errors[:, column] = (own[:, column] - (q - ZERO_POINT) * scale) / inverse[start + column, start + column]
            own[:, column:] -= errors[:, column, None] * inverse[start + column, start + column : end]
        left[:, end:] -= errors @ inverse[start:end, end:]
    packed = (quantized[:, ::2] | quantized[:, 1::2] << 4).astype(np.uint8)
    return packed.reshape(rows, blocks, block // 2), scales


def _inverse_root(moments: Array | None, columns: int, padded: int) -> Array:
    """[padded, padded] upper triangular U with UᵀU = inverse of the damped moments."""
    if moments is None:
        return np.eye(padded)
    damped = np.eye(padded)
    known = moments.astype(np.float64)
    diagonal = np.diag(known).copy()
    known[np.diag_indices(columns)] += np.where(diagonal == 0, 1.0, DAMPING * diagonal.mean())
    damped[:columns, :columns] = known
    root: Array = np.linalg.cholesky(np.linalg.inv(damped)).T
    return root


def _best_scales(weights: Array, costs: Array) -> Array:
    """Scales [rows] of weights [rows, block] whose columns have the costs [block]."""
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=1)[:, None], axis=1)[:, 0]
    whole = np.where(largest == 0, 1.0, largest / -ZERO_POINT)  # the range has one more value below zero than above
    best, least = whole, np.full(len(weights), np.inf)
    for step in STEPS:
        scale = whole * step
        harm = (((_rounded(weights, scale[:, None]) - ZERO_POINT) * scale[:, None] - weights) ** 2) @ costs
        best, least = np.where(harm < least, scale, best), np.minimum(harm, least)
    return best


def _rounded(weights: Array, scales: Array) -> Array:
    q: Array = np.clip(np.rint(weights / scales) + ZERO_POINT, 0, 2 * ZERO_POINT - 1)
    return q
