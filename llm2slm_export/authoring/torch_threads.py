"""How many threads torch computes on: as many as were asked for, or as many as there are cores that nobody uses.

Threads of one operator wait for each other. Where another process keeps a core busy, all wait for the one that is on it: two
threads on two busy cores took eleven times as long as one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from llm2slm_export.environment.cores import available_cores, free_cores, thread_notes, usable_threads

_SETTING = "OMP_NUM_THREADS"
_PROCESSES = "LOCAL_WORLD_SIZE"  # of torchrun and accelerate: how many processes of the run are on this machine


@dataclass(frozen=True)
class ThreadChoice:
    """How many threads, and why, as a sentence for who started it."""

    count: int
    reason: str


def choose_threads(asked: int | None = None, *, before: int | None = None) -> ThreadChoice:
    """How many threads to compute on.

    Args:
        asked: None leaves it to what is found here.
        before: how many a run that goes on computed with.

    Raises:
        UsageError: fewer than one were asked for.
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
    """torch computes on so many threads meanwhile; on as many as before where no number is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")
