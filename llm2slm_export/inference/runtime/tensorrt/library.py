"""TensorRT and TensorRT-RTX: the installed library of a variant. One code path runs engines of both."""

import importlib
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm2slm_export.contract import TensorRtVariant
from llm2slm_export.environment.tensorrt_modules import MODULES, tensorrt_logger
from llm2slm_export.errors import EngineError

_TOLD_LINES = 8


@dataclass(frozen=True)
class FoundLibrary:
    """What there is of a variant: its version, or why there is none. `module`: what was imported."""

    variant: TensorRtVariant
    version: str | None
    problem: str | None = None
    module: Any = field(default=None, repr=False, compare=False)

    @property
    def pip(self) -> str:
        """What to type where it is missing."""
        return f"pip install 'llm2slm-export[{self.variant}]'"


def find_library(variant: TensorRtVariant) -> FoundLibrary:
    """The installed library of a variant; what is missing, or does not load, is a finding."""
    try:
        module = importlib.import_module(MODULES[variant])
    except ModuleNotFoundError as error:
        return FoundLibrary(variant, None, f"not installed: {error.name}")
    # Its own libraries are loaded on import, in ways that fail with all of these.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return FoundLibrary(variant, None, f"installed{_installed(variant)}, but does not load: {error}")
    return FoundLibrary(variant, module.__version__, module=module)


class EngineLibrary:
    """A variant's library at work.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`, or what looks like it.

    Raises:
        EngineError: it does not start.
    """

    def __init__(self, variant: TensorRtVariant, trt: Any) -> None:
        self.variant, self.trt = variant, trt
        self._logger = tensorrt_logger(trt)
        try:
            self._runtime = trt.Runtime(self._logger)
        # pybind11 says so where the library gives no object.
        except (TypeError, RuntimeError) as error:
            raise self._failure(f"{self._name} does not start.") from error
        self._types = {
            trt.DataType.INT64: "int64",
            trt.DataType.INT32: "int32",
            trt.DataType.FLOAT: "float32",
            trt.DataType.HALF: "float16",
            trt.DataType.BF16: "bfloat16",
        }

    def deserialize(self, path: Path) -> Any:
        """The ICudaEngine in a file.

        Raises:
            EngineError: the library does not take it, with what it said.
        """
        self._logger.lines.clear()
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise self._failure(f"{self._name} does not load {path}.")
        return engine

    def dtype(self, engine: Any, tensor: str) -> str:
        """A tensor's type, as the contract names it."""
        found = engine.get_tensor_dtype(tensor)
        return self._types.get(found, str(found))

    def settings(self, engine: Any) -> Any:
        """What an engine's contexts are made with: their memory is the caller's.

        TensorRT-RTX compiles kernels for the shapes that it sees: once for all contexts, and before a call goes on. With
        kernels that come later, a captured graph would hold those that stand in for them.
        """
        trt, managed = self.trt, self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.variant == "tensorrt":
            return managed
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.set_runtime_cache(config.create_runtime_cache())
        return config

    def context(self, engine: Any, settings: Any) -> Any:
        """A new IExecutionContext.

        Raises:
            EngineError: there is none, with what the library said.
        """
        self._logger.lines.clear()
        context = engine.create_execution_context(settings)
        if context is None:
            raise self._failure(f"{self._name} makes no execution context.")
        return context

    def capturable(self, context: Any, stream: int) -> bool:
        """Whether a call of a context can be captured; TensorRT-RTX says no where it has kernels to compile."""
        return self.variant == "tensorrt" or bool(context.is_stream_capturable(stream))

    def failed(self, what: str) -> EngineError:
        """An error with what the library said last."""
        return self._failure(f"{self._name}: {what}")

    @property
    def _name(self) -> str:
        return f"{self.variant} {self.trt.__version__}"

    def _failure(self, fact: str) -> EngineError:
        return EngineError(
            fact, *self._logger.lines[-_TOLD_LINES:],
            remedy="see `llm2slm-export doctor BUNDLE`, and build the engines again where they do not fit",
        )  # fmt: skip


def _installed(variant: TensorRtVariant) -> str:
    for package in (MODULES[variant].replace("_", "-"), f"{MODULES[variant]}_cu12", f"{MODULES[variant]}_cu13"):
        try:
            return f" ({package} {version(package)})"
        except PackageNotFoundError:
            continue
    return ""
