"""TensorRT without TensorRT: engines that run the bundle's own ONNX graphs with ONNX Runtime, on the bytes of a fake GPU.

An engine file is JSON: which graph, and the manifest's entry. What TensorRT leaves to the caller is checked: shapes against
profiles, addresses, aliases, memory to compute with, and what must not change in a context once it has been captured.
"""

import json
from enum import Enum, IntEnum
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from llm2slm_export.bundle.manifest import EngineEntry, Manifest
from llm2slm_export.contract import ARGMAX_IDS, LOGITS, MAX_LOGITS
from llm2slm_export.inference.runtime.tensorrt.dtypes import STORED, from_stored, item_bytes, to_stored
from tests.support.fake_gpu import FakeFault, FakeGpu, overlap

_SCRATCH = 5000
_numbers = count()
_sessions: dict[str, Any] = {}


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity


class DataType(Enum):
    INT64, INT32, FLOAT, HALF, BF16 = "int64", "int32", "float32", "float16", "bfloat16"


class TensorLocation(Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


def engine_bytes(graph: Path, entry: EngineEntry, manifest: Manifest) -> bytes:
    """An engine file of a bundle's graph."""
    facts = {"graph": str(graph), "entry": entry.model_dump(), "context_per_token": manifest.shape.context_per_token,
            "num_tokens": manifest.tokenizer.slm_size}  # fmt: skip
    return json.dumps(facts).encode()


def fake_tensorrt(gpu: FakeGpu, version: str = "11.4.0.106") -> Any:
    """A module like `tensorrt`. `contexts`: every context that it has made."""
    contexts: list[FakeContext] = []

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            try:
                facts = json.loads(plan)
            except ValueError:
                self._logger.log(
                    Severity.ERROR, "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed."
                )
                return None
            return FakeEngine(gpu, contexts, facts)

    return SimpleNamespace(
        __name__=f"fake_tensorrt_{next(_numbers)}", __version__=version, ILogger=ILogger, DataType=DataType, Runtime=Runtime,
        TensorLocation=TensorLocation, ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy=DynamicShapesKernelSpecializationStrategy, contexts=contexts,
    )  # fmt: skip


class FakeEngine:
    def __init__(self, gpu: FakeGpu, contexts: "list[FakeContext]", facts: dict[str, Any]) -> None:
        self.gpu, self.entry = gpu, EngineEntry.model_validate(facts["entry"])
        self.context_per_token, self.num_tokens = facts["context_per_token"], facts["num_tokens"]
        self.graph = facts["graph"]
        self.specs = {t.name: t for t in (*self.entry.inputs, *self.entry.outputs)}
        self._names = list(self.specs)
        self._contexts = contexts
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(self.entry.profiles)
        self.device_memory_size_v2 = _SCRATCH

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.specs[name].dtype)

    def get_tensor_location(self, name: str) -> TensorLocation:  # noqa: ARG002
        return TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.entry.aliases.get(name)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        bounds = self.entry.profiles[profile_index][name]
        return [bounds.minimum, bounds.optimum, bounds.maximum]

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=None)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        config.create_runtime_cache = object
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        return config

    def create_execution_context(self, how: Any) -> "FakeContext":
        assert getattr(how, "strategy", how) == ExecutionContextAllocationStrategy.USER_MANAGED
        context = FakeContext(self)
        self._contexts.append(context)
        return context

    @property
    def session(self) -> Any:
        if self.graph not in _sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            _sessions[self.graph] = onnxruntime.InferenceSession(self.graph, options, ["CPUExecutionProvider"])
        return _sessions[self.graph]


class FakeContext:
    """`calls`: the shapes and addresses of each call that was enqueued."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._gpu = engine, engine.gpu
        self._scratch: tuple[int, int] | None = None
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self._version = 0  # of what it has been told
        self._warm = -1
        self.changes = 0
        self.calls = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < _SCRATCH:
            raise FakeFault(f"{size} bytes to compute with, needs {_SCRATCH}")
        self._scratch = (memory, size)
        self._changed()

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:  # noqa: ARG002
        if not 0 <= profile_index < len(self._engine.entry.profiles):
            return False
        self.profile, self.shapes = profile_index, {}
        self._changed()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.profile is None:
            return False
        bounds = self._engine.entry.profiles[self.profile].get(name)
        fixed = self._engine.specs[name].axes
        if len(shape) != len(fixed) or any(isinstance(a, int) and a != n for a, n in zip(fixed, shape, strict=True)):
            return False
        if bounds and not all(
            low <= n <= high for low, n, high in zip(bounds.minimum, shape, bounds.maximum, strict=True)
        ):
            return False
        self.shapes[name] = tuple(shape)
        self._changed()
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if memory % 256 or not memory:
            return False
        self.addresses[name] = memory
        self._changed()
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = self._sizes()
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self._engine.specs[name].axes)

    def is_stream_capturable(self, stream: int) -> bool:  # noqa: ARG002
        return self._warm == self._version

    def execute_async_v3(self, stream_handle: int) -> bool:
        entry = self._engine.entry
        if self._scratch is None or self.profile is None:
            return False
        if any(t.name not in self.shapes for t in entry.inputs) or self._engine.specs.keys() - self.addresses.keys():
            return False
        self._check_aliases()
        captured = self._gpu.capturing(stream_handle)
        if captured and self._warm != self._version:
            return False  # the first call with a shape prepares itself
        version, addresses = self._version, dict(self.addresses)
        shapes = {name: self.get_tensor_shape(name) for name in self._engine.specs} | self.shapes

        def work() -> None:
            if captured and self._version != version:
                raise FakeFault("a context was changed after it had been captured")
            self._run(shapes, addresses)

        self._gpu.enqueue(stream_handle, work)
        self._warm = self._version
        return True

    def _changed(self) -> None:
        self._version += 1
        self.changes += 1

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for tensor in self._engine.entry.inputs:
            for axis, size in zip(tensor.axes, self.shapes[tensor.name], strict=True):
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    raise FakeFault(f"{tensor.name}: {axis} is {size} here and {sizes[axis]} elsewhere")
        if "prompt" in sizes:
            sizes.setdefault("context", sizes["prompt"] * self._engine.context_per_token)
        return sizes

    def _range(self, name: str) -> tuple[int, int]:
        shape = self.shapes.get(name) or self.get_tensor_shape(name)
        return self.addresses[name], int(np.prod(shape)) * item_bytes(self._engine.specs[name].dtype)

    def _check_aliases(self) -> None:
        entry = self._engine.entry
        outputs = [t.name for t in entry.outputs]
        for output in outputs:
            alias = entry.aliases.get(output)
            if alias is not None and self.addresses[output] != self.addresses[alias]:
                raise FakeFault(f"{output} is not where {alias} is, over which the engine writes it")
            others = [n for n in self._engine.specs if n not in (output, alias)]
            for other in others:
                if overlap(self._range(output), self._range(other)):
                    raise FakeFault(f"{output} lies over {other}")

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        assert self._scratch is not None
        self.calls += 1
        feeds, entry = {}, self._engine.entry
        for tensor in entry.inputs:
            kind, shape = np.dtype(STORED[tensor.dtype]), shapes[tensor.name]
            count = int(np.prod(shape)) * kind.itemsize
            stored = self._gpu.read(addresses[tensor.name], count).view(kind).reshape(shape)
            wide = from_stored(stored, tensor.dtype)
            feeds[tensor.name] = wide if wide.dtype == np.float32 else wide.astype(np.int64)
        self._gpu.write(self._scratch[0], np.full(_SCRATCH, 0xAB, np.uint8))
        names = [t.name for t in entry.outputs if t.name not in (ARGMAX_IDS, MAX_LOGITS)]
        found = dict(zip(names, self._engine.session.run(names, feeds), strict=True))
        if LOGITS in found:
            logits = found[LOGITS][..., : self._engine.num_tokens]
            found |= {ARGMAX_IDS: logits.argmax(axis=-1), MAX_LOGITS: logits.max(axis=-1)}
        for tensor in entry.outputs:
            array = found[tensor.name]
            if array.shape != shapes[tensor.name]:
                raise FakeFault(f"{tensor.name}: {array.shape}, expected {shapes[tensor.name]}")
            self._gpu.write(addresses[tensor.name], to_stored(array, tensor.dtype))
