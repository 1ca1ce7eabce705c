"""The devices of ONNX Runtime."""

import re
from dataclasses import dataclass

from llm2slm_export.errors import DeviceError, UsageError, require_extra
from llm2slm_export.inference.runtime.onnxruntime.cuda_libraries import require_cuda_device, require_cuda_libraries


@dataclass(frozen=True)
class ExecutionDevice:
    """The device of sessions and tensors, by ONNX Runtime's names."""

    kind: str
    index: int
    provider: str

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def find_device(device: str) -> ExecutionDevice:
    """The device with the name `cpu`, `cuda` or `cuda:n`.

    Raises:
        UsageError: the name is invalid.
        DeviceError: the machine does not have the device, or ONNX Runtime does not support it.
        MissingExtraError: ONNX Runtime is not installed.
    """
    require_extra("cpu", "onnxruntime", purpose="Running a bundle")
    if device == "cpu":
        return ExecutionDevice("cpu", 0, "CPUExecutionProvider")
    if match := re.fullmatch(r"cuda(?::(\d+))?", device):
        _require_cuda(device)
        require_cuda_libraries(device)
        require_cuda_device(device, int(match[1] or 0))
        return ExecutionDevice("cuda", int(match[1] or 0), "CUDAExecutionProvider")
    raise UsageError(
        f"There is no device {device!r}.",
        "devices: cpu, cuda, cuda:n, tensorrt, tensorrt:n",
        remedy="choose one of these, for example 'cpu'",
    )


def _require_cuda(device: str) -> None:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in providers:
        raise DeviceError(
            f"The device {device!r} needs an ONNX Runtime with CUDAExecutionProvider.",
            f"found: onnxruntime {onnxruntime.__version__} with {', '.join(providers)}",
            # Both packages install the module `onnxruntime`. If both are installed, either may be imported.
            remedy="pip uninstall -y onnxruntime, then pip install 'llm2slm-export[gpu]'",
        )
