"""`serve` as a process: its start, SIGTERM, and what it refuses before a bundle is loaded."""

import json
import re
import signal
import subprocess
import sys
import threading
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
        (["engines/demo", "demo=engines/demo", "--port", "0"], "Two models are named 'demo'"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    result = CliRunner().invoke(app, ["serve", *arguments], prog_name="llm2slm-export")
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "→" in result.output


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["serve", str(tmp_path)], prog_name="llm2slm-export")
    assert "pip install 'llm2slm-export[serve]'" in result.output
