"""A job that is killed or stopped and resumed is one run, byte for byte; and a job on Ray is a local one."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import llm2slm_export
from tests.support.gated_toy import PATIENCE
from tests.support.held_out import prompts
from tests.support.paths import DEMO
from tests.support.processes import descendants

SAMPLING = ("--do-sample", "--temperature", "1.5", "--seed", "7", "--num-return-sequences", "2")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "llm2slm_export", *map(str, arguments)]


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def rows_of(directory: Path) -> list[dict[str, Any]]:
    content = b"".join(path.read_bytes() for path in sorted(directory.glob("part-*")))
    return [json.loads(line) for line in content.splitlines()]


def parts_of(directory: Path) -> int:
    return len(list(directory.glob("part-*.jsonl")))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """120 prompts, some of which cannot be run."""
    rows = [json.dumps({"id": f"é{index}", "prompt": text}) for index, text in enumerate(prompts()[:120])]
    rows[5], rows[77], rows[119] = "{", json.dumps({"id": 1}), json.dumps({"prompt": "word " * 500})
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def wait_for(process: "subprocess.Popen[str]", directory: Path, parts: int) -> None:
    """Wait until a directory has this many parts, or the process has ended."""
    deadline = time.monotonic() + 4 * PATIENCE
    while parts_of(directory) < parts and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), SAMPLING], ids=["greedy", "sampled"])
def test_killed_jobs_resume_to_the_same_bytes(tmp_path: Path, file: Path, options: tuple[str, ...]) -> None:
    arguments = ("batch", DEMO, file)
    settings = ("--part-rows", 10, *options)
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    subprocess.run(command(*arguments, whole, *settings), check=True, timeout=4 * PATIENCE)
    assert parts_of(whole) == 12
    kills = 0
    while True:
        done = parts_of(killed)
        with subprocess.Popen(command(*arguments, killed, *settings), text=True) as process:
            wait_for(process, killed, done + rng.randrange(3))
            time.sleep(rng.random() * 0.2)
            process.kill()
            kills += process.wait() != 0
        leftovers = [path.name for path in killed.glob("part-*")] if killed.exists() else []
        assert {name: (killed / name).read_bytes() for name in leftovers}.items() <= content_of(whole).items()
        if parts_of(killed) == 12:
            break
    assert kills >= 4
    subprocess.run(command(*arguments, killed, *settings), check=True, timeout=4 * PATIENCE)
    assert content_of(killed) == content_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_job_with_the_command_that_resumes_it(
    tmp_path: Path, file: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "o u t"
    words = command(
        "batch", DEMO, file, out, "--part-rows", 10, "--no-do-sample", "--stop", "a b", "--stop", "'", "--json"
    )
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(process, out, 3)
        process.send_signal(number)
        output, messages = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert output == ""
    assert "Traceback" not in messages
    done = parts_of(out)
    assert 3 <= done < 12
    assert f"stopped by {number.name}: {10 * done} of 120 rows are answered." in messages
    program, *again = shlex.split(messages.splitlines()[-1].removeprefix("Next: "))
    assert program == "llm2slm-export"
    assert sorted(command(*again)) == sorted(words)
    result = subprocess.run(command(*again), capture_output=True, text=True, check=True, timeout=4 * PATIENCE)
    assert json.loads(result.stdout)["new_rows"] == 120 - 10 * done
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_the_responses_are_those_of_generate(tmp_path: Path) -> None:
    texts = prompts()[:60]
    file, out = tmp_path / "in.txt", tmp_path / "out"
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    # One prompt per batch: at int8 a batch can change a token.
    subprocess.run(
        command("batch", DEMO, file, out, "--batch-size", 1, "--part-rows", 25), check=True, timeout=4 * PATIENCE
    )
    rows = rows_of(out)
    with llm2slm_export.load(DEMO) as pair:
        expected = pair.generate(texts, batch_size=1)
    assert [(row["text"], row["new_tokens"], row["prompt_tokens"]) for row in rows] == [
        (generation.text, generation.new_tokens, generation.prompt_tokens) for generation in expected
    ]


@pytest.mark.slow
def test_another_head_answers(tmp_path: Path, llm_head_bundle: tuple[Path, Path, Path]) -> None:
    _, _, bundle = llm_head_bundle
    texts = [f"prompt {number}" for number in range(30)]
    file = tmp_path / "in.txt"
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    found = {}
    with llm2slm_export.load(bundle) as pair:
        for head in pair.heads:
            out = tmp_path / head
            words = command("batch", bundle, file, out, "--head", head, "--part-rows", 7, "--batch-size", 4)
            subprocess.run(words, check=True, timeout=4 * PATIENCE)
            found[head] = [row["text"] for row in rows_of(out)]
            assert found[head] == [generation.text for generation in pair.head(head).generate(texts, batch_size=1)]
    assert found["main"] != found["llm"]


# --- Ray -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ray_environment() -> dict[str, str]:
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    # Ray's workers are nice by default, and would wait for every other test.
    return {**os.environ, "RAY_worker_niceness": "0"}


@pytest.mark.nightly
def test_a_job_on_ray_is_a_local_one_and_loses_nothing_when_a_worker_is_killed(
    tmp_path: Path, file: Path, ray_environment: dict[str, str]
) -> None:
    settings = ("--part-rows", 5, "--threads", 1)
    local, on_ray = tmp_path / "local", tmp_path / "ray"
    subprocess.run(command("batch", DEMO, file, local, *settings), check=True, timeout=4 * PATIENCE)
    words = command("batch", DEMO, file, on_ray, *settings, "--ray", "local", "--json")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ray_environment) as process:
        wait_for(process, on_ray, 4)
        workers = [pid for pid, line in descendants(process.pid) if "MapWorker" in line]
        assert len(workers) == 1
        os.kill(workers[0], signal.SIGKILL)
        output, _ = process.communicate(timeout=10 * PATIENCE)
    assert process.returncode == 0
    assert json.loads(output)["new_rows"] == 120
    assert content_of(on_ray) == content_of(local)


@pytest.mark.nightly
def test_a_job_on_ray_stops_at_a_signal_and_a_local_run_resumes_it(
    tmp_path: Path, file: Path, ray_environment: dict[str, str]
) -> None:
    settings = ("--part-rows", 5, "--threads", 1, *SAMPLING)
    local, stopped = tmp_path / "local", tmp_path / "stopped"
    subprocess.run(command("batch", DEMO, file, local, *settings), check=True, timeout=4 * PATIENCE)
    words = command("batch", DEMO, file, stopped, *settings, "--ray", "local")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ray_environment) as process:
        wait_for(process, stopped, 3)
        started = [pid for pid, _ in descendants(process.pid)]
        process.send_signal(signal.SIGTERM)
        _, messages = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 143
    assert "Traceback" not in messages
    assert "stopped by SIGTERM" in messages
    deadline = time.monotonic() + PATIENCE
    while any((Path("/proc") / str(pid)).exists() for pid in started):
        assert time.monotonic() < deadline, "Ray's processes end with the job"
        time.sleep(0.1)
    assert 3 <= parts_of(stopped) < 24
    subprocess.run(command("batch", DEMO, file, stopped, *settings), check=True, timeout=4 * PATIENCE)
    assert content_of(stopped) == content_of(local)


@pytest.mark.nightly
def test_what_ray_cannot_do_is_an_error_with_a_remedy(
    tmp_path: Path, file: Path, ray_environment: dict[str, str]
) -> None:
    words = command("batch", DEMO, file, tmp_path / "out", "--ray")
    for arguments, message in (
        (["127.0.0.1:1"], "There is no Ray cluster at '127.0.0.1:1'."),
        (["local", "--workers", "5000"], "5000 workers of 1 threads need 5000 cores"),
    ):
        result = subprocess.run(
            [*words, *arguments], capture_output=True, text=True, env=ray_environment, timeout=4 * PATIENCE
        )
        assert result.returncode in (1, 2)
        assert message in result.stderr
        assert "Traceback" not in result.stderr
