"""TensorRT and TensorRT-RTX as Python modules, and the one logger that each has in a process."""

from typing import Any, get_args

from llm2slm_export.contract import TensorRtVariant

TENSORRT_VARIANTS: tuple[TensorRtVariant, ...] = get_args(TensorRtVariant)
MODULES: dict[TensorRtVariant, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
OLDEST: dict[TensorRtVariant, str] = {
    "tensorrt": "10.15",
    "tensorrt-rtx": "1.7",
}  # releases that what is built here needs
_KEPT_LINES = 32
# By module: the first logger of a process is the only one that is ever told anything, and freeing it before what it was given
# to is a segmentation fault. One for each, for good, whoever builds or runs.
_loggers: dict[str, Any] = {}


def tensorrt_logger(trt: Any) -> Any:
    """A module's ILogger, whose `lines` are the last warnings and errors: `ERROR: …`. Clear them before a call.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`, or what looks like it.
    """
    if trt.__name__ not in _loggers:

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.lines: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.WARNING:
                    self.lines = [*self.lines[1 - _KEPT_LINES :], f"{severity.name}: {message}"]

        _loggers[trt.__name__] = Logger()
    return _loggers[trt.__name__]
