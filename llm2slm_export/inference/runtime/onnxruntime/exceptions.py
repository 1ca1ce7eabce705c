"""The exceptions that ONNX Runtime raises."""

_FAILURES = (
    "EPFail",
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoModel",
    "NoSuchFile",
    "NotImplemented",
    "RuntimeException",
)


def failures() -> tuple[type[Exception], ...]:
    """The exceptions that ONNX Runtime raises when it cannot load or run a graph."""
    from onnxruntime.capi import onnxruntime_pybind11_state

    # A message may quote a name of the graph that is not UTF-8: the conversion to a Python exception fails then.
    return (*(getattr(onnxruntime_pybind11_state, failure) for failure in _FAILURES), UnicodeDecodeError)


def run_failures() -> tuple[type[Exception], ...]:
    """The exceptions of `failures`, of calls with an IOBinding, and of exhausted memory."""
    return (*failures(), RuntimeError, MemoryError)
