"""How many cores a process may use, how many are free, and what becomes of more threads than that."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm2slm_export import load
from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.environment import cores
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.runtime.selection import open_backend
from tests.support.paths import REPOSITORY


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """machine(8, **{"path below /sys/fs/cgroup": text}, own=...) → a machine of 8 cores with these control groups."""

    def make(count: int, own: str = "0::/\n", stat: str = "", **files: str) -> None:
        monkeypatch.setattr(cores, "_allowed", lambda: set(range(count)))
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "own").write_text(own)
        monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(cores, "_OWN_CGROUPS", tmp_path / "own")
        (tmp_path / "stat").write_text(stat)
        monkeypatch.setattr(cores, "_STAT", tmp_path / "stat")

    return make


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),  # half a core more is worth a thread
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/the/hosts/path\n", {"cpu.max": "100000 100000\n"}, 1),
        ("4:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "200000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 2),
        ("1:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("3:cpuset:/\nnonsense\n", {"cpu.max": "100000 100000\n"}, 8),
    ],
)  # fmt: skip
def test_the_quota_of_a_control_group_counts(
    machine: Callable[..., None], own: str, files: dict[str, str], expected: int
) -> None:
    machine(8, own, **files)
    assert cores.available_cores() == expected


def test_affinity_counts() -> None:
    """In a process that is allowed on one core alone."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from llm2slm_export.environment import cores; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(cores.available_cores())"], cwd=REPOSITORY, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("idle", "expected"),
    [
        ([100, 100, 100, 100], 4),
        ([100, 100, 5, 0], 2),
        ([0, 0, 0, 0], 1),
        ([80, 90, 85, 95], 4),  # a little of each
        ([60, 60, 60, 60], 2),
        ([0, 0, 100, 100, 100, 100], 2),  # two of these six are not ours
    ],
)
def test_a_core_that_is_busy_is_not_free(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, idle: list[int], expected: int
) -> None:
    machine(4)

    def stat(ticks: list[int]) -> str:
        return (
            "cpu  1 2 3 4\n"
            + "".join(f"cpu{n} {100 - t} 0 0 {t} 0 0 0 0 0 0\n" for n, t in enumerate(ticks))
            + "btime 1"
        )

    texts = iter([stat([0] * len(idle)).replace("100 ", "0 "), stat(idle)])
    monkeypatch.setattr(cores, "_text", lambda path: next(texts) if path == cores._STAT else "")
    assert cores.free_cores(0) == expected


def test_a_busy_process_takes_a_core() -> None:
    """The real thing: as many processes that compute as there are cores leave one thread."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores.available_cores())]
    try:
        assert cores.free_cores(1.0) <= max(1, cores.available_cores() // 2)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_where_nothing_is_told_of_load_all_cores_are_free(machine: Callable[..., None]) -> None:
    machine(6)
    assert cores.free_cores(0) == 6


def test_threads_beyond_the_cores_are_not_used_and_it_is_said(machine: Callable[..., None]) -> None:
    machine(4)
    assert cores.usable_threads(3) == 3
    assert cores.thread_notes(4) == cores.thread_notes(None) == ()
    assert cores.usable_threads(1000) == 4
    assert cores.thread_notes(1000) == ("1000 threads were asked for and 4 are used: this process has 4 cores.",)


def test_without_a_number_a_quota_decides_where_there_is_one(machine: Callable[..., None]) -> None:
    machine(64)
    assert cores.usable_threads(None) is None
    machine(64, **{"cpu.max": "200000 100000\n"})
    assert cores.usable_threads(None) == 2


@pytest.mark.parametrize("threads", [0, -1, -(10**9)])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "auto"])
def test_no_threads_are_refused(bundles: Callable[..., tuple[Path, Path]], runtime: str, threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads is {threads}") as caught:
        open_backend(open_bundle(bundles("t5")[1]), runtime=runtime, threads=threads)
    assert "at least 1" in str(caught.value)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_pair_says_that_fewer_threads_are_used(bundles: Callable[..., tuple[Path, Path]], runtime: str) -> None:
    message = f"100000 threads were asked for and {cores.available_cores()} are used"
    with load(bundles("t5")[1], threads=100_000, runtime=runtime) as pair, load(bundles("t5")[1]) as plain:
        assert [note for note in pair.warnings if note.startswith(message)]
        (answer,) = pair.generate(["a b"], max_new_tokens=4)
        assert [note for note in answer.warnings if note.startswith(message)]
        assert plain.warnings == ()
        assert answer.token_ids == plain.generate(["a b"], max_new_tokens=4)[0].token_ids


def test_a_head_says_it_too(bundles: Callable[..., tuple[Path, Path]]) -> None:
    bundle: Any = open_bundle(bundles("t5")[1])
    backend = open_backend(bundle, threads=100_000)
    assert backend.head(bundle).warnings == backend.warnings != ()
