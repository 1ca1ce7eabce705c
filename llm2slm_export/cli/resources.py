"""The disk and the memory that a command has used."""

import sys
from pathlib import Path


def directory_bytes(directory: Path) -> int:
    """The size of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def peak_memory_mb() -> int:
    """The peak memory of this process. The system counts it in KiB on Linux, in bytes on macOS."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)
