"""CPU cores: those available to this process, and those that are idle."""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from llm2slm_export.errors import UsageError

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_STAT = Path("/proc/stat")
_WATCHED_SECONDS = 0.5


def available_cores() -> int:
    """The number of cores available to this process: its CPU affinity, limited by its control group's quota."""
    return min(_allowed_cores(), _quota() or _allowed_cores())


def free_cores(seconds: float = _WATCHED_SECONDS) -> int:
    """The number of available cores that are idle, at least 1, measured over `seconds`.

    On systems without /proc/stat it is the number of available cores.
    """
    before = _times()
    time.sleep(seconds if before else 0)
    after = _times()
    idle = sum(_idle_share(before[core], after[core]) for core in before.keys() & after.keys() & _allowed())
    return max(1, min(available_cores(), round(idle))) if before else available_cores()


def usable_threads(threads: int | None) -> int | None:
    """The requested number of threads, limited to one per available core.

    The threads of one operator wait for each other, so more threads than cores are slower.

    Args:
        threads: None leaves the choice to the runtime (returns None). Runtimes ignore a control group's quota, so with a
            quota it is the quota's cores.

    Raises:
        UsageError: `threads` is below 1.
    """
    if threads is None:
        quota = _quota()
        return quota if quota is not None and quota < _allowed_cores() else None
    if threads < 1:
        raise UsageError(f"threads is {threads}.", remedy="give at least 1, or nothing for the runtime's choice")
    return min(threads, available_cores())


def thread_notes(threads: int | None) -> tuple[str, ...]:
    """A warning if fewer threads are used than requested; otherwise nothing."""
    used = usable_threads(threads)
    if threads is None or threads == used:
        return ()
    return (f"{threads} threads were asked for and {used} are used: this process has {_cores(available_cores())}.",)


def _cores(count: int) -> str:
    return f"{count} core" + ("s" if count > 1 else "")


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _allowed_cores() -> int:
    return len(_allowed())


def _quota() -> int | None:
    """The lowest CPU quota of this process's control groups, in cores, rounded up; None: no quota."""
    limits = [limit for limit in _limits() if limit is not None]
    return max(1, math.ceil(min(limits))) if limits else None


def _limits() -> Iterator[float | None]:
    """The quota of every control group of this process and of their parents; None: unlimited."""
    for line in _text(_OWN_CGROUPS).splitlines():
        number, controllers, place = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            root, read = _CGROUPS, _limit_v2
        elif "cpu" in controllers.split(","):
            root, read = (
                next((r for r in (_CGROUPS / controllers, _CGROUPS / "cpu") if r.is_dir()), _CGROUPS),
                _limit_v1,
            )
        else:
            continue
        group = root / place.strip("/")
        # In a container the path is often the host's, and the container's own group is mounted at the root.
        yield from (read(path) for path in (group, *group.parents) if path.is_relative_to(root))


def _limit_v2(group: Path) -> float | None:
    quota, _, period = _text(group / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _limit_v1(group: Path) -> float | None:
    quota, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _times() -> dict[int, tuple[int, int]]:
    """Idle and total ticks of each core; empty without /proc/stat."""
    found = {}
    for line in _text(_STAT).splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and len(ticks) >= 5:
            numbers = [int(tick) for tick in ticks[:8]]  # the later fields, guest time, are included in user and nice
            found[int(name[3:])] = numbers[3] + numbers[4], sum(numbers)
    return found


def _idle_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    # A core that sleeps through the interval may count no tick.
    return (after[0] - before[0]) / (after[1] - before[1]) if after[1] > before[1] else 1.0


def _text(path: Path) -> str:
    """The text of a kernel file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
