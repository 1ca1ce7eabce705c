"""`serve` as a process: its start, SIGTERM, and what it refuses before a bundle is loaded."""

import base64
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from llm2slm_export.cli.app import app
from tests.support.gated_toy import PATIENCE
from tests.support.paths import REPOSITORY


@pytest.mark.slow
def test_sigterm_lets_the_stream_finish_and_ends_with_0() -> None:
    command = [
        sys.executable,
        "-m",
        "llm2slm_export",
        "serve",
        "translate=engines/demo",
        "--port",
        "0",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        watchdog = threading.Timer(PATIENCE * 2, process.kill)
        watchdog.start()
        found = next(
            m for line in process.stderr if (m := re.match(r"serving translate at (http://127\.0\.0\.1:\d+)$", line))
        )
        url, body = found[1], {"model": "translate", "prompt": "My father made me a delicious lunch."}
        whole = httpx.post(url + "/v1/completions", json=body, timeout=PATIENCE).json()["choices"][0]["text"]
        assert whole == "Mon père m'a confectionné un déjeuner délicieux."
        options = {"stream": True, "min_new_tokens": 90, "max_tokens": 90}
        with httpx.stream("POST", url + "/v1/completions", json={**body, **options}, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        last = json.loads(rest[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert first
        assert process.wait(PATIENCE) == 0
        watchdog.cancel()


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "llm2slm_export", "serve", "engines/demo", "--port", "0", "--threads", "1"]
    with subprocess.Popen([*command, *arguments], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        watchdog = threading.Timer(PATIENCE * 2, process.kill)
        watchdog.start()
        lines = (re.match(r"serving demo \(\w+\) at (http://127\.0\.0\.1:\d+)$", line) for line in process.stderr)
        try:
            yield next(found for found in lines if found)[1], process
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0
            watchdog.cancel()


@pytest.mark.slow
def test_a_reader_and_a_writer_are_processes_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("of the reader\n", encoding="utf-8")
    key = str(tmp_path / "key")
    body = {"model": "demo", "prompt": "My father made me a delicious lunch."}
    expected = "Mon père m'a confectionné un déjeuner délicieux."
    with (
        served("--part", "reader", "--api-key-file", key) as (reader, reading),
        served("--part", "writer", "--reader", reader, "--reader-api-key-file", key) as (writer, _),
    ):
        url = writer + "/v1/completions"
        assert httpx.post(url, json=body, timeout=PATIENCE).json()["choices"][0]["text"] == expected
        streamed = httpx.post(url, json={**body, "stream": True}, timeout=PATIENCE).text.splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in streamed if line and "[DONE]" not in line]
        assert "".join(event["choices"][0]["text"] for event in events) == expected
        headers = {"Accept": "application/octet-stream", "Authorization": "Bearer of the reader"}
        data = httpx.post(reader + "/v1/encodings", json=body, headers=headers, timeout=PATIENCE).content
        longest = {**body, "prompt": "lunch " * 300, "truncate": True}
        assert httpx.post(url, json=longest, timeout=PATIENCE).json()["usage"]["prompt_tokens"] == 256
        raw = httpx.post(reader + "/v1/encodings", json=longest, headers=headers, timeout=PATIENCE).content
        reading.terminate()
        reading.wait(PATIENCE)
        assert httpx.post(url, json=body, timeout=PATIENCE).json()["error"]["code"] == "reader_unavailable"
        for encoding, tokens in ((data, 9), (raw, 256)):  # the longest prompt's is within the writer's limit
            found = httpx.post(
                url, json={"model": "demo", "encoding": base64.b64encode(encoding).decode()}, timeout=PATIENCE
            ).json()
            assert found["usage"]["prompt_tokens"] == tokens
            assert tokens > 9 or found["choices"][0]["text"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engines/demo", "--host", "0.0.0.0"], "there are no API keys"),
        (["a b=engines/demo"], "The model name 'a b' cannot be used."),
        (["engines/demo", "--api-key-file", "missing"], "cannot be read"),
        (["engines/none", "--port", "0"], "engines/none"),
        (
            ["engines/demo", "--cache", "engines/demo/cache"],
            "--cache engines/demo/cache lies in the bundle engines/demo.",
        ),
        (["engines/demo", "--port", "0", "--cache", "README.md"], "cannot be used"),
        (["engines/demo", "--reader", "http://127.0.0.1:1"], "--reader goes with --part writer"),
        (["engines/demo", "--part", "reader", "--reader", "http://a"], "--reader goes with --part writer"),
        (["engines/demo", "--part", "writer", "--cache-mb", "5"], "--cache-mb is for prompts that this server encodes"),
        (
            ["engines/demo", "--part", "writer", "--reader-api-key-file", "x"],
            "--reader-api-key-file goes with --reader",
        ),
        (
            ["engines/demo", "--part", "writer", "--reader", "127.0.0.1:1"],
            "The reader '127.0.0.1:1' is not an address.",
        ),
        (["engines/demo", "--part", "writer", "--reader", "http://u:secret@h"], "The reader 'h' is not an address."),
        (["engines/demo", "--part", "writer", "--reader", "http://h:99999999"], "is not an address."),
        (["engines/demo", "--part", "half"], "'half' is not one of"),
        (["engines/demo", "demo=engines/demo", "--port", "0"], "Two models are named 'demo'"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    result = CliRunner().invoke(app, ["serve", *arguments], prog_name="llm2slm-export")
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "→" in result.output or "Usage:" in result.output
    assert "secret" not in result.output


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["serve", str(tmp_path)], prog_name="llm2slm-export")
    assert "pip install 'llm2slm-export[serve]'" in result.output
