"""The operations on tensors of a device, with the CPU's provider in the device's place."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from llm2slm_export.inference.runtime.onnxruntime.device_tensors import (
    DeviceTensors,
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
def test_the_graphs_are_onnx(graph: Callable[[int, str], bytes], dtype: str) -> None:
    onnx.checker.check_model(onnx.load_from_string(graph(130, dtype)), full_check=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positioned", [True, False])
def test_rows_and_positions_are_gathered(memory: DeviceTensors, dtype: str, positioned: bool) -> None:
    arrays = [np.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4).astype(dtype) + number for number in range(3)]
    rows, positions = np.array([1, 0, 1, 1]), np.array([0, 4, 0]) if positioned else None
    got = memory.gathered([memory.put(array) for array in arrays], rows, positions)
    for array, value in zip(arrays, got, strict=True):
        expected = array[rows] if positions is None else array[rows][:, :, positions]
        np.testing.assert_array_equal(value.numpy(), expected)
        assert value.numpy().dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 5, 7, 40], ids="length {}".format)
@pytest.mark.parametrize("make", [HostMemory, lambda: DeviceTensors("cpu", 0, ["CPUExecutionProvider"])])
def test_joined_tensors_are_cut_or_padded(make: Callable[[], Any], dtype: str, length: int) -> None:
    memory = make()
    arrays = [np.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4).astype(dtype) + number for number in range(3)]
    others = [np.arange(1 * 3 * 7 * 4).reshape(1, 3, 7, 4).astype(dtype) - 9 * number for number in range(3)]
    put = lambda several: (memory.put(array) for array in several)  # noqa: E731
    joined = list(memory.join(put(arrays), put(others), length))
    assert len(joined) == 3
    for array, other, value in zip(arrays, others, joined, strict=True):
        found = value.numpy()
        assert found.shape == (3, 3, length, 4)
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found[:2, :, : min(5, length)], array[:, :, :length])
        np.testing.assert_array_equal(found[2:, :, : min(7, length)], other[:, :, :length])
        assert np.isfinite(found).all()
    assert list(memory.join([], [], length)) == []


def test_a_grown_tensor_has_the_old_positions_and_finite_numbers_after_them(memory: DeviceTensors) -> None:
    spec: Any = SimpleNamespace(dtype="float32")
    (empty,) = memory.grow([None], spec, [3, 2, 32, 4], 0)
    assert (empty.numpy() == 0).all()
    held = np.arange(3 * 2 * 8 * 4, dtype=np.float32).reshape(3, 2, 8, 4)
    (grow,) = memory.grow([memory.put(held)], spec, [3, 2, 32, 4], 5)
    np.testing.assert_array_equal(grow.numpy()[:, :, :5], held[:, :, :5])
    assert np.isfinite(grow.numpy()).all()
    assert padded_positions(2, 5).tolist() == [0, 1, 0, 0, 0]
