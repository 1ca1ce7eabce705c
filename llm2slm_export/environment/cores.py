"""The processor's cores: those that this process may use, and those that nobody uses now."""

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
    """How many cores this process may keep busy: those it is allowed on, or fewer where its control group has a quota."""
    return min(_allowed_cores(), _quota() or _allowed_cores())


def free_cores(seconds: float = _WATCHED_SECONDS) -> int:
    """How many of these cores nobody keeps busy, at least one: watched for `seconds`.

    On systems that do not tell how busy a core is, all that are available.
    """
    before = _times()
    time.sleep(seconds if before else 0)
    after = _times()
    idle = sum(_idle_share(before[core], after[core]) for core in before.keys() & after.keys() & _allowed())
    return max(1, min(available_cores(), round(idle))) if before else available_cores()


def usable_threads(threads: int | None) -> int | None:
    """As many threads as were asked for, or one per core where there are fewer cores: more take turns, and wait for another.

    Args:
        threads: None leaves the choice to the runtime. It knows no quota: where there is one, its threads.

    Raises:
        UsageError: fewer than one.
    """
    if threads is None:
        quota = _quota()
        return quota if quota is not None and quota < _allowed_cores() else None
    if threads < 1:
        raise UsageError(f"threads is {threads}.", remedy="give at least 1, or nothing for the runtime's choice")
    return min(threads, available_cores())


def thread_notes(threads: int | None) -> tuple[str, ...]:
    """What to tell who asked for so many threads: that there are not as many cores, or nothing."""
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
    """Cores that the control groups of this process grant it together, rounded up; None: no limit is known."""
    limits = [limit for limit in _limits() if limit is not None]
    return max(1, math.ceil(min(limits))) if limits else None


def _limits() -> Iterator[float | None]:
    """The limit of every control group that this process is in, up to the root of what it sees."""
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
        # In a container the path is often the host's, and the group itself is what is mounted at the root.
        yield from (read(path) for path in (group, *group.parents) if path.is_relative_to(root))


def _limit_v2(group: Path) -> float | None:
    quota, _, period = _text(group / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _limit_v1(group: Path) -> float | None:
    quota, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _times() -> dict[int, tuple[int, int]]:
    """Of each core the ticks that it was idle, and all; nothing where the system does not tell."""
    found = {}
    for line in _text(_STAT).splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and len(ticks) >= 5:
            numbers = [int(tick) for tick in ticks[:8]]  # guests' time is in the first ones already
            found[int(name[3:])] = numbers[3] + numbers[4], sum(numbers)
    return found


def _idle_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    # A core that slept all the while may not have counted a tick.
    return (after[0] - before[0]) / (after[1] - before[1]) if after[1] > before[1] else 1.0


def _text(path: Path) -> str:
    """What a file of the kernel's says; nothing where there is none."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
