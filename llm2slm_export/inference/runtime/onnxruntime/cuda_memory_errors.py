"""Errors for exhausted device memory: what was requested, what is free, and the option to lower."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llm2slm_export.contract import GraphName
from llm2slm_export.errors import DeviceError
from llm2slm_export.inference.runtime.onnxruntime.cuda_libraries import free_bytes
from llm2slm_export.inference.runtime.onnxruntime.devices import ExecutionDevice
from llm2slm_export.inference.runtime.onnxruntime.exceptions import failures

# In ONNX Runtime's messages for refused memory: two of its arena, and CUDA's own.
_MEMORY = re.compile(
    r"requested buffer of size (\d+)|smaller than requested bytes of (\d+)|CUDA failure 2|CUDNN_STATUS_ALLOC_FAILED|"
    r"CUBLAS_STATUS_ALLOC_FAILED|out of memory",
    re.IGNORECASE,
)

_REASON = re.compile(r"(Failed to allocate|Available memory of|CUDA failure|CUBLAS failure|This session cannot).*")


def memory_failures() -> tuple[type[Exception], ...]:
    """The exceptions for refused memory, of sessions and of tensors created outside one."""
    return (*failures(), RuntimeError)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception of ONNX Runtime is about refused memory."""
    return _MEMORY.search(str(error)) is not None


def reason(error: Exception) -> str:
    """ONNX Runtime's message without its source location."""
    text = " ".join(str(error).split())
    found = _REASON.search(text)
    return (found[0] if found else text.rpartition("[ONNXRuntimeError] : ")[2])[:300]


@contextmanager
def described_out_of_memory(
    device: ExecutionDevice, limit: int | None, graph: GraphName, shape: Sequence[int]
) -> Iterator[None]:
    """Raise out-of-memory failures as `DeviceError` with the requested and free bytes and the option to lower.

    Args:
        limit: the limit of each graph's session in bytes; None: unlimited.
        shape: [rows, tokens] of the call; empty while a session is created.
    """
    try:
        yield
    except memory_failures() as error:
        if not is_out_of_memory(error):
            raise
        raise _device_error(device, limit, graph, shape, error) from error


def _device_error(
    device: ExecutionDevice, limit: int | None, graph: GraphName, shape: Sequence[int], error: Exception
) -> DeviceError:
    where = f" for {' × '.join(map(str, shape))} (rows × tokens)" if shape else ", for its weights"
    free = free_bytes(device.index) if device.kind != "cpu" else None
    evidence = [
        f"requested: {_requested(error)}{where}",
        "free on the device: " + ("unknown" if free is None else f"{free[0]:,} of {free[1]:,} bytes"),
        *([] if limit is None else [f"limit of each graph: {limit:,} bytes"]),
        f"ONNX Runtime: {reason(error)}",
    ]
    lower = "use a smaller batch_size (--batch-size) or shorter prompts" if shape else "build the bundle at fp16"
    raised = "" if limit is None else ", raise memory_bytes (--gpu-memory-mb)"
    return DeviceError(
        f"{device} has too little memory for the {graph}.",
        *evidence,
        remedy=f"{lower}{raised}, or use device 'cpu'",
    )


def _requested(error: Exception) -> str:
    found = _MEMORY.search(str(error))
    sizes = [int(group) for group in found.groups() if group] if found else []
    return f"{sizes[0]:,} bytes more" if sizes else "a buffer"
