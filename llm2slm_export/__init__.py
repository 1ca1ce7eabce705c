"""Run a pair: an LLM that encodes the prompt, and an SLM that generates the response.

    import llm2slm_export as l2s

    pair = l2s.load("engines/tatoeba-en-fr")
    print(pair.generate(["How are you?"])[0].text)

Importing the package is cheap: each public name is imported on first use.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Since 1.29 ONNX Runtime's builds for Linux and macOS send telemetry from import on (microsoft/onnxruntime#27379). No later
# call stops the first event, so this is set before the import. To allow telemetry, set the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from llm2slm_export.errors import Llm2SlmError
    from llm2slm_export.inference.encodings.cache import EncodingCache
    from llm2slm_export.inference.encodings.encoding import Encoding
    from llm2slm_export.inference.encodings.host_encoding import HostEncoding
    from llm2slm_export.inference.orchestrator import Orchestrator, load
    from llm2slm_export.inference.outputs import Generation, Score, Step
    from llm2slm_export.inference.scheduler import Scheduler
    from llm2slm_export.inference.submission import Finished, NewToken, Submission

    __version__: str

__all__ = [
    "Encoding",
    "EncodingCache",
    "Finished",
    "Generation",
    "HostEncoding",
    "Llm2SlmError",
    "NewToken",
    "Orchestrator",
    "Scheduler",
    "Score",
    "Step",
    "Submission",
    "__version__",
    "load",
]

_HOMES = {
    "Encoding": "llm2slm_export.inference.encodings.encoding",
    "EncodingCache": "llm2slm_export.inference.encodings.cache",
    "Finished": "llm2slm_export.inference.submission",
    "Generation": "llm2slm_export.inference.outputs",
    "HostEncoding": "llm2slm_export.inference.encodings.host_encoding",
    "Llm2SlmError": "llm2slm_export.errors",
    "NewToken": "llm2slm_export.inference.submission",
    "Orchestrator": "llm2slm_export.inference.orchestrator",
    "Scheduler": "llm2slm_export.inference.scheduler",
    "Score": "llm2slm_export.inference.outputs",
    "Step": "llm2slm_export.inference.outputs",
    "Submission": "llm2slm_export.inference.submission",
    "load": "llm2slm_export.inference.orchestrator",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("llm2slm-export")
    except metadata.PackageNotFoundError:
        # A source tree that was never installed.
        return "0+source"
