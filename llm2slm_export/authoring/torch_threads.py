"""Number of torch threads: as requested, or the number of idle cores.

The threads of one operator wait for each other. On a core that another process uses, one thread delays all others: two
threads on two busy cores took eleven times as long as one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from llm2slm_export.environment.cores import available_cores, free_cores, thread_notes, usable_threads

_SETTING = "OMP_NUM_THREADS"
_PROCESSES = "LOCAL_WORLD_SIZE"  # set by torchrun and accelerate: number of processes on this machine


@dataclass(frozen=True)
class ThreadChoice:
    """The number of threads, and the reason as a sentence for the user."""

    count: int
    reason: str


def choose_threads(asked: int | None = None, *, before: int | None = None) -> ThreadChoice:
    """Choose the number of torch threads.

    Args:
        asked: the requested number; None: by the idle cores.
        before: the number that a resumed run used.

    Raises:
        UsageError: the requested number is less than one.
    """
    used = usable_threads(asked)
    if asked is not None and used is not None:
        return ThreadChoice(
            used, " ".join([f"torch computes on {_threads(used)}, as asked for.", *thread_notes(asked)])
        )
    if before is not None:
        count = min(before, available_cores())
        fewer = f": the run had {before}, and this process has fewer cores" if count < before else ", as before"
        return ThreadChoice(count, f"torch computes on {_threads(count)}{fewer}.")
    if os.environ.get(_SETTING):
        count = torch.get_num_threads()
        return ThreadChoice(count, f"torch computes on {_threads(count)}, as {_SETTING} says.")
    processes = max(1, int(os.environ.get(_PROCESSES, "1")))
    cores, free = available_cores(), free_cores()
    count = max(1, free // processes)
    shared = f", for {processes} processes" if processes > 1 else ""
    return ThreadChoice(
        count,
        f"torch computes on {_threads(count)}: {free} of {cores} cores are free{shared} ({_SETTING} sets another number).",
    )


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run the block with `count` torch threads; None: unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")
