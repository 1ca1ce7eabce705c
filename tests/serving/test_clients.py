"""Clients that nobody here wrote, unmodified, at a server process with the demo and an API key.

OpenAI's client for Python is in [test]. The others are not: tests/support/foreign_clients.py says how they are installed and found,
and a test is skipped, with that reason, where its client is absent.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.foreign_clients import interpreter, node_modules, run_client, tool
from tests.support.gated_toy import PATIENCE
from tests.support.served_demo import ServedDemo, served_demo

KEY, PROMPT, TEXT = "a key", "My father made me a delicious lunch.", "Mon père m'a confectionné un déjeuner délicieux."
SUPPORT = Path(__file__).parents[1] / "support"
USAGE = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDemo]:
    keys = tmp_path_factory.mktemp("serve") / "keys"
    keys.write_text(f"another\n{KEY}\n", encoding="utf-8")
    with served_demo("--api-key-file", str(keys), "--max-waiting", "256") as server:
        yield server
        assert server.process.poll() is None
        assert not [line for line in server.log if "Traceback" in line]


@pytest.fixture(autouse=True)
def nothing_failed(server: ServedDemo) -> Iterator[None]:
    """No client makes the server fail, and none leaves a request behind."""
    yield
    metrics = httpx.get(server.url + "/metrics").text
    assert not re.findall(r'^llm2slm_http_errors_total\{status="5\d\d"\} [1-9].*', metrics, re.MULTILINE)
    assert re.findall(r'^llm2slm_num_requests_\w+\{bundle="demo"\} (.*)', metrics, re.MULTILINE) == ["0.0", "0.0"]
    assert 'llm2slm_requests_finished_total{bundle="demo",outcome="failed"} 0.0' in metrics


@pytest.mark.slow
def test_openais_client_for_python(server: ServedDemo) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").object == "model"
        whole = client.completions.create(model="demo", prompt=PROMPT, logprobs=0)
        assert (whole.choices[0].text, whole.usage and whole.usage.to_dict()) == (TEXT, USAGE)
        stream = client.completions.create(
            model="demo", prompt=PROMPT, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == TEXT
        assert (chunks[-1].usage and chunks[-1].usage.to_dict()) == USAGE
        assert client.chat.completions.create(**CHAT).choices[0].message.content == TEXT
        with client.chat.completions.stream(**CHAT) as events:
            assert "".join(event.delta for event in events if event.type == "content.delta") == TEXT
            assert events.get_final_completion().choices[0].message.content == TEXT
        raw = client.chat.completions.with_raw_response.create(**CHAT)
        assert (raw.status_code, raw.headers["content-type"]) == (200, "application/json")
        body = {"model": "demo", "prompt": PROMPT, "responses": [TEXT]}
        score = client.post("/score", body=body, cast_to=httpx.Response)
        assert score.json()["data"][0]["is_greedy"] is True
        for error, call in (
            (openai.NotFoundError, lambda: client.completions.create(model="none", prompt=PROMPT)),
            (openai.BadRequestError, lambda: client.completions.create(model="demo", prompt=PROMPT, best_of=2)),
            (openai.AuthenticationError, lambda: client.with_options(api_key="wrong").models.list()),
        ):
            with pytest.raises(error):
                call()


@pytest.mark.nightly
def test_openais_client_for_node(server: ServedDemo) -> None:
    modules = node_modules("openai")
    command = [tool("node"), str(SUPPORT / "openai_client.cjs"), server.url, KEY, "demo", PROMPT]
    found = json.loads(run_client(command, env={"NODE_PATH": str(modules)}))
    assert (found["models"], found["model"]) == (["demo"], "demo")
    texts = ("completion", "tokens", "completionStream", "chatStream", "chatGathered")
    assert {name: found[name] for name in texts} == dict.fromkeys(texts, TEXT)
    assert found["chat"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert found["usage"] == found["completionUsage"] == USAGE
    assert (found["indices"], found["reasons"], found["afterStop"]) == ([0, 1, 2, 3], ["stop"], 2)
    assert [item["is_greedy"] for item in found["score"]["data"]] == [True, False]
    assert found["noModel"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"}
    assert found["badField"] == {"name": "BadRequestError", "status": 400, "code": None, "param": "best_of"}
    assert found["noKey"] == {"name": "AuthenticationError", "status": 401, "code": "invalid_api_key", "param": None}


@pytest.mark.nightly
def test_litellm(server: ServedDemo) -> None:
    command = [interpreter("litellm"), str(SUPPORT / "litellm_client.py"), server.url, KEY, PROMPT]
    # Without the second it fetches a list of prices.
    found = json.loads(run_client(command, env={"LITELLM_LOCAL_MODEL_COST_MAP": "True"}).splitlines()[-1])
    assert found == {
        **dict.fromkeys(["chat", "chat_stream", "chat_built", "asynchronous", "completion", "completion_stream"], TEXT),
        "usage": 18, "no_model": "NotFoundError", "no_key": "AuthenticationError", "bad_field": "BadRequestError",
    }  # fmt: skip


@pytest.mark.nightly
def test_llm(server: ServedDemo, tmp_path: Path) -> None:
    llm = tool("llm")
    models = [
        {"model_id": name, "model_name": "demo", "api_base": f"{server.url}/v1", "api_key_name": "demo", **more}
        for name, more in (("served-chat", {}), ("served-completion", {"completion": True}))
    ]
    # JSON is YAML.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models), encoding="utf-8")
    (tmp_path / "keys.json").write_text(json.dumps({"demo": KEY}), encoding="utf-8")
    for model in models:
        for more in ([], ["--no-stream"], ["-o", "temperature", "0", "-o", "max_tokens", "64", "-o", "seed", "3"]):
            command = [llm, "-m", str(model["model_id"]), *more, PROMPT]
            assert run_client(command, env={"LLM_USER_PATH": str(tmp_path)}).strip() == TEXT


@pytest.mark.nightly
def test_hey(server: ServedDemo) -> None:
    for body in ({"model": "demo", "prompt": PROMPT}, {**CHAT, "stream": True}):
        route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        command = [
            tool("hey"), "-n", "400", "-c", "16", "-t", str(PATIENCE), "-m", "POST", "-T", "application/json",
            "-H", f"Authorization: Bearer {KEY}", "-d", json.dumps(body), server.url + route,
        ]  # fmt: skip
        printed = run_client(command)
        assert re.findall(r"\[(\d+)\]\s+(\d+) responses", printed) == [("200", "400")], printed
        assert "Error distribution" not in printed


@pytest.mark.nightly
def test_locust(server: ServedDemo) -> None:
    command = [
        tool("locust"), "-f", str(SUPPORT / "locustfile.py"), "--headless", "--users", "16", "--spawn-rate", "16",
        "--run-time", "15s", "--host", server.url, "--json", "--loglevel", "ERROR",
    ]  # fmt: skip
    printed = run_client(command, env={"KEY": KEY, "PROMPT": PROMPT, "TEXT": TEXT})
    found = {item["name"]: (item["num_requests"] > 0, item["num_failures"]) for item in json.loads(printed)}
    assert found == {"/v1/completions": (True, 0), "/v1/chat/completions": (True, 0)}


@pytest.mark.nightly
def test_schemathesis(server: ServedDemo, tmp_path: Path) -> None:
    """All checks but one: that each body of the right types is accepted. It may have fields that exclude each other."""
    command = [
        tool("schemathesis"), "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--max-examples", "300",
        "--checks", "all", "--exclude-checks", "positive_data_acceptance", "--request-timeout", str(PATIENCE), "--no-color",
        "--seed", "1",
    ]  # fmt: skip
    env = {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(SUPPORT)}
    printed = run_client(command, env=env, cwd=tmp_path)
    assert re.search(r"(\d{4}) generated, \1 passed", printed), printed


@pytest.mark.nightly
def test_promtool(server: ServedDemo) -> None:
    httpx.post(
        server.url + "/v1/completions",
        json={"model": "demo", "prompt": PROMPT},
        headers={"Authorization": f"Bearer {KEY}"},
    )
    metrics = httpx.get(server.url + "/metrics").text
    assert "llm2slm_time_to_first_token_seconds_bucket" in metrics
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=metrics, text=True, capture_output=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
