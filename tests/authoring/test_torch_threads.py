"""How many threads torch computes on: what was asked for, what was set, what a run had before, or what is free."""

from collections.abc import Callable

import pytest
import torch

from llm2slm_export.authoring import torch_threads
from llm2slm_export.authoring.torch_threads import choose_threads
from llm2slm_export.environment import cores
from llm2slm_export.errors import UsageError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """machine(8, free=3) → 8 cores of which 3 are free, and nothing in the environment that says how many to use."""

    def make(count: int, *, free: int) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        monkeypatch.setattr(cores, "available_cores", lambda: count)
        monkeypatch.setattr(torch_threads, "available_cores", lambda: count)
        monkeypatch.setattr(torch_threads, "free_cores", lambda: free)

    return make


def test_what_is_free_is_used(machine: Callable[..., None]) -> None:
    machine(8, free=3)
    choice = choose_threads()
    assert choice.count == 3
    assert "3 threads: 3 of 8 cores are free" in choice.reason


def test_what_is_asked_for_is_used_up_to_the_cores(machine: Callable[..., None]) -> None:
    machine(8, free=1)
    assert choose_threads(6).count == 6
    assert choose_threads(6, before=2).count == 6
    more = choose_threads(100)
    assert more.count == 8
    assert "100 threads were asked for and 8 are used" in more.reason
    for none in (0, -1):
        with pytest.raises(UsageError, match=f"threads is {none}"):
            choose_threads(none)


def test_a_run_that_goes_on_keeps_its_threads(machine: Callable[..., None]) -> None:
    machine(8, free=1)
    assert choose_threads(before=5).count == 5
    fewer = choose_threads(before=16)
    assert fewer.count == 8
    assert "the run had 16" in fewer.reason


def test_processes_of_a_run_share_what_is_free(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(8, free=7)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_threads().count == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert choose_threads().count == 1


def test_the_environment_decides_before_what_is_free(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(8, free=7)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    choice = choose_threads()
    assert choice.count == torch.get_num_threads()
    assert "OMP_NUM_THREADS" in choice.reason


def test_the_number_of_before_is_back_afterwards() -> None:
    before = torch.get_num_threads()
    with torch_threads.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with torch_threads.torch_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
