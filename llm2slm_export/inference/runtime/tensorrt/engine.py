"""A loaded TensorRT engine: its optimization profiles and execution contexts."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.manifest import EngineEntry
from llm2slm_export.contract import GraphName, TensorSpec
from llm2slm_export.errors import BundleError
from llm2slm_export.inference.runtime.tensorrt.library import EngineLibrary
from llm2slm_export.inference.runtime.tensorrt.memory import MemoryPool

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Bound:
    """The address and shape of a bound tensor."""

    address: int
    shape: Dims


class EngineContext:
    """An execution context of one optimization profile. Bindings persist, and binding the same again is free."""

    def __init__(self, library: EngineLibrary, context: Any, inputs: frozenset[str], stream: int) -> None:
        self._library, self._context, self._inputs, self._stream = library, context, inputs, stream
        self._bound: dict[str, Bound] = {}

    def bind(self, tensors: Mapping[str, Bound]) -> None:
        """Set the shapes and addresses that have changed.

        Raises:
            EngineError: TensorRT refuses one, or an output's shape differs.
        """
        changed = {name: bound for name, bound in tensors.items() if self._bound.get(name) != bound}
        reshaped = {
            name: b for name, b in changed.items() if name not in self._bound or self._bound[name].shape != b.shape
        }
        for name in self._inputs & reshaped.keys():
            if not self._context.set_input_shape(name, reshaped[name].shape):
                raise self._library.failed(f"{name} cannot have the shape {list(reshaped[name].shape)}")
        for name, bound in changed.items():
            if not self._context.set_tensor_address(name, bound.address):
                raise self._library.failed(f"{name} cannot be at {bound.address:#x}")
        # An output larger than its tensor would overwrite other memory.
        for name in reshaped.keys() - self._inputs:
            if (shape := tuple(self._context.get_tensor_shape(name))) != reshaped[name].shape:
                raise self._library.failed(f"{name} has the shape {list(shape)}, not {list(reshaped[name].shape)}")
        self._bound |= changed

    def enqueue(self) -> None:
        """Enqueue one call on the stream.

        Raises:
            EngineError: TensorRT refuses the call.
        """
        if not self._context.execute_async_v3(self._stream):
            raise self._library.failed("a call failed")

    def capturable(self) -> bool:
        """Whether the next call can be captured."""
        return self._library.capturable(self._context, self._stream)


class Engine:
    """A graph's engine on a device.

    Args:
        memory: the device's memory pool.

    Raises:
        EngineError: the library cannot load it.
        DeviceError: there is too little memory.
        BundleError: it does not match the manifest, with every difference.
    """

    def __init__(
        self, bundle: Bundle, name: GraphName, entry: EngineEntry, *, library: EngineLibrary, memory: MemoryPool
    ) -> None:
        self.name, self.entry = name, entry
        self._library, self._memory = library, memory
        path = bundle.path(entry.file)
        remedy = f"free memory on the device, or build with fewer bits: --engine-precision {name}=int8"
        # A trial allocation of the engine's size, freed at once: TensorRT itself would only report that loading failed.
        memory.give_back(memory.take(path.stat().st_size, f"the {name} engine {entry.file}", remedy))
        memory.trim()
        self._engine: Any = library.deserialize(path)
        self._check(bundle)
        # Shared by all contexts, because they run one after another on one stream.
        self._scratch = memory.take(
            max(1, self._engine.device_memory_size_v2), f"the workspace of the {name} engine",
            "build the engines again with a lower --max-batch or --max-prompt",
        )  # fmt: skip
        self._settings: Any = library.settings(self._engine)
        self._contexts: dict[tuple[int, Hashable], EngineContext] = {}

    def profile(self, shapes: Mapping[str, Dims]) -> int | None:
        """The smallest optimization profile that covers these input shapes, the last of equals; None if none does."""
        covering = [
            (prod(prod(max(1, n) for n in bounds.maximum) for bounds in profile.values()), -index)
            for index, profile in enumerate(self.entry.profiles)
            if all(
                len(shapes[name]) == len(bounds.maximum)
                and all(
                    low <= n <= high for low, n, high in zip(bounds.minimum, shapes[name], bounds.maximum, strict=True)
                )
                for name, bounds in profile.items()
            )
        ]
        return -min(covering)[1] if covering else None

    def context(self, profile: int, key: Hashable = None) -> EngineContext:
        """The execution context of a profile, created on first use.

        Args:
            key: identifies a separate context. A captured graph is only valid while its context does not change.
        """
        found = self._contexts.get((profile, key))
        if found is None:
            context = self._library.context(self._engine, self._settings)
            context.set_device_memory(self._scratch.address, self._scratch.count)
            if not context.set_optimization_profile_async(profile, self._memory.stream):
                raise self._library.failed(f"the {self.name} engine has no profile {profile}")
            inputs = frozenset(tensor.name for tensor in self.entry.inputs)
            found = EngineContext(self._library, context, inputs, self._memory.stream)
            self._contexts[profile, key] = found
        return found

    def drop_contexts(self, first: Hashable) -> None:
        """Release the contexts whose key is a tuple with this first element."""
        gone = [own for own in self._contexts if isinstance(own[1], tuple) and own[1][0] == first]
        for own in gone:
            del self._contexts[own]

    def close(self) -> None:
        """Release the contexts, then the engine. The stream must be idle."""
        self._contexts.clear()
        self._settings = self._engine = None
        self._memory.give_back(self._scratch)

    def _check(self, bundle: Bundle) -> None:
        """Compare the engine with the manifest: tensors, types, profiles and aliases."""
        engine, entry = self._engine, self.entry
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        specs = {tensor.name: tensor for tensor in (*entry.inputs, *entry.outputs)}
        problems = [f"{name}: in the engine, not in the manifest" for name in sorted(names - specs.keys())]
        problems += [f"{name}: in the manifest, not in the engine" for name in sorted(specs.keys() - names)]
        if engine.num_optimization_profiles != len(entry.profiles):
            problems.append(
                f"profiles: the manifest has {len(entry.profiles)}, the engine {engine.num_optimization_profiles}"
            )
        else:
            problems += self._other_profiles(names)
        for name in sorted(names & specs.keys()):
            if (dtype := self._library.dtype(engine, name)) != specs[name].dtype:
                problems.append(f"{name}: the manifest has {specs[name].dtype}, the engine {dtype}")
            if engine.get_tensor_location(name) != self._library.trt.TensorLocation.DEVICE:
                problems.append(f"{name}: the engine expects it in host memory")
        for output in (tensor.name for tensor in entry.outputs if tensor.name in names):
            alias = engine.get_aliased_input_tensor(output) or None
            if alias != entry.aliases.get(output):
                problems.append(
                    f"{output}: the manifest aliases it to {entry.aliases.get(output)}, the engine to {alias}"
                )
        if problems:
            raise BundleError(
                f"{entry.file} is not the engine that the manifest of {bundle.directory} describes.", *problems,
                remedy="build the engines again",
            )  # fmt: skip

    def _other_profiles(self, names: set[str]) -> list[str]:
        found = []
        dynamic = {t.name for t in self.entry.inputs if any(isinstance(axis, str) for axis in t.axes)}
        for index, profile in enumerate(self.entry.profiles):
            for name, bounds in profile.items():
                if name not in names & dynamic:
                    continue
                shapes = [tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, index)]
                expected = [bounds.minimum, bounds.optimum, bounds.maximum]
                if shapes != expected:
                    found.append(f"{name}, profile {index}: the manifest has {expected}, the engine {shapes}")
        return found


def shape_of(tensor: TensorSpec, sizes: Mapping[str, int]) -> Dims:
    """The shape of a tensor with these sizes of the named axes."""
    return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in tensor.axes)


def shapes_of(tensors: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Dims]:
    """The shapes of several tensors by name; see `shape_of`."""
    return {tensor.name: shape_of(tensor, sizes) for tensor in tensors}
