"""A pair that is loaded before a fork: the child gets an error or an answer, closes it or not, and ends."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llm2slm_export import load
from llm2slm_export.bundle.bundle import open_bundle
from llm2slm_export.contract import GRAPHS
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.runtime import forks
from llm2slm_export.inference.runtime.forks import ForkSafeLock
from llm2slm_export.inference.runtime.onnxruntime.cuda_backend import CudaBackend
from llm2slm_export.inference.runtime.openvino import OpenVinoGraph
from tests.support.paths import REPOSITORY

# What a child does with what it inherited: each line of output is one child's.
CHILDREN = """
import os, sys
import llm2slm_export as l2s

runtime, threads, work, end = sys.argv[1], int(sys.argv[2]) or None, sys.argv[3], sys.argv[4]
pair = l2s.load("engines/demo", threads=threads, runtime=runtime)
print("parent:", pair.generate(["How are you?"])[0].text, flush=True)
begun = pair.stream("How are you?")
next(begun)
child = os.fork()
if child == 0:
    try:
        if work == "generate":
            print("child:", pair.generate(["How are you?"])[0].text, flush=True)
        elif work == "stream":
            print("child:", "".join(step.text for step in begun), flush=True)
        elif work == "head":
            pair.head("other")
        elif work == "close":
            pair.close()
        elif work == "forget":
            del pair, begun
        elif work == "load":
            with l2s.load("engines/demo", threads=threads, runtime=runtime) as own:
                print("child:", own.generate(["How are you?"])[0].text, flush=True)
    except l2s.Llm2SlmError as error:
        print("child:", type(error).__name__, str(error), flush=True)
    os._exit(0) if end == "_exit" else sys.exit(0)
print("status:", os.waitpid(child, 0)[1], flush=True)
print("parent:", pair.generate(["How are you?"])[0].text, flush=True)
pair.close()
"""


def forked(runtime: str, threads: int, work: str, end: str = "exit") -> str:
    """What parent and child say; a child that hangs is a failure."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", CHILDREN, runtime, str(threads), work, end],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(("parent:", "status:"))] == [
        "parent: Comment vas-tu ?", "status: 0", "parent: Comment vas-tu ?",
    ]  # fmt: skip
    return "\n".join(line for line in lines if not line.startswith(("parent:", "status:")))


slow = pytest.mark.slow


@pytest.mark.skipif(os.cpu_count() == 1, reason="several threads need several cores")
@pytest.mark.parametrize(
    ("runtime", "threads", "work"),
    [
        ("onnxruntime", 2, "generate"),
        pytest.param("onnxruntime", 2, "stream", marks=slow),
        pytest.param("onnxruntime", 0, "generate", marks=slow),
        pytest.param("openvino", 2, "generate", marks=slow),
        pytest.param("openvino", 1, "generate", marks=slow),
    ],
)
def test_a_child_that_uses_what_its_parent_loaded_gets_an_error(runtime: str, threads: int, work: str) -> None:
    output = forked(runtime, threads, work)
    assert output.startswith("child: UsageError This pair was loaded before the process was forked")
    assert "load the bundle after the fork" in output
    assert ("or with threads=1" in output) == (runtime == "onnxruntime")


@pytest.mark.parametrize("work", ["generate", pytest.param("stream", marks=slow)])
def test_a_child_can_use_a_pair_of_one_thread(work: str) -> None:
    output = forked("onnxruntime", 1, work)
    assert output.startswith("child: ")
    assert output.endswith("vas-tu ?"), "a stream goes on where it was"


@pytest.mark.parametrize(
    ("runtime", "threads", "work"),
    [
        ("onnxruntime", 2, "nothing"),
        ("onnxruntime", 2, "close"),
        ("openvino", 2, "nothing"),
        pytest.param("onnxruntime", 2, "forget", marks=slow),
        *(pytest.param("onnxruntime", 1, work, marks=slow) for work in ("nothing", "close", "forget")),
        *(pytest.param("openvino", 2, work, marks=slow) for work in ("close", "forget")),
    ],
)
def test_a_child_that_closes_or_outlives_a_pair_ends(runtime: str, threads: int, work: str) -> None:
    assert forked(runtime, threads, work) == ""


@pytest.mark.slow
def test_a_child_that_leaves_without_cleaning_up_ends() -> None:
    assert forked("onnxruntime", 2, "close", "_exit") == ""


@pytest.mark.slow
def test_a_child_can_load_a_pair_of_its_own() -> None:
    assert forked("onnxruntime", 2, "load") == "child: Comment vas-tu ?"


@pytest.fixture
def in_a_child(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, this process takes itself for a child."""
    pid = os.getpid()
    return lambda: monkeypatch.setattr(forks.os, "getpid", lambda: pid + 1)


def test_what_is_closed_in_a_child_is_still_there(
    bundles: Callable[..., tuple[Path, Path]], in_a_child: Callable[[], None]
) -> None:
    bundle = open_bundle(bundles("t5")[1])
    backend = CudaBackend(bundle, device="cpu", threads=2)
    sessions = [backend.sessions.find(name) for name in GRAPHS]
    in_a_child()
    backend.close()
    assert None not in sessions
    assert [backend.sessions.find(name) for name in GRAPHS] == sessions


def test_an_openvino_graph_is_refused_in_a_child(
    bundles: Callable[..., tuple[Path, Path]], in_a_child: Callable[[], None]
) -> None:
    graph = OpenVinoGraph(open_bundle(bundles("t5")[1]), "encoder", threads=1)
    in_a_child()
    with pytest.raises(UsageError, match="forked"):
        graph({})


def test_a_pair_says_so_before_it_waits_for_anything(
    bundles: Callable[..., tuple[Path, Path]], in_a_child: Callable[[], None]
) -> None:
    with load(bundles("t5")[1]) as pair:
        encoding = pair.encode(["a b"])
        in_a_child()
        for use in (lambda: pair.generate(["a b"]), lambda: pair.generate_from(encoding), lambda: pair.encode(["a b"])):
            with pytest.raises(UsageError, match="loaded before the process was forked"):
                use()


def test_a_lock_that_another_thread_holds_is_free_in_the_child() -> None:
    lock = ForkSafeLock()
    lock.__enter__()
    forks._keep_what_was_inherited()  # what a fork calls in the child
    entered = threading.Event()

    def enter() -> None:
        with lock:
            entered.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    assert entered.wait(10)
    thread.join()
