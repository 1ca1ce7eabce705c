"""`serve` as a process, with the demo's bundle."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.support.gated_toy import PATIENCE
from tests.support.paths import REPOSITORY


@dataclass
class ServedDemo:
    """A server process, its address and its log."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]


@contextmanager
def served_demo(*options: str, name: str = "demo") -> Iterator[ServedDemo]:
    """Serve engines/demo with these options, on a free port, in one thread."""
    command = [
        sys.executable, "-m", "llm2slm_export", "serve", f"{name}=engines/demo", "--port", "0", "--threads", "1", *options,
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        watchdog = threading.Timer(PATIENCE * 2, process.kill)
        watchdog.start()
        log: list[str] = []
        url = None
        for line in process.stderr:
            log.append(line)
            if found := re.match(r"serving .* at (http://127\.0\.0\.1:\d+)$", line):
                url = found[1]
                break
        watchdog.cancel()
        assert url is not None, "".join(log)
        # A full pipe would stop the server.
        reader = threading.Thread(target=lambda stream=process.stderr: log.extend(stream))
        reader.start()
        try:
            yield ServedDemo(url, process, log)
        finally:
            process.terminate()
            process.wait(PATIENCE)
            reader.join(PATIENCE)
