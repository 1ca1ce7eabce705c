"""The command line with the tests' shared traces, in processes of its own: forks of one that has imported what a build imports.

`python -m tests.support.cached_command DIRECTORY` forks for each line of its input, a JSON array of arguments. It writes the process's
id when it starts, and its exit code once it has ended: -9 if it was killed.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

# What a build imports only when it is needed: half of its time on a tiny pair.
_IMPORTED_LATE = (
    "llm2slm_export.authoring.build", "onnxruntime", "transformers.models.t5.modeling_t5", "torch._dynamo", "torch.onnx",
)  # fmt: skip


class Command:
    """One run of the command line."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self.pid = int(answers.readline())

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code."""
        return int(self._answers.readline())


class Commands:
    """Runs the command line, one run at a time."""

    def __init__(self, server: "subprocess.Popen[str]") -> None:
        self._server = server

    def start(self, arguments: Sequence[str]) -> Command:
        """Start a run."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(arguments), file=self._server.stdin, flush=True)
        return Command(self._server.stdout)


@contextmanager
def commands(traces: Path) -> Iterator[Commands]:
    """Processes that share `traces`."""
    command = [sys.executable, "-m", "tests.support.cached_command", str(traces)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield Commands(server)
        assert server.stdin is not None
        server.stdin.close()


def _serve(traces: Path) -> None:
    from llm2slm_export.authoring.exporters.onnx import export
    from llm2slm_export.cli.app import app
    from tests.support.export_cache import cached

    for module in _IMPORTED_LATE:
        importlib.import_module(module)
    export.trace = cached(export.trace, traces)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDWR), sys.stdout.fileno())
            sys.stdin.close()
            app(json.loads(line), prog_name="llm2slm-export")
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
