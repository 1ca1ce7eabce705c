"""What this machine is, and can do at most: the bandwidth of its memory and the speed of its matrix products, measured."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class MachineLimits:
    """What the probe measured: bytes/s of matrix-vector products, float operations/s of matrix products."""

    bandwidth: float
    flops: float
    seconds: float


def probe(megabytes: int = 256, width: int = 768) -> MachineLimits:
    """Measure this machine for well under a second: the best of three matrix-vector and matrix-matrix products.

    Args:
        megabytes: of the matrix that is streamed; beyond what a last-level cache keeps of it, as a model's weights are. Of 128
            a server's cache of 480 MB, of which others had most, gave 41 to 47 GB/s where the memory gives 32.
    """
    started = time.perf_counter()
    rows = megabytes * 2**20 // (4 * 4096)
    streamed, vector = np.ones((rows, 4096), np.float32), np.ones(4096, np.float32)
    square = np.ones((width, width), np.float32)
    bandwidth = streamed.nbytes / _best(lambda: streamed @ vector)
    flops = 2 * width**3 / _best(lambda: square @ square)
    return MachineLimits(bandwidth, flops, time.perf_counter() - started)


def cache_directory() -> Path:
    """Where this package keeps what it has measured here: `$XDG_CACHE_HOME/llm2slm-export`, `~/.cache` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm2slm-export"


def processor() -> str:
    """The processor's name, where the system tells it."""
    return _first_core().get("model name") or platform.processor()


def instruction_sets() -> frozenset[str]:
    """The processor's, by Linux's names for them; none are known on other systems."""
    fields = _first_core()
    return frozenset(fields.get("flags", fields.get("Features", "")).split())


def _first_core() -> dict[str, str]:
    """What /proc/cpuinfo says of the first core; nothing on systems without it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(4):  # the first one pays for page faults and thread start, and is never the best
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
