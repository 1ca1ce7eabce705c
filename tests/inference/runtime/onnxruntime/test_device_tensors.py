"""The operations on tensors of a device, with the CPU's provider in the device's place."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from llm2slm_export.contract import StateSpec, TensorSpec
from llm2slm_export.inference.runtime.onnxruntime.device_tensors import (
    DeviceTensors,
    GraphTensors,
    HostMemory,
    join_graph,
    padded_positions,
    position_graph,
    row_graph,
)

DTYPES = ["float32", "float16", "int64"]


@pytest.fixture
def memory() -> DeviceTensors:
    return DeviceTensors("cpu", 0, ["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("graph", [row_graph, position_graph, join_graph])
@pytest.mark.parametrize(("rank", "axis"), [(4, 2), (3, 1), (5, 4)])
def test_the_graphs_are_onnx(graph: Callable[[GraphTensors], bytes], dtype: str, rank: int, axis: int) -> None:
    model = onnx.load_from_string(graph(GraphTensors(130, dtype, rank, axis)))
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positioned", [True, False])
def test_rows_and_positions_are_gathered(memory: DeviceTensors, dtype: str, positioned: bool) -> None:
    arrays = [np.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4).astype(dtype) + number for number in range(3)]
    rows, positions = np.array([1, 0, 1, 1]), np.array([0, 4, 0])
    got = memory.gathered([memory.put(array) for array in arrays], rows, (2, positions) if positioned else None)
    for array, value in zip(arrays, got, strict=True):
        expected = array[rows][:, :, positions] if positioned else array[rows]
        np.testing.assert_array_equal(value.numpy(), expected)
        assert value.numpy().dtype == np.dtype(dtype)


MEMORIES = pytest.mark.parametrize("make", [HostMemory, lambda: DeviceTensors("cpu", 0, ["CPUExecutionProvider"])])
# Keys and values, a latent cache without heads, and one whose positions are last: [batch, …] with an axis of positions.
STATES = pytest.mark.parametrize(("inner", "axis"), [((3, 4), 2), ((4,), 1), ((3, 4, 2), 4)])


def filled(rows: int, positions: int, inner: tuple[int, ...], axis: int, dtype: str = "float32") -> Any:
    """An array [rows, …] with different numbers, and `positions` at `axis`."""
    shape = [rows, *inner]
    shape.insert(axis, positions)
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@MEMORIES
@STATES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 5, 7, 40], ids="length {}".format)
def test_joined_tensors_are_cut_or_padded(
    make: Callable[[], Any], inner: tuple[int, ...], axis: int, dtype: str, length: int
) -> None:
    memory = make()
    arrays = [filled(2, 5, inner, axis, dtype) + number for number in range(3)]
    others = [filled(1, 7, inner, axis, dtype) - 9 * number for number in range(3)]
    put = lambda several: (memory.put(array) for array in several)  # noqa: E731
    joined = list(memory.join(put(arrays), put(others), axis, length))
    assert len(joined) == 3
    for array, other, value in zip(arrays, others, joined, strict=True):
        found = value.numpy()
        assert found.shape == filled(3, length, inner, axis).shape
        assert found.dtype == np.dtype(dtype)
        for rows, before in ((found[:2], array), (found[2:], other)):
            held = np.arange(min(before.shape[axis], length))
            np.testing.assert_array_equal(rows.take(held, axis), before.take(held, axis))
        assert np.isfinite(found).all()
    assert list(memory.join([], [], axis, length)) == []


@MEMORIES
@STATES
def test_a_grown_tensor_has_the_old_positions_and_finite_numbers_after_them(
    make: Callable[[], Any], inner: tuple[int, ...], axis: int
) -> None:
    memory, axes = make(), ["batch", *inner]
    axes.insert(axis, "capacity")
    spec = StateSpec(past=TensorSpec("past", "float32", tuple(axes)), present=TensorSpec("present", "float32", ()))
    assert spec.growing_axis == axis
    held, shape = filled(3, 8, inner, axis), filled(3, 32, inner, axis).shape
    (empty,) = memory.grow([None], spec, shape, 0)
    assert (empty.numpy() == 0).all()
    (grow,) = memory.grow([memory.put(held)], spec, shape, 5)
    assert grow.numpy().shape == shape
    np.testing.assert_array_equal(grow.numpy().take(range(5), axis), held.take(range(5), axis))
    assert np.isfinite(grow.numpy()).all()


def test_positions_are_padded_with_the_first() -> None:
    assert padded_positions(2, 5).tolist() == [0, 1, 0, 0, 0]
