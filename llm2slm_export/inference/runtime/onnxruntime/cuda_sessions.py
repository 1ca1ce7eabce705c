"""Sessions on ONNX Runtime's CUDA provider."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.contract import GraphName
from llm2slm_export.inference.runtime.onnxruntime.cuda_memory_errors import (
    described_out_of_memory,
    is_out_of_memory,
    reason,
)
from llm2slm_export.inference.runtime.onnxruntime.devices import ExecutionDevice
from llm2slm_export.inference.runtime.onnxruntime.exceptions import failures
from llm2slm_export.inference.runtime.onnxruntime.node_placement import RECORD, require_placement
from llm2slm_export.inference.runtime.onnxruntime.sessions import GraphSessions

_REFUSED_CAPTURE = "graph capture feature"  # in ONNX Runtime's message for a graph that cannot be captured


@dataclass(frozen=True)
class CudaOptions:
    """Options of a CUDA device.

    Args:
        memory_bytes: maximum device memory of each graph's session for weights and intermediate tensors; None: unlimited.
            KV caches, and tensors kept for reuse, are not counted.
        cuda_graphs: replay steps as CUDA graphs if the decoder can be captured.
    """

    memory_bytes: int | None = None
    cuda_graphs: bool = True


class CudaSessions(GraphSessions):
    """The open sessions of a bundle's graphs on a CUDA device.

    Args:
        bundle, threads, graphs, encoder: as `GraphSessions`. The threads compute shapes on the CPU; the default is 1.
        device: with the CPU the same code runs without a GPU and without CUDA graphs.
        options: options of the device.

    Attributes:
        options: the options in effect. `cuda_graphs` becomes False when a capture fails.
        captures: whether the decoder's session captures CUDA graphs.

    Raises:
        DeviceError: the device lacks a kernel for a node, or has too little memory.
        UsageError, BundleError: as `GraphSessions`.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: ExecutionDevice,
        *,
        threads: int | None,
        graphs: Sequence[GraphName],
        encoder: Any = None,
        options: CudaOptions,
    ) -> None:
        self.options, self.captures, self._notes = options, False, list[str]()
        super().__init__(bundle, device, threads=threads, graphs=graphs, encoder=encoder)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about fewer threads than requested, and about CUDA graphs that are off."""
        return (*super().warnings, *self._notes)

    def described_out_of_memory(self, graph: GraphName, shape: Sequence[int]) -> AbstractContextManager[None]:
        """See `cuda_memory_errors.described_out_of_memory`."""
        return described_out_of_memory(self.device, self.options.memory_bytes, graph, shape)

    def disable_graphs(self, error: Exception) -> None:
        """Reopen the decoder without CUDA graphs: a failed capture leaves its session's stream in capture mode."""
        self._note_no_graphs(error)
        self.options = replace(self.options, cuda_graphs=False)
        self.reopen("decoder")

    def release_graph(self, number: int) -> None:
        """Release a captured graph. ONNX Runtime before 1.31 keeps it, a few KB, until its session is closed."""
        release = getattr(self.find("decoder"), "release_captured_graph", None)
        if release is not None and self.captures:
            release(number)

    def call_error(self, name: GraphName, rows: int, tokens: int, error: Exception) -> Exception:
        """As `GraphSessions`. Out-of-memory failures are left to `described_out_of_memory`."""
        return error if is_out_of_memory(error) else super().call_error(name, rows, tokens, error)

    def create(self, name: GraphName, path: str, options: Any) -> Any:
        """Create a session with all nodes on the device. A decoder's session captures CUDA graphs if possible."""
        options.add_session_config_entry(*RECORD)
        if self.threads is None:
            options.intra_op_num_threads = 1
        captures = name == "decoder" and self.options.cuda_graphs and self.device.kind != "cpu"
        with self.described_out_of_memory(name, ()):
            try:
                session = self._create(path, options, captures=captures)
            except failures() as error:
                if not captures or _REFUSED_CAPTURE not in str(error):
                    raise
                self._note_no_graphs(error)
                captures = False
                session = self._create(path, options, captures=False)
        require_placement(session, self.device.provider, self.manifest.graphs[name].file, str(self.device))
        if name == "decoder":
            self.captures = captures
        return session

    def provider(self, *, captures: bool = False) -> Any:
        """The execution provider and its options.

        Args:
            captures: whether the session captures CUDA graphs.
        """
        if self.device.kind == "cpu":
            return self.device.provider
        options = {
            "device_id": str(self.device.index),
            # Exact sizes, not powers of two, because device memory is scarce.
            "arena_extend_strategy": "kSameAsRequested",
            # TF32 would round float32 to a mantissa of ten bits, below the bundle's precision.
            "use_tf32": "0",
            "enable_cuda_graph": "1" if captures else "0",
        }
        if self.options.memory_bytes is not None:
            options["gpu_mem_limit"] = str(self.options.memory_bytes)
        return self.device.provider, options

    def _create(self, path: str, options: Any, *, captures: bool) -> Any:
        import onnxruntime

        # With its default fallback the Python package would retry without the device.
        return onnxruntime.InferenceSession(
            path, options, providers=[self.provider(captures=captures)], enable_fallback=0
        )

    def _note_no_graphs(self, error: Exception) -> None:
        self._notes.append(f"CUDA graphs are off: {reason(error)}")
