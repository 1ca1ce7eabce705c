"""A peer in a process of its own, stopped except when it is asked."""

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host import free_gib
from preparation import reason

PATIENCE = 600  # seconds: longer than any peer loads or writes
LEAST_FREE = 3.0  # GiB: with less, a worker is loaded anew for each of its turns, and kept no longer


class WorkerError(Exception):
    """A worker that has gone or says nothing; the message is the reason, one line."""


@dataclass(frozen=True)
class Written:
    """One response.

    Args:
        ms: when each token was known, since the call began.
    """

    ms: tuple[float, ...]
    ids: tuple[int, ...]

    def per_token(self, first: int, last: int) -> float:
        """ms per token from the end of token `first` to the end of token `last`, counted from 1."""
        return (self.ms[last - 1] - self.ms[first - 1]) / (last - first)


class Worker:
    """A worker's process, or none while it is not kept. `versions`: of the packages that decode, once it has loaded.

    Args:
        command: its command line.
        log: where what its libraries print goes.
    """

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
        self._command, self._log, self._variables = command, log, variables
        self._process: subprocess.Popen[bytes] | None = None
        self._keep = True
        self.versions: dict[str, str] = {}

    def _start(self) -> None:
        with self._log.open("w", encoding="utf-8") as errors:
            # A session of its own: threads and children are stopped with it.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=dict(self._variables),
                start_new_session=True,
            )  # fmt: skip
        self.versions = self._answer()["versions"]

    def load(self) -> None:
        """Load it. Between its turns it stays loaded, stopped, where that leaves memory for others.

        Raises:
            WorkerError: it does not load.
        """
        with self.running():
            free = free_gib()
            self._keep = free is None or free > LEAST_FREE

    @contextmanager
    def running(self) -> Iterator[None]:
        """It runs; before and after it does not.

        Raises:
            WorkerError: it does not load.
        """
        try:
            if self._process is None:
                self._start()
            self._signal(signal.SIGCONT)
            yield
        finally:
            if self._keep:
                self._signal(signal.SIGSTOP)
            else:
                self.close()

    def write(self, new: int) -> Written:
        """Have exactly `new` tokens written.

        Raises:
            WorkerError: it fails, or writes another number.
        """
        said = self.ask({"new": new})
        if len(said["ids"]) != new:
            raise WorkerError(f"wrote {len(said['ids'])} of {new} tokens")
        return Written(tuple(said["ms"]), tuple(said["ids"]))

    def ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer to a request.

        Raises:
            WorkerError: it fails.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(reason(self._log)) from None
        return self._answer()

    def close(self) -> None:
        """End it, stopped or not. Closing twice is harmless."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], PATIENCE)[0]:
            raise WorkerError(f"said nothing for {PATIENCE} s")
        line = stdout.readline()
        if not line:
            self._process.wait()
            raise WorkerError(reason(self._log))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)
