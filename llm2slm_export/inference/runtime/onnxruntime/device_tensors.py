"""Creating and gathering tensors in host memory or on a device.

Outside graphs ONNX Runtime only copies whole tensors between host and device. To slice and gather on the device, a small
ONNX graph is generated here, so that a cache never passes through host memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.contract import TensorSpec
from llm2slm_export.inference.runtime.backend import Ids

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
_RANK, _ROWS, _POSITIONS = (
    4,
    0,
    2,
)  # cache and cross-attention: [batch, num_key_value_heads, capacity or context, head_dim]
# onnx.proto: TensorProto.DataType, AttributeProto.AttributeType, and the versions of the generated graph.
_ELEMENT, _INT, _IR_VERSION, _OPSET = {"float32": 1, "int64": 7, "float16": 10}, 2, 8, 13


class Memory(Protocol):
    """The operations on tensors of a device. Tensors are OrtValues."""

    def put(self, array: Array) -> Any:
        """Create a tensor from an array in host memory."""
        ...

    def take(self, values: Iterable[Any], rows: Ids) -> Iterable[Any]:
        """Gather rows of tensors [batch, num_key_value_heads, …, head_dim] of equal shape and type. Rows may repeat."""
        ...

    def grow(self, values: Iterable[Any], spec: TensorSpec, shape: Sequence[int], held: int) -> Iterable[Any]:
        """Create tensors of `shape` [batch, num_key_value_heads, capacity, head_dim] with the first `held` positions of `values`.

        The other positions are finite and arbitrary, because attention multiplies them by 0. With `held` 0, only the number
        of `values` is used.
        """
        ...


class HostMemory:
    """`Memory` of the CPU, with NumPy."""

    def put(self, array: Array) -> Any:
        """Create a tensor. It shares the memory of a contiguous array."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def take(self, values: Iterable[Any], rows: Ids) -> Iterator[Any]:
        """See `Memory`. Lazy, so that each replaced tensor can be released before the next one is created."""
        return (self.put(np.take(value.numpy(), rows, axis=0)) for value in values)

    def grow(self, values: Iterable[Any], spec: TensorSpec, shape: Sequence[int], held: int) -> Iterator[Any]:
        """See `Memory`. Lazy."""
        for value in values:
            array = np.zeros(shape, spec.dtype)
            if held:
                array[:, :, :held] = value.numpy()[:, :, :held]
            yield self.put(array)


class DeviceTensors:
    """`Memory` of a device. A graph on the device gathers tensors; only `put` copies from the host.

    Args:
        kind, index: the device by ONNX Runtime's names: `cuda`, 0. With `cpu` the same code runs without a GPU.
        providers: the execution providers of the gathering sessions.
    """

    def __init__(self, kind: str, index: int, providers: Sequence[Any]) -> None:
        self._kind, self._index, self._providers = kind, index, providers
        self._sessions: dict[tuple[int, str, bool], Any] = {}

    def put(self, array: Array) -> Any:
        """Copy an array to the device."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._kind, self._index)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Create an uninitialized tensor."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype), self._kind, self._index)

    def take(self, values: Iterable[Any], rows: Ids) -> list[Any]:
        """See `Memory`."""
        return self.gathered(list(values), rows, None)

    def grow(self, values: Iterable[Any], spec: TensorSpec, shape: Sequence[int], held: int) -> list[Any]:
        """See `Memory`. With `held` 0 one position of zeros is copied to the device and repeated."""
        batch, heads, capacity, head_dim = shape
        sources = list(values)
        if held:
            return self.gathered(sources, np.arange(batch), padded_positions(held, capacity))
        row = self.put(np.zeros((1, heads, 1, head_dim), spec.dtype))
        return self.gathered([row] * len(sources), np.zeros(batch, np.int64), np.zeros(capacity, np.int64))

    def gathered(
        self, values: Sequence[Any], rows: Ids, positions: Ids | None, into: Sequence[Any] | None = None
    ) -> list[Any]:
        """Gather rows and positions of tensors of equal shape and type: [rows, num_key_value_heads, positions, head_dim].

        Args:
            positions: the positions to gather; None: all.
            into: tensors of the resulting shape to write to, none of them among `values`; None: new ones.
        """
        if not values:
            return []
        shape, dtype = list(values[0].shape()), _DTYPES[values[0].data_type()]
        shape[_ROWS] = len(rows)
        if positions is not None:
            shape[_POSITIONS] = len(positions)
        targets = list(into) if into is not None else [self.empty(shape, dtype) for _ in values]
        session = self._session(len(values), dtype, positioned=positions is not None)
        binding = session.io_binding()
        # Kept alive until the call ends: in host memory a value shares the memory of its array.
        indices = {"rows": self.put(rows)} | ({} if positions is None else {"positions": self.put(positions)})
        for name, value in indices.items():
            binding.bind_ortvalue_input(name, value)
        for number, (value, target) in enumerate(zip(values, targets, strict=True)):
            binding.bind_ortvalue_input(f"from.{number}", value)
            binding.bind_ortvalue_output(f"to.{number}", target)
        session.run_with_iobinding(binding)
        return targets

    def _session(self, count: int, dtype: str, *, positioned: bool) -> Any:
        import onnxruntime

        key = count, dtype, positioned
        if key not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            self._sessions[key] = onnxruntime.InferenceSession(
                gather_graph(count, dtype, positioned=positioned), options, providers=self._providers, enable_fallback=0
            )
        return self._sessions[key]


def padded_positions(held: int, capacity: int) -> Ids:
    """Indices [capacity]: the first `held` positions, then 0."""
    positions = np.arange(capacity)
    return np.where(positions < held, positions, 0)


def gather_graph(count: int, dtype: str, *, positioned: bool) -> bytes:
    """An ONNX model with `count` Gather nodes: `from.N` and `rows` → `to.N`, with `positions` also along axis 2.

    It is encoded by hand (onnx.proto), because inference does not depend on the package onnx.
    """
    nodes, inputs, outputs = [], [_tensor("rows", "int64", 1)], []
    if positioned:
        inputs.append(_tensor("positions", "int64", 1))
    for number in range(count):
        source, target, between = f"from.{number}", f"to.{number}", f"rows.{number}"
        if positioned:
            nodes += [_gather(source, "rows", between, _ROWS), _gather(between, "positions", target, _POSITIONS)]
        else:
            nodes.append(_gather(source, "rows", target, _ROWS))
        inputs.append(_tensor(source, dtype, _RANK))
        outputs.append(_tensor(target, dtype, _RANK))
    graph = [*(_bytes(1, node) for node in nodes), _bytes(2, b"gather")]
    graph += [*(_bytes(11, tensor) for tensor in inputs), *(_bytes(12, tensor) for tensor in outputs)]
    opset = _bytes(8, _bytes(1, b"") + _number(2, _OPSET))
    return _number(1, _IR_VERSION) + opset + _bytes(7, b"".join(graph))


def _gather(source: str, indices: str, target: str, axis: int) -> bytes:
    """An encoded NodeProto of a Gather."""
    attribute = _bytes(1, b"axis") + _number(3, axis) + _number(20, _INT)
    names = [_bytes(1, source.encode()), _bytes(1, indices.encode()), _bytes(2, target.encode())]
    return b"".join([*names, _bytes(3, f"{target} of {indices}".encode()), _bytes(4, b"Gather"), _bytes(5, attribute)])


def _tensor(name: str, dtype: str, rank: int) -> bytes:
    """An encoded ValueInfoProto with dynamic axes."""
    shape = _bytes(1, b"") * rank
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _number(1, _ELEMENT[dtype]) + _bytes(2, shape)))


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F)
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
