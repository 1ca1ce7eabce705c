"""Notes on stderr about what runs a bundle: the threads in use, and the runtimes that `auto` chose."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm2slm_export.inference.orchestrator import Orchestrator


def print_thread_notes(threads: int | None) -> int | None:
    """The number of threads in use for the number asked for, with a note on stderr if it is smaller."""
    from llm2slm_export.environment.cores import thread_notes, usable_threads

    for note in thread_notes(threads):
        print(note, file=sys.stderr)
    return None if threads is None else usable_threads(threads)


def print_measured_runtimes(directory: Path, pair: "Orchestrator", runtime: str, threads: int | None) -> None:
    """Print the runtimes that `auto` chose, with their times, on stderr."""
    if "auto" not in runtime:
        return
    from llm2slm_export.bundle.bundle import Bundle
    from llm2slm_export.inference.runtime.selection import measure

    for entry in measure(Bundle(directory, pair.manifest), runtime, graphs=list(pair.runtimes), threads=threads):
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in entry.ms.items())
        cached = (
            f"cached in {entry.cache_file}" if entry.cache_file else "not cached: the cache directory cannot be written"
        )
        print(f"{entry.graph}: {entry.fastest} ({times}; {cached})", file=sys.stderr)
