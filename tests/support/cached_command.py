"""The command line with the tests' shared traces, for a process of its own: `python -m tests.support.cached_command DIRECTORY build …`."""

import sys
from pathlib import Path

from llm2slm_export.authoring.exporters.onnx import export
from llm2slm_export.cli.app import app
from tests.support.export_cache import cached

if __name__ == "__main__":
    export.trace = cached(export.trace, Path(sys.argv.pop(1)))
    app(prog_name="llm2slm-export")
