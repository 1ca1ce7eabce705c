"""The installed library of a variant, TensorRT or TensorRT-RTX. One code path runs engines of both."""

import importlib
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm2slm_export.contract import TensorRtVariant
from llm2slm_export.environment.tensorrt_modules import MODULES, tensorrt_logger
from llm2slm_export.errors import EngineError

_SHOWN_LINES = 8


@dataclass(frozen=True)
class FoundLibrary:
    """The installed library of a variant: its version and module, or the problem why it is unusable."""

    variant: TensorRtVariant
    version: str | None
    problem: str | None = None
    module: Any = field(default=None, repr=False, compare=False)

    @property
    def pip(self) -> str:
        """The command that installs it."""
        return f"pip install 'llm2slm-export[{self.variant}]'"


def find_library(variant: TensorRtVariant) -> FoundLibrary:
    """Find the installed library of a variant. A missing or broken one is returned as a problem, not raised."""
    try:
        module = importlib.import_module(MODULES[variant])
    except ModuleNotFoundError as error:
        return FoundLibrary(variant, None, f"not installed: {error.name}")
    # The import loads shared libraries, which can fail with any of these.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return FoundLibrary(variant, None, f"installed{_installed(variant)}, but does not load: {error}")
    return FoundLibrary(variant, module.__version__, module=module)


class EngineLibrary:
    """The runtime of a variant's library.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`, or a test double.

    Raises:
        EngineError: the runtime cannot be created.
    """

    def __init__(self, variant: TensorRtVariant, trt: Any) -> None:
        self.variant, self.trt = variant, trt
        self._logger = tensorrt_logger(trt)
        try:
            self._runtime = trt.Runtime(self._logger)
        # pybind11 raises these if the library returns no object.
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
        """Load the ICudaEngine in a file.

        Raises:
            EngineError: the library cannot load it, with its messages.
        """
        self._logger.lines.clear()
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise self._failure(f"{self._name} cannot load {path}.")
        return engine

    def dtype(self, engine: Any, tensor: str) -> str:
        """A tensor's type by its contract name."""
        found = engine.get_tensor_dtype(tensor)
        return self._types.get(found, str(found))

    def settings(self, engine: Any) -> Any:
        """The settings of an engine's contexts. The caller provides their memory.

        TensorRT-RTX compiles kernels for new shapes. They are compiled before a call runs, and shared by all contexts: with
        lazy compilation a captured graph would contain fallback kernels.
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
        """Create an IExecutionContext.

        Raises:
            EngineError: it cannot be created, with the library's messages.
        """
        self._logger.lines.clear()
        context = engine.create_execution_context(settings)
        if context is None:
            raise self._failure(f"{self._name} cannot create an execution context.")
        return context

    def capturable(self, context: Any, stream: int) -> bool:
        """Whether a context's call can be captured. TensorRT-RTX cannot capture calls for which it compiles kernels."""
        return self.variant == "tensorrt" or bool(context.is_stream_capturable(stream))

    def failed(self, what: str) -> EngineError:
        """An error with the library's last messages."""
        return self._failure(f"{self._name}: {what}")

    @property
    def _name(self) -> str:
        return f"{self.variant} {self.trt.__version__}"

    def _failure(self, fact: str) -> EngineError:
        return EngineError(
            fact, *self._logger.lines[-_SHOWN_LINES:],
            remedy="see `llm2slm-export doctor BUNDLE`, and build the engines again if they do not fit",
        )  # fmt: skip


def _installed(variant: TensorRtVariant) -> str:
    for package in (MODULES[variant].replace("_", "-"), f"{MODULES[variant]}_cu12", f"{MODULES[variant]}_cu13"):
        try:
            return f" ({package} {version(package)})"
        except PackageNotFoundError:
            continue
    return ""
