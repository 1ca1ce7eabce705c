"""The processor, and its measured limits: memory bandwidth and matrix-product throughput."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class MachineLimits:
    """Measured limits.

    Args:
        bandwidth: memory bandwidth of a matrix-vector product, in bytes/s.
        flops: throughput of a float32 matrix product, in operations/s.
        seconds: duration of the measurement.
    """

    bandwidth: float
    flops: float
    seconds: float


def probe(megabytes: int = 256, width: int = 768) -> MachineLimits:
    """Measure this machine in well under a second: the best of three matrix-vector and matrix-matrix products.

    Args:
        megabytes: size of the streamed matrix. It must exceed the last-level cache, as a model's weights do: with 128, a
            server with a shared 480 MB cache reported 41 to 47 GB/s instead of its memory's 32.
        width: size of the square matrices.
    """
    started = time.perf_counter()
    rows = megabytes * 2**20 // (4 * 4096)
    streamed, vector = np.ones((rows, 4096), np.float32), np.ones(4096, np.float32)
    square = np.ones((width, width), np.float32)
    bandwidth = streamed.nbytes / _best(lambda: streamed @ vector)
    flops = 2 * width**3 / _best(lambda: square @ square)
    return MachineLimits(bandwidth, flops, time.perf_counter() - started)


def cache_directory() -> Path:
    """The directory of cached measurements: `$XDG_CACHE_HOME/llm2slm-export`, by default in `~/.cache`.

    For a user without a home directory, as in containers, it is one that cannot be made, like a home that cannot be written.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if not given:
        try:
            given = str(Path.home() / ".cache")
        except RuntimeError:
            given = os.devnull
    return Path(given) / "llm2slm-export"


def processor() -> str:
    """The processor's name; empty if unknown."""
    return _first_core().get("model name") or platform.processor()


def instruction_sets() -> frozenset[str]:
    """The processor's instruction sets by their Linux names; empty on other systems."""
    fields = _first_core()
    return frozenset(fields.get("flags", fields.get("Features", "")).split())


def _first_core() -> dict[str, str]:
    """The fields of the first core in /proc/cpuinfo; empty on systems without it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(4):  # the first run includes page faults and thread creation
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
