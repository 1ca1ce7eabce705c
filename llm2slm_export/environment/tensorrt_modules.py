"""The Python modules of TensorRT and TensorRT-RTX, and the logger of each."""

from typing import Any, get_args

from llm2slm_export.contract import TensorRtVariant

TENSORRT_VARIANTS: tuple[TensorRtVariant, ...] = get_args(TensorRtVariant)
MODULES: dict[TensorRtVariant, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
OLDEST: dict[TensorRtVariant, str] = {
    "tensorrt": "10.15",
    "tensorrt-rtx": "1.7",
}  # the oldest supported releases
_MAX_LINES = 32
# One logger per module for the life of the process: TensorRT only uses the first one it is given, and freeing it before the
# objects that use it is a segmentation fault.
_loggers: dict[str, Any] = {}


def tensorrt_logger(trt: Any) -> Any:
    """The ILogger of a module. Its `lines` are the last warnings and errors, `ERROR: …`; clear them before a call.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`, or a test double.
    """
    if trt.__name__ not in _loggers:

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.lines: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.WARNING:
                    self.lines = [*self.lines[1 - _MAX_LINES :], f"{severity.name}: {message}"]

        _loggers[trt.__name__] = Logger()
    return _loggers[trt.__name__]
