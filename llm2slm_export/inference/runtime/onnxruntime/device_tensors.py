"""Creating, gathering and joining tensors in host memory or on a device.

Outside graphs ONNX Runtime only copies whole tensors between host and device. To slice, gather and concatenate on the device,
small ONNX graphs are generated here, so that a cache never passes through host memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llm2slm_export.arrays import Array
from llm2slm_export.contract import StateSpec
from llm2slm_export.inference.runtime.backend import Ids

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
_ROWS = 0  # the axis `batch`
# onnx.proto: TensorProto.DataType, AttributeProto.AttributeType, and the versions of the generated graph.
_ELEMENT, _INT, _IR_VERSION, _OPSET = {"float32": 1, "int64": 7, "float16": 10}, 2, 8, 13


class Memory(Protocol):
    """The operations on tensors of a device. Tensors are OrtValues."""

    def put(self, array: Array) -> Any:
        """Create a tensor from an array in host memory."""
        ...

    def take(self, values: Iterable[Any], rows: Ids) -> Iterable[Any]:
        """Gather rows of tensors [batch, …] of equal shape and type. Rows may repeat."""
        ...

    def join(self, values: Iterable[Any], others: Iterable[Any], axis: int, length: int) -> Iterable[Any]:
        """Create tensors [batch + others' batch, …]: the rows of `values`, then of `others`, of equal type.

        `axis`, that of positions, is cut or padded to `length` in both. The padding is finite.
        """
        ...

    def grow(self, values: Iterable[Any], spec: StateSpec, shape: Sequence[int], held: int) -> Iterable[Any]:
        """Create tensors of a state of `shape`, with the first `held` positions of `values`, along its growing axis.

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

    def join(self, values: Iterable[Any], others: Iterable[Any], axis: int, length: int) -> Iterator[Any]:
        """See `Memory`. Lazy."""
        for pair in zip(values, others, strict=True):
            first, second = (value.numpy() for value in pair)
            shape = list(first.shape)
            shape[_ROWS], shape[axis] = len(first) + len(second), length
            joined = np.zeros(shape, first.dtype)
            for rows, array in ((joined[: len(first)], first), (joined[len(first) :], second)):
                held = _first(axis, min(length, array.shape[axis]))
                rows[held] = array[held]
            yield self.put(joined)

    def grow(self, values: Iterable[Any], spec: StateSpec, shape: Sequence[int], held: int) -> Iterator[Any]:
        """See `Memory`. Lazy."""
        kept = _first(spec.growing_axis, held)
        for value in values:
            array = np.zeros(shape, spec.past.dtype)
            if held:
                array[kept] = value.numpy()[kept]
            yield self.put(array)


def _first(axis: int, count: int) -> tuple[slice, ...]:
    """The index of the first `count` entries along an axis."""
    return (*(slice(None) for _ in range(axis)), slice(count))


class DeviceTensors:
    """`Memory` of a device. Graphs on the device gather and join tensors; only `put` copies from the host.

    Args:
        kind, index: the device by ONNX Runtime's names: `cuda`, 0. With `cpu` the same code runs without a GPU.
        providers: the execution providers of these graphs' sessions.
    """

    def __init__(self, kind: str, index: int, providers: Sequence[Any]) -> None:
        self._kind, self._index, self._providers = kind, index, providers
        self._sessions: dict[tuple[Callable[[GraphTensors], bytes], GraphTensors], Any] = {}

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
        return self.gathered(list(values), rows)

    def grow(self, values: Iterable[Any], spec: StateSpec, shape: Sequence[int], held: int) -> list[Any]:
        """See `Memory`. With `held` 0 one position of zeros is copied to the device and repeated."""
        axis, sources, one = spec.growing_axis, list(values), list(shape)
        batch, capacity = shape[_ROWS], shape[axis]
        if held:
            return self.gathered(sources, np.arange(batch), (axis, padded_positions(held, capacity)))
        one[_ROWS] = one[axis] = 1
        row = self.put(np.zeros(one, spec.past.dtype))
        return self.gathered([row] * len(sources), np.zeros(batch, np.int64), (axis, np.zeros(capacity, np.int64)))

    def join(self, values: Iterable[Any], others: Iterable[Any], axis: int, length: int) -> list[Any]:
        """See `Memory`. The padding repeats the first position, so both must have one."""
        pairs = list(zip(values, others, strict=True))
        if not pairs:
            return []
        (first, second), dtype = pairs[0], _DTYPES[pairs[0][0].data_type()]
        shape = list(first.shape())
        shape[_ROWS], shape[axis] = shape[_ROWS] + second.shape()[_ROWS], length
        targets = [self.empty(shape, dtype) for _ in pairs]
        indices = {
            name: padded_positions(value.shape()[axis], length)
            for name, value in (("positions", first), ("other_positions", second))
        }
        tensors = {f"from.{number}": value for number, (value, _) in enumerate(pairs)}
        tensors |= {f"other.{number}": value for number, (_, value) in enumerate(pairs)}
        self._run(join_graph, GraphTensors(len(pairs), dtype, len(shape), axis), indices, tensors, targets)
        return targets

    def gathered(
        self,
        values: Sequence[Any],
        rows: Ids,
        positions: tuple[int, Ids] | None = None,
        into: Sequence[Any] | None = None,
    ) -> list[Any]:
        """Gather rows and positions of tensors [batch, …] of equal shape and type.

        Args:
            positions: the axis of positions, and those to gather; None: all.
            into: tensors of the resulting shape to write to, none of them among `values`; None: new ones.
        """
        if not values:
            return []
        shape, dtype = list(values[0].shape()), _DTYPES[values[0].data_type()]
        shape[_ROWS] = len(rows)
        if positions is not None:
            shape[positions[0]] = len(positions[1])
        targets = list(into) if into is not None else [self.empty(shape, dtype) for _ in values]
        of = GraphTensors(len(targets), dtype, len(shape), positions[0] if positions is not None else None)
        indices = {"rows": rows} | ({} if positions is None else {"positions": positions[1]})
        tensors = {f"from.{number}": value for number, value in enumerate(values)}
        self._run(row_graph if positions is None else position_graph, of, indices, tensors, targets)
        return targets

    def _run(
        self,
        graph: "Callable[[GraphTensors], bytes]",
        of: "GraphTensors",
        indices: Mapping[str, Ids],
        tensors: Mapping[str, Any],
        targets: Sequence[Any],
    ) -> None:
        """Run a graph of this module.

        Args:
            graph: the function that makes the graph.
            of: the tensors that it gathers and joins.
            indices, tensors: its inputs.
            targets: the tensors of its outputs, in order.
        """
        session = self._session(graph, of)
        binding = session.io_binding()
        # Kept alive until the call ends: in host memory a value shares the memory of its array.
        put = {name: self.put(array) for name, array in indices.items()}
        for name, value in {**put, **tensors}.items():
            binding.bind_ortvalue_input(name, value)
        for number, target in enumerate(targets):
            binding.bind_ortvalue_output(f"to.{number}", target)
        session.run_with_iobinding(binding)

    def _session(self, graph: "Callable[[GraphTensors], bytes]", of: "GraphTensors") -> Any:
        import onnxruntime

        key = graph, of
        if key not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            self._sessions[key] = onnxruntime.InferenceSession(
                graph(of), options, providers=self._providers, enable_fallback=0
            )
        return self._sessions[key]


def padded_positions(held: int, capacity: int) -> Ids:
    """Indices [capacity]: the first `held` positions, then 0."""
    positions = np.arange(capacity)
    return np.where(positions < held, positions, 0)


@dataclass(frozen=True)
class GraphTensors:
    """The tensors that a graph of this module gathers and joins.

    Args:
        count: number of outputs.
        dtype: their type.
        rank: their number of axes. The first is `batch`.
        axis: the axis of positions; None: positions are not gathered.
    """

    count: int
    dtype: str
    rank: int
    axis: int | None = None


def row_graph(of: GraphTensors) -> bytes:
    """An ONNX model that gathers `rows`: `from.N` → `to.N`.

    The models of this module are encoded by hand (onnx.proto), because inference does not depend on the package onnx.
    """
    nodes = [_gather(f"from.{n}", "rows", f"to.{n}", _ROWS) for n in range(of.count)]
    return _model(nodes, of, indices=["rows"], sources=["from"])


def position_graph(of: GraphTensors) -> bytes:
    """An ONNX model that gathers `rows`, and `positions` along the axis: `from.N` → `to.N`."""
    assert of.axis is not None
    nodes = []
    for n in range(of.count):
        nodes.append(_gather(f"from.{n}", "rows", f"rows.{n}", _ROWS))
        nodes.append(_gather(f"rows.{n}", "positions", f"to.{n}", of.axis))
    return _model(nodes, of, indices=["rows", "positions"], sources=["from"])


def join_graph(of: GraphTensors) -> bytes:
    """An ONNX model that joins pairs of tensors along the axis `batch`: `from.N` and `other.N` → `to.N`.

    `positions` and `other_positions` are gathered along the axis of the first and of the second.
    """
    assert of.axis is not None
    nodes = []
    for n in range(of.count):
        nodes.append(_gather(f"from.{n}", "positions", f"first.{n}", of.axis))
        nodes.append(_gather(f"other.{n}", "other_positions", f"second.{n}", of.axis))
        nodes.append(_node("Concat", [f"first.{n}", f"second.{n}"], f"to.{n}", _ROWS))
    return _model(nodes, of, indices=["positions", "other_positions"], sources=["from", "other"])


def _model(nodes: Sequence[bytes], of: GraphTensors, *, indices: Sequence[str], sources: Sequence[str]) -> bytes:
    """An encoded ModelProto with the outputs `to.N`, N below the count.

    Args:
        nodes: encoded NodeProtos.
        indices: the inputs of integers.
        sources: the inputs SOURCE.N.
    """
    inputs = [_tensor(name, "int64", 1) for name in indices]
    inputs += [_tensor(f"{name}.{n}", of.dtype, of.rank) for name in sources for n in range(of.count)]
    outputs = [_tensor(f"to.{n}", of.dtype, of.rank) for n in range(of.count)]
    graph = [*(_bytes(1, node) for node in nodes), _bytes(2, b"rows")]
    graph += [*(_bytes(11, tensor) for tensor in inputs), *(_bytes(12, tensor) for tensor in outputs)]
    opset = _bytes(8, _bytes(1, b"") + _number(2, _OPSET))
    return _number(1, _IR_VERSION) + opset + _bytes(7, b"".join(graph))


def _gather(source: str, indices: str, target: str, axis: int) -> bytes:
    """An encoded NodeProto of a Gather."""
    return _node("Gather", [source, indices], target, axis)


def _node(kind: str, inputs: Sequence[str], output: str, axis: int) -> bytes:
    """An encoded NodeProto with the attribute `axis`, named after its output."""
    attribute = _bytes(1, b"axis") + _number(3, axis) + _number(20, _INT)
    names = [*(_bytes(1, name.encode()) for name in inputs), _bytes(2, output.encode())]
    return b"".join([*names, _bytes(3, f"{kind} {output}".encode()), _bytes(4, kind.encode()), _bytes(5, attribute)])


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
