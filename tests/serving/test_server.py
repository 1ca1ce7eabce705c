"""The HTTP server, by clients that others wrote, over a pair whose responses are known."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llm2slm_export.bundle.manifest import GenerationDefaults
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.serving.app import AppOptions
from llm2slm_export.serving.gate import read_api_keys
from llm2slm_export.serving.http_protocol import HttpProtocol
from llm2slm_export.serving.server import listen
from tests.support.gated_toy import PATIENCE, Gated
from tests.support.http_server import RunningServer, http_server
from tests.support.toy_pair import make_pair, toy_of
from tests.support.waiting import until

SCRIPTS = {letter: letter + "bcdefghijklmnopqrstuvwxyz" for letter in "abcdefgh"}


@pytest.fixture
def pair(tmp_path: Path) -> Orchestrator:
    return make_pair(tmp_path, SCRIPTS, toy=Gated)


@pytest.fixture
def toy(pair: Orchestrator) -> Gated:
    found = toy_of(pair)
    assert isinstance(found, Gated)
    return found


@pytest.fixture
def server(pair: Orchestrator) -> Iterator[RunningServer]:
    with http_server({"toy": pair}, max_waiting=4) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def post(server: RunningServer, body: Any, route: str = "/v1/completions", **more: Any) -> httpx.Response:
    return httpx.post(server.url + route, json=body, timeout=PATIENCE, **more)


def test_models_are_listed(client: openai.OpenAI, server: RunningServer) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "llm2slm-export"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"
    assert httpx.get(server.url + "/version").json()["version"]


def test_a_completion_has_text_usage_and_times(client: openai.OpenAI) -> None:
    found = client.completions.create(model="toy", prompt="a", max_tokens=5, logprobs=0)
    Completion.model_validate(found.model_dump(), strict=True)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, choice.index) == ("abcde", "length", 0)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (2, 5, 7)
    assert choice.logprobs is not None
    assert (choice.logprobs.tokens, choice.logprobs.text_offset) == (list("abcde"), [0, 1, 2, 3, 4])
    assert choice.logprobs.token_logprobs is not None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs)
    extra = choice.model_extra
    assert extra is not None
    assert extra["timings_ms"].keys() >= {"queue", "tokenize", "encode", "project", "prefill", "decode", "total"}


def test_several_prompts_and_responses_have_their_index(client: openai.OpenAI) -> None:
    found = client.completions.create(model="toy", prompt=["a", "b", "c"], max_tokens=2)
    assert [(choice.index, choice.text) for choice in found.choices] == [(0, "ab"), (1, "bb"), (2, "cb")]
    options: dict[str, Any] = {
        "model": "toy",
        "prompt": ["a", "b"],
        "max_tokens": 3,
        "n": 2,
        "temperature": 0.9,
        "seed": 4,
    }
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_chat_is_streamed_as_openais(client: openai.OpenAI, logprobs: bool) -> None:
    message: Any = {"role": "user", "content": [{"type": "text", "text": "c"}]}
    options: Any = {"model": "toy", "messages": [message], "max_completion_tokens": 4, "logprobs": logprobs}
    whole = client.chat.completions.create(**options)
    ChatCompletion.model_validate(whole.model_dump(), strict=True)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("cbcd", "length")
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "cbcd"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]
    *others, last = chunks
    assert all(chunk.usage is None for chunk in others)
    assert (last.choices, last.usage) == ([], whole.usage)
    if logprobs:
        assert whole.choices[0].logprobs is not None
        streamed = [t for chunk in chunks for c in chunk.choices for t in (c.logprobs and c.logprobs.content) or []]
        assert [t.token for t in streamed] == list("cbcd")
        assert [t.logprob for t in streamed] == [t.logprob for t in whole.choices[0].logprobs.content or []]
    final = others[-1].choices[0].model_extra
    assert final is not None
    assert final["timings_ms"]["total"] > 0


def test_options_are_transformers_and_openais(server: RunningServer, pair: Orchestrator) -> None:
    def text(**options: Any) -> str:
        return post(server, {"model": "toy", "prompt": "a", "max_tokens": 6, **options}).json()["choices"][0]["text"]

    assert text(stop="d") == "abc"
    assert text(stop=["x", "cd"]) == "ab"
    assert text(temperature=0, top_p=0.5, seed=3) == "abcdef"
    assert text(num_beams=2) == pair.generate(["a"], max_new_tokens=6, num_beams=2)[0].text
    (sampled,) = pair.generate(["a"], max_new_tokens=6, do_sample=True, temperature=3.0, top_k=5, seed=7)
    assert text(temperature=3.0, top_k=5, seed=7) == sampled.text
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "best_of": 1,
        "echo": False,
        "suffix": None,
    }
    assert text(**neutral, user="somebody") == "abcdef"


WRONG: dict[str, tuple[dict[str, Any], str | None, list[str]]] = {
    "no model": ({"prompt": "a"}, "model", ["model: required"]),
    "unknown": (
        {"temprature": 1, "max_tokens": "5"}, "max_tokens",
        ["temprature: unknown field; did you mean temperature?", "max_tokens: Input should be a valid integer"],
    ),
    "unsupported": ({"presence_penalty": 1, "best_of": 2}, None, ["presence_penalty: not supported", "best_of: not supported"]),
    "top logprobs": ({"logprobs": 5}, "logprobs", ["logprobs: Input should be 0"]),
    "echo": ({"echo": True}, "echo", ["echo: not supported"]),
    "ids": ({"prompt": [1, 2]}, "prompt", ["prompt"]),
    "no prompts": ({"prompt": []}, "prompt", ["prompt: has no prompts"]),
    "too many prompts": ({"prompt": ["a"] * 5}, "prompt", ["5 prompts", "at most 4"]),
    "empty": ({"prompt": ""}, "prompt", ["Some prompts are empty"]),
    "long": ({"prompt": "a" * 30}, "prompt", ["31 tokens, at most 12"]),
    "second": ({"prompt": ["a", "b" * 30]}, "prompt", ["Prompt 1 of 2"]),
    "option": ({"max_tokens": 0}, "max_tokens", ["max_tokens: must be a whole number, at least 1"]),
    "several": ({"n": 2}, "n", ["n: 2 is above num_beams, 1"]),
    "rows": ({"n": 100, "temperature": 1.0}, "num_beams", ["100 rows"]),
    "stream of beams": ({"num_beams": 3, "stream": True}, "stream", ["stream: not with num_beams, 3"]),
    "logprobs of beams": ({"num_beams": 3, "logprobs": 0}, "logprobs", ["logprobs: not with num_beams, 3"]),
    "greedy samples": ({"temperature": 0, "do_sample": True}, "temperature", ["must be above 0 to sample"]),
    "transformers' name": ({"max_new_tokens": 3}, "max_new_tokens", ["did you mean max_tokens?"]),
    "long name": ({"a" * 300: 1}, "a" * 300, ["a" * 79 + "…: unknown field"]),
    "many names": ({f"name {number}": 1 for number in range(50)}, "name 0", ["and 40 more"]),
    "usage": ({"stream_options": {"include_usage": True}}, "stream_options", ["has no effect without stream"]),
    "timeout": ({"timeout": 0}, "timeout", ["timeout"]),
    "drafting": ({"drafter": "ngram"}, "drafter", ["drafter: unknown field"]),
}  # fmt: skip


@pytest.mark.parametrize(("body", "param", "facts"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_answered_is_refused_by_name(
    server: RunningServer, body: dict[str, Any], param: str | None, facts: list[str]
) -> None:
    body = {"model": "toy", "prompt": "a", **body}
    if "model" in facts[0]:
        del body["model"]
    found = post(server, body)
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    for fact in facts:
        assert fact in error["message"]
    assert server.schedulers["toy"].stats.running == 0


@pytest.mark.parametrize(
    "messages",
    [
        [], [{"role": "system", "content": "x"}], [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    ],
)  # fmt: skip
def test_a_chat_is_one_text_of_the_user(server: RunningServer, messages: list[Any]) -> None:
    found = post(server, {"model": "toy", "messages": messages}, "/v1/chat/completions")
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "messages"


def test_bodies_that_are_none(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (b"", b"{", b'{"model": "\xff"}', b"[]", b"null", b"NaN", b'{"model": "toy", "prompt": "\\ud800"}'):
        found = httpx.post(server.url + "/v1/completions", content=body, headers=headers)
        assert found.status_code == 400, body
        error = found.json()["error"]
        assert error["param"] in ((None, "prompt") if b"ud800" in body else (None,))
        assert "JSON" in error["message"] or b"ud800" in body
    assert httpx.get(server.url + "/v1/completions").status_code == 405
    assert httpx.get(server.url + "/nothing").json()["error"]["message"].startswith("Not Found")


def test_a_body_is_bounded_before_it_is_read(pair: Orchestrator) -> None:
    with http_server({"toy": pair}, options=AppOptions(max_body_bytes=1000, body_timeout=0.2)) as server:
        large = {"model": "toy", "prompt": "a" * 2000}
        assert post(server, large).status_code == 413
        content = json.dumps(large).encode()
        chunked = httpx.post(server.url + "/v1/completions", content=iter([content[:600], content[600:]]))
        assert chunked.json()["error"]["code"] == "body_too_large"
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as half_open:
            half_open.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            assert b"408" in half_open.recv(100)
        assert post(server, {"model": "toy", "prompt": "a", "max_tokens": 1}).status_code == 200


def test_headers_are_bounded_in_time_and_size(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, client: openai.OpenAI
) -> None:
    monkeypatch.setattr(HttpProtocol, "seconds", 0.3)
    host, port = server.url.removeprefix("http://").split(":")

    def answer(*sent: bytes) -> bytes:
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            for part in sent:
                connection.sendall(part)
                time.sleep(0.02)
            found = b""
            try:
                while part := connection.recv(65_536):
                    found += part
            except ConnectionResetError:
                pass
            return found

    start = b"GET /live HTTP/1.1\r\nHost: x\r\n"
    assert answer() == b""
    assert b" 408 " in answer(start)
    assert b"headers_timeout" in answer(b"GET ")
    # A second request on the same connection.
    first, _, second = answer(start + b"\r\n", start).partition(b" 200 ")
    assert first == b"HTTP/1.1"
    assert b"headers_timeout" in second
    many = [b"X-Filler: " + b"a" * 20_000 + b"\r\n"] * 4
    assert b" 431 " in answer(start, *many)
    refused = answer(b"NO HTTP\r\n\r\n")
    assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    # The time of a response is not the time of headers.
    assert client.models.list().data
    time.sleep(0.4)
    assert client.models.list().data


def test_a_key_guards_the_routes_of_models(pair: Orchestrator, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# keys\n\nfirst key\n second\n", encoding="utf-8")
    keys = read_api_keys(tmp_path / "keys")
    assert keys == ("first key", "second")
    with http_server({"toy": pair}, options=AppOptions(api_keys=keys)) as server:
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "second"},
            {"Authorization": "Basic second"},
        ):
            found = post(server, {"model": "toy", "prompt": "a"}, headers=header)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="second").models.list().data
        for route in ("/health", "/live", "/metrics", "/version", "/", "/openapi.json"):
            assert httpx.get(server.url + route).status_code == 200
    (tmp_path / "keys").write_text("# none\n", encoding="utf-8")
    for path in (tmp_path / "keys", tmp_path / "missing"):
        with pytest.raises(UsageError):
            read_api_keys(path)


def test_other_machines_need_a_key_and_a_used_port_is_named() -> None:
    with pytest.raises(UsageError, match="there are no API keys"):
        listen("0.0.0.0", 0, has_keys=False)
    listen("0.0.0.0", 0, has_keys=True).close()
    with pytest.raises(UsageError, match="has no address"):
        listen("no.such.host.invalid", 0, has_keys=True)
    with listen("127.0.0.1", 0, has_keys=False) as found:
        assert found.proto == socket.IPPROTO_TCP  # asyncio sets TCP_NODELAY for no other
    with listen("127.0.0.1", 0, has_keys=False) as used, pytest.raises(UsageError, match="Address already in use"):
        listen("127.0.0.1", used.getsockname()[1], has_keys=False)


def test_a_full_queue_is_429_at_once(server: RunningServer, toy: Gated) -> None:
    toy.gate.clear()
    body = {"model": "toy", "prompt": "a", "n": 16, "temperature": 1.0}
    threads = [threading.Thread(target=post, args=(server, body)) for _ in range(5)]
    for thread in threads:
        thread.start()
    until(lambda: server.schedulers["toy"].stats.waiting == 4)
    found = post(server, body)  # the others still wait
    assert (found.status_code, found.headers["Retry-After"], found.json()["error"]["code"]) == (429, "1", "queue_full")
    assert server.schedulers["toy"].stats.waiting == 4
    toy.gate.set()
    for thread in threads:
        thread.join(PATIENCE)


@pytest.mark.parametrize("stream", [False, True])
def test_the_row_of_a_client_that_is_gone_leaves(server: RunningServer, toy: Gated, stream: bool) -> None:
    toy.gate.clear()
    body = {"model": "toy", "prompt": "a", "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json=body, timeout=0.3)
    other: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: other.append(post(server, {"model": "toy", "prompt": "b", "max_tokens": 26}))
    )
    thread.start()
    until(lambda: not server.state.active or server.state.active == 1)
    scheduler = server.schedulers["toy"]
    until(lambda: scheduler.stats.submitted == 2)
    toy.gate.set()
    thread.join(PATIENCE)
    until(lambda: scheduler.stats.outcomes.get("cancelled") == 1)
    assert other[0].json()["choices"][0]["text"] == SCRIPTS["b"]
    until(lambda: server.state.active == 0)


def test_a_late_request_is_504(server: RunningServer, toy: Gated) -> None:
    def open_late() -> None:
        toy.reached.wait(PATIENCE)
        time.sleep(0.1)
        toy.gate.set()

    for stream in (False, True):
        toy.gate.clear()
        toy.reached.clear()
        opening = threading.Thread(target=open_late)
        opening.start()
        found = post(server, {"model": "toy", "prompt": "a", "timeout": 0.05, "stream": stream})
        toy.reached.set()  # a request that ended in the queue has reached nothing
        opening.join()
        if stream:
            events = [line.removeprefix("data: ") for line in found.text.splitlines() if line]
            assert json.loads(events[-1])["error"]["code"] == "deadline_exceeded"
        else:
            assert (found.status_code, found.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_draining_lets_running_requests_finish(pair: Orchestrator, toy: Gated) -> None:
    with http_server({"toy": pair}, drain=PATIENCE) as server:
        toy.gate.clear()
        running: list[str] = []

        def read() -> None:
            with httpx.stream(
                "POST",
                server.url + "/v1/completions",
                json={"model": "toy", "prompt": "a", "stream": True, "max_tokens": 26},
                timeout=PATIENCE,
            ) as response:
                running.extend(response.iter_lines())

        thread = threading.Thread(target=read)
        thread.start()
        assert toy.reached.wait(PATIENCE)
        server.terminate()
        assert httpx.get(server.url + "/health").status_code == 503
        assert httpx.get(server.url + "/live").status_code == 200
        refused = post(server, {"model": "toy", "prompt": "b"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        toy.gate.set()
        thread.join(PATIENCE)
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
    events = [json.loads(line.removeprefix("data: ")) for line in running if line and "[DONE]" not in line]
    assert "".join(event["choices"][0]["text"] for event in events) == SCRIPTS["a"]
    assert running[-2] == "data: [DONE]"


def test_responses_are_scored(server: RunningServer, pair: Orchestrator) -> None:
    body = {"model": "toy", "prompt": "a", "responses": ["abc", "xyz"], "add_eos": False}
    found = post(server, body, "/v1/score").json()
    expected = pair.score(pair.encode(["a"]), ["abc", "xyz"], add_eos=False)
    assert [(item["logprob"], item["is_greedy"]) for item in found["data"]] == [
        (s.logprob, s.is_greedy) for s in expected
    ]
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    refused = post(server, {**body, "responses": [""], "prompt": "a" * 30}, "/v1/score")
    assert refused.status_code == 400


def test_metrics_add_up(server: RunningServer) -> None:
    for prompt in ("a", "b"):
        post(server, {"model": "toy", "prompt": prompt, "max_tokens": 3})
    post(server, {"model": "none", "prompt": "a"})
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    finished = {name: value for name, value in values.items() if name.startswith("llm2slm_requests_finished_total")}
    assert sum(finished.values()) == values['llm2slm_requests_submitted_total{bundle="toy"}'] == 2
    assert values['llm2slm_generation_tokens_total{bundle="toy"}'] == 6
    assert values['llm2slm_prompt_tokens_total{bundle="toy"}'] == 4
    assert values['llm2slm_inter_token_latency_seconds_count{model="toy"}'] == 4
    assert values['llm2slm_e2e_request_latency_seconds_count{model="toy"}'] == 2
    assert values['llm2slm_http_errors_total{status="404"}'] == 1


def test_prompts_are_logged_only_if_asked(pair: Orchestrator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    for log_prompts in (False, True):
        caplog.clear()
        with http_server({"toy": pair}, options=AppOptions(log_prompts=log_prompts)) as server:
            post(server, {"model": "toy", "prompt": "dddd", "max_tokens": 7, "user": "somebody"})
            post(server, {"model": "toy", "prompt": "dddd", "max_tokens": "7"})
        assert ("dddd" in caplog.text, SCRIPTS["d"][:7] in caplog.text) == (log_prompts, log_prompts)
        assert "user='somebody'" in caplog.text


def test_a_bundles_defaults_are_those_of_its_requests(tmp_path: Path) -> None:
    def defaults(name: str, **options: Any) -> Orchestrator:
        (tmp_path / name).mkdir()
        return make_pair(tmp_path / name, SCRIPTS, generation=GenerationDefaults(max_new_tokens=6, **options))

    pairs = {"beams": defaults("beams", num_beams=3), "two": defaults("two", do_sample=True, num_return_sequences=2)}
    with http_server(pairs) as server:
        for body in ({"stream": True}, {"logprobs": 0}):
            refused = post(server, {"model": "beams", "prompt": "a", **body})
            assert refused.status_code == 400
            assert "not with num_beams, 3; set num_beams to 1" in refused.json()["error"]["message"]
            assert post(server, {"model": "beams", "prompt": "a", "num_beams": 1, **body}).status_code == 200
        body = {"model": "two", "prompt": ["a", "b"], "seed": 4}
        whole = [choice["text"] for choice in post(server, body).json()["choices"]]
        assert [choice["text"] for choice in post(server, body).json()["choices"]] == whole
        streamed = dict.fromkeys(range(4), "")
        for line in post(server, {**body, "stream": True}).text.splitlines():
            if line and "[DONE]" not in line:
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    streamed[choice["index"]] += choice["text"]
        assert list(streamed.values()) == whole
        assert len(set(whole)) > 2


def test_a_scheduler_that_has_ended_makes_the_server_unhealthy(server: RunningServer) -> None:
    assert httpx.head(server.url + "/health").status_code == 200
    server.schedulers["toy"].close()
    assert httpx.get(server.url + "/health").status_code == 503
    for route, more in (("/v1/completions", {}), ("/v1/score", {"responses": ["a"]})):
        found = post(server, {"model": "toy", "prompt": "a", **more}, route)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "closed")


def test_an_unexpected_error_has_the_shape_of_all(
    server: RunningServer, pair: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "score_batches", lambda *_, **__: 1 / 0)
    found = post(server, {"model": "toy", "prompt": "a", "responses": ["a"]}, "/v1/score")
    assert (found.status_code, found.json()["error"]["type"]) == (500, "server_error")
    assert 'llm2slm_http_errors_total{status="500"} 1.0' in httpx.get(server.url + "/metrics").text


def test_pages_of_an_origin_may_ask_first_and_read_refusals(pair: Orchestrator) -> None:
    options = AppOptions(api_keys=["key"], cors_origins=["http://page.example"])
    with http_server({"toy": pair}, options=options) as server:
        headers = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
        asked = httpx.options(server.url + "/v1/completions", headers=headers)
        assert asked.status_code == 200
        refused = post(server, {}, headers={"Origin": "http://page.example"})
        assert refused.status_code == 401
        for found in (asked, refused):
            assert found.headers["access-control-allow-origin"] == "http://page.example"
    with http_server({"toy": pair}) as server:
        assert "access-control-allow-origin" not in post(server, {}, headers={"Origin": "http://page.example"}).headers


def test_what_is_left_after_draining_ends_with_an_error(pair: Orchestrator, toy: Gated) -> None:
    with http_server({"toy": pair}, drain=0.2) as server:
        toy.gate.clear()
        found: list[httpx.Response] = []
        body = {"model": "toy", "prompt": "a"}
        threads = [
            threading.Thread(target=lambda stream=stream: found.append(post(server, {**body, "stream": stream})))
            for stream in (False, True)
        ]
        for thread in threads:
            thread.start()
        until(lambda: server.schedulers["toy"].stats.submitted == 2)
        server.terminate()
        until(lambda: not server.state.requests or all(request.is_cancelled for request in server.state.requests))
        toy.gate.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert len(found) == 2
    for response in found:
        assert '"code":"cancelled"' in response.text


def test_the_description_has_what_is_sent(server: RunningServer) -> None:
    description = httpx.get(server.url + "/openapi.json").json()
    paths = description["paths"]
    responses = paths["/v1/completions"]["post"]["responses"]
    assert "422" not in responses
    assert {"400", "401", "404", "413", "429", "503", "504"} <= responses.keys()
    for route, chunk in (("/v1/completions", "Completion"), ("/v1/chat/completions", "ChatChunk")):
        stream = paths[route]["post"]["responses"]["200"]["content"]["text/event-stream"]
        assert f"#/components/schemas/{chunk}" in json.dumps(stream["itemSchema"])
    # What the description refers to is in it.
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(description)))
    assert named == named & description["components"]["schemas"].keys()
    # Both have an empty body.
    assert "content" not in paths["/health"]["get"]["responses"]["200"] | paths["/live"]["get"]["responses"]["200"]


def test_the_description_names_the_key(server: RunningServer, pair: Orchestrator) -> None:
    def guarded(url: str) -> set[str]:
        found = httpx.get(url + "/openapi.json").json()
        schemes = found["components"].get("securitySchemes", {})
        routes = {path: operation for path, of in found["paths"].items() for operation in of.values()}
        assert all(
            name in schemes for operation in routes.values() for one in operation.get("security", []) for name in one
        )
        return {path for path, operation in routes.items() if operation.get("security")}

    assert guarded(server.url) == set()
    with http_server({"toy": pair}, options=AppOptions(api_keys=["key"])) as other:
        assert guarded(other.url) == {
            "/v1/models",
            "/v1/models/{name}",
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/encodings",
            "/v1/score",
        }
