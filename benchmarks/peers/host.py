"""What else the machine is doing, where the system tells it (Linux), and how that is said above a table."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from llm2slm_export.environment.hardware import processor


def busy(seconds: float = 1.0) -> float | None:
    """The share of the processors' time that was used while this process slept."""
    before = _times()
    time.sleep(seconds)
    after = _times()
    if before is None or after is None:
        return None
    idle, total = after[0] - before[0], after[1] - before[1]
    return 1 - idle / total if total else None


def free_gib() -> float | None:
    """Memory that can be had without swapping."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")), None)


def conditions(title: str, settings: str, bandwidth: Sequence[float], used: Sequence[float]) -> list[str]:
    """The head of a table, in Markdown.

    Args:
        bandwidth, used: bytes/s of the memory, and what `busy` said, before each round.
    """
    rates = [rate / 1e9 for rate in bandwidth]
    lines = [
        f"### {title}",
        "",
        f"{processor()}, {settings}, {datetime.now(UTC).date()}; memory {median(rates):.0f} GB/s "
        f"({min(rates):.0f}-{max(rates):.0f} over the rounds).",
        "",
    ]
    if max(used) > 0.1:
        lines += [f"**Something else ran: up to {max(used):.0%} of the processors before a round.**", ""]
    return lines


def _times() -> tuple[int, int] | None:
    """Idle and all ticks since the start."""
    path = Path("/proc/stat")
    if not path.is_file():
        return None
    ticks = [int(field) for field in path.read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
