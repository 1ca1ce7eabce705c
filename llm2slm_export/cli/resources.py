"""The disk and the memory that a command has used."""

import sys
from pathlib import Path


def directory_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def peak_memory_mb() -> int:
    """The most memory this process has held. Linux counts in KiB, macOS in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)
