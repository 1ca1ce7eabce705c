"""Encodings over HTTP: made by one server, used by another, and refused where they are not its own or not whole."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from llm2slm_export.bundle.manifest import FileEntry
from llm2slm_export.contract import INPUT_IDS
from llm2slm_export.inference.encodings.cache import EncodingCache
from llm2slm_export.inference.encodings.safetensors_file import dump_tensors, parse_tensors
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.serving.app import AppOptions
from tests.support.gated_toy import PATIENCE, Gated
from tests.support.http_server import RunningServer, http_server
from tests.support.toy_pair import make_pair, toy_of
from tests.support.waiting import until

SCRIPTS = {letter: letter + "bcdefghijklmnopqrstuvwxyz" for letter in "abcdefgh"}


@pytest.fixture
def pair(tmp_path: Path) -> Orchestrator:
    return make_pair(tmp_path, SCRIPTS, toy=Gated)


@pytest.fixture
def server(pair: Orchestrator) -> Iterator[RunningServer]:
    with http_server({"toy": pair}, max_waiting=4) as running:
        yield running


def post(server: RunningServer, body: Any, route: str = "/v1/encodings", **more: Any) -> httpx.Response:
    return httpx.post(server.url + route, json={"model": "toy", **body}, timeout=PATIENCE, **more)


def encoded(server: RunningServer, prompt: str) -> str:
    text = post(server, {"prompt": prompt}).json()["data"][0]["encoding"]
    assert isinstance(text, str)
    return text


def test_prompts_are_encoded_together_and_their_encodings_answered_elsewhere(
    server: RunningServer, pair: Orchestrator, tmp_path: Path
) -> None:
    found = post(server, {"prompt": ["aa", "bb", "c" * 30], "truncate": True}).json()
    assert toy_of(pair).calls == ["encode", "project"] * 2
    assert [len(ids) for ids in toy_of(pair).read[0]] == [3, 3]
    assert (found["object"], found["model"]) == ("list", "toy")
    assert found["usage"] == {"prompt_tokens": 18, "completion_tokens": 0, "total_tokens": 18}
    assert [
        (item["index"], item["object"], item["prompt_tokens"], item.get("dropped_tokens")) for item in found["data"]
    ] == [(0, "encoding", 3, None), (1, "encoding", 3, None), (2, "encoding", 12, 19)]
    assert found["data"][0]["timings_ms"].keys() == {"queue", "tokenize", "encode", "project"}
    encodings = [item["encoding"] for item in found["data"]]
    (tmp_path / "file").write_bytes(base64.b64decode(encodings[1]))
    assert pair.generate_from(pair.load_encoding(tmp_path / "file"), max_new_tokens=3)[0].text == "bbc"
    (tmp_path / "elsewhere").mkdir()
    other = make_pair(tmp_path / "elsewhere", SCRIPTS)
    with http_server({"toy": other}) as elsewhere:
        client = openai.OpenAI(base_url=f"{elsewhere.url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(
            model="toy", prompt=None, max_tokens=4, extra_body={"encoding": encodings}
        )  # fmt: skip
        assert [choice.text for choice in answer.choices] == ["abcd", "bbcd", "cbcd"]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (18, 12)
        assert answer.choices[2].model_extra is not None
        assert answer.choices[2].model_extra["dropped_tokens"] == 19
        for stream in (False, True):
            body = {"encoding": encodings[0], "max_tokens": 2, "stream": stream}
            chat = post(elsewhere, body, "/v1/chat/completions").text
            assert '"content":"ab"' in chat if not stream else '"content":"a"' in chat
        score = {"responses": ["abc", "xyz"], "add_eos": False}
        scored = post(elsewhere, {"encoding": encodings[0], **score}, "/v1/score").json()
        assert scored["data"] == post(elsewhere, {"prompt": "aa", **score}, "/v1/score").json()["data"]
        assert scored["usage"]["prompt_tokens"] == 3
    assert toy_of(other).calls.count("encode") == 1  # for the score of the prompt
    assert "encode" not in toy_of(pair).calls[4:]


def test_one_prompts_encoding_can_be_bytes(server: RunningServer, pair: Orchestrator) -> None:
    headers = {"Accept": "application/octet-stream"}
    found = post(server, {"prompt": "a"}, headers=headers)
    assert found.headers["content-type"] == "application/octet-stream"
    assert pair.generate_from(pair.encoding_from_bytes(found.content), max_new_tokens=2)[0].text == "ab"
    again = post(server, {"prompt": ["a"]}, headers=headers).content
    assert parse_tensors(again, "it")[1] == parse_tensors(found.content, "it")[1]
    refused = post(server, {"prompt": ["a", "b"]}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert "2 prompts" in refused.json()["error"]["message"]


WRONG: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "both": ("/v1/completions", {"prompt": "a", "encoding": "x"}, "prompt", "give prompt or encoding (both are given)"),
    "neither": ("/v1/completions", {}, "prompt", "give prompt or encoding (neither is given)"),
    "null": ("/v1/completions", {"prompt": None}, "prompt", "neither is given"),
    "both in a chat": (
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "encoding": "x"}, "messages",
        "give messages or encoding (both are given)",
    ),
    "neither in a chat": ("/v1/chat/completions", {}, "messages", "give messages or encoding (neither is given)"),
    "neither to score": ("/v1/score", {"responses": ["a"]}, "prompt", "neither is given"),
    "no encodings": ("/v1/completions", {"encoding": []}, "encoding", "has no encodings"),
    "too many": ("/v1/completions", {"encoding": ["x"] * 5}, "encoding", "5 encodings; the queue holds at most 4"),
    "truncated": ("/v1/completions", {"encoding": "x", "truncate": True}, "truncate", "has no effect on an encoding"),
    "not base64": ("/v1/completions", {"encoding": "é?"}, "encoding", "not base64"),
    "not padded": ("/v1/completions", {"encoding": "abcde"}, "encoding", "not base64"),
    "base64 of nothing": ("/v1/completions", {"encoding": ""}, "encoding", "cannot be read as an encoding"),
    "scored": ("/v1/score", {"encoding": "AAAA", "responses": ["a"]}, "encoding", "cannot be read as an encoding"),
    "chat": ("/v1/chat/completions", {"encoding": "AAAA"}, "encoding", "cannot be read as an encoding"),
    "second": ("/v1/completions", {"encoding": ["ok", "AAAA"]}, "encoding", "Encoding 1 of 2, from 0"),
    "stream": ("/v1/completions", {"encoding": "AAAA", "stream": True}, "encoding", "cannot be read as an encoding"),
    "object": ("/v1/completions", {"encoding": {"a": 1}}, "encoding", "encoding"),
    "prompts": ("/v1/encodings", {"prompt": []}, "prompt", "has no prompts"),
    "missing prompt": ("/v1/encodings", {}, "prompt", "required, not given"),
    "ids": ("/v1/encodings", {"prompt": [1, 2]}, "prompt", "prompt"),
    "many prompts": ("/v1/encodings", {"prompt": ["a"] * 5}, "prompt", "5 prompts; the queue holds at most 4"),
    "long prompt": ("/v1/encodings", {"prompt": ["a", "a" * 30]}, "prompt", "Prompt 1 of 2, from 0"),
    "an option": ("/v1/encodings", {"prompt": "a", "max_tokens": 3}, "max_tokens", "unknown field"),
    "model": ("/v1/encodings", {"prompt": "a", "model": "none"}, "model", "There is no model 'none'"),
}  # fmt: skip


@pytest.mark.parametrize(("route", "body", "param", "fact"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_refused_by_name(
    server: RunningServer, route: str, body: dict[str, Any], param: str, fact: str
) -> None:
    if isinstance(given := body.get("encoding"), list):
        body = {**body, "encoding": [encoded(server, "a") if item == "ok" else item for item in given]}
    found = post(server, body, route)
    assert found.status_code == (404 if param == "model" else 400)
    error = found.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert fact in error["message"]
    assert "\n  → " in error["message"]
    scheduler = server.schedulers["toy"]
    until(lambda: scheduler.stats.waiting == scheduler.stats.running == 0)


def test_an_encoding_of_another_pair_is_refused_by_what_differs(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    names = {"encoder": "encoder", "projector": "new", "decoder": "decoder"}
    files = tuple(FileEntry(path=f"{name}.onnx", bytes=1, sha256=sha256) for name, sha256 in names.items())
    with http_server({"toy": make_pair(tmp_path / "other", SCRIPTS, files=files)}) as other:
        error = post(other, {"encoding": encoded(server, "a")}, "/v1/completions").json()["error"]
    assert error["param"] == "encoding"
    assert "(bundle 'toy', head 'main') belongs to another pair" in error["message"]
    assert "projector: this pair has" in error["message"]


def _changed(data: bytes, change: Callable[[dict[str, Any], dict[str, str]], Any]) -> bytes:
    """A file with other content, and the checksum of that."""
    tensors, about = parse_tensors(data, "it")
    change(tensors, about)
    return dump_tensors(tensors, about)


def _header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A file whose header says something else of the same bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


_KEY = "past_key_values.0.encoder.key"
HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[:-3], "cannot be read"),
    "flipped": (lambda data: data[:-1] + b"\x07", "expected sha256"),
    "header length": (lambda _: b"\xff" * 9, "its header is declared as"),
    "long header": (lambda data: (2**22 + 1).to_bytes(8, "little") + data[8:], "at most 4000000"),
    "no checksum": (lambda data: save_tensors(load_tensors(data)), "has no sha256"),
    "sizes": (lambda data: _header(data, lambda h: h[_KEY].update(shape=[1, 1, 2**31, 4])), "invalid shape"),
    "product of sizes": (lambda data: _header(data, lambda h: h[_KEY].update(shape=[2**30] * 8)), "cannot be read"),
    "offsets": (lambda data: _header(data, lambda h: h[_KEY].update(data_offsets=[0, 2**40])), "cannot be read"),
    "type": (lambda data: _header(data, lambda h: h[_KEY].update(dtype="BF16")), "of type 'BF16'"),
    "metadata": (lambda data: _header(data, lambda h: h.update(__metadata__={"a": 1})), "metadata is not text"),
    "metadata list": (lambda data: _header(data, lambda h: h.update(__metadata__=["a"])), "metadata is not text"),
    "deep": (lambda _: (20_000).to_bytes(8, "little") + b"[" * 20_000, "not JSON"),
    "not a number": (lambda data: _changed(data, lambda t, _: t[_KEY].__setitem__(..., np.nan)), "not a finite number"),
    "infinite": (lambda data: _changed(data, lambda t, _: t[_KEY].__setitem__(..., np.inf)), "not a finite number"),
    "wider": (lambda data: _changed(data, lambda t, _: t.update({_KEY: np.zeros((1, 1, 9, 4), np.float32)})), "has the shape"),
    "integers": (lambda data: _changed(data, lambda t, _: t.update({_KEY: np.zeros((1, 1, 2, 4), np.int8)})), "is of type int8"),
    "half": (lambda data: _changed(data, lambda t, _: t.update({_KEY: t[_KEY].astype(np.float16)})), "is of type float16"),
    "missing": (lambda data: _changed(data, lambda t, _: t.pop(_KEY)), "it has no tensor"),
    "more": (lambda data: _changed(data, lambda t, _: t.update(x=np.zeros(3))), "not an output of the projector"),
    "ids": (lambda data: _changed(data, lambda t, _: t.update({INPUT_IDS: np.full((1, 2), -1)})), "not a token id"),
    "no ids": (lambda data: _changed(data, lambda t, _: t.pop(INPUT_IDS)), "must be int64 [1, 2]"),
    "long": (lambda data: _changed(data, lambda _, a: a.update(prompt_tokens="[13]")), "at most 12"),
    "huge count": (lambda data: _changed(data, lambda _, a: a.update(prompt_tokens="[2147483647]")), "at most 12"),
    "negative": (lambda data: _changed(data, lambda _, a: a.update(prompt_tokens="[-1]")), "not a list of numbers"),
    "rows": (lambda data: _changed(data, lambda _, a: a.update(prompt_tokens="[2, 2]", dropped_tokens="[0, 0]")), "must be int64 [2, 2]"),
    "version": (lambda data: _changed(data, lambda _, a: a.update(version="3")), "reads up to 2"),
    "format": (lambda data: _changed(data, lambda _, a: a.update(format="other")), "is not an encoding"),
    "control characters": (lambda data: _changed(data, lambda _, a: a.update(format="\x1b[31m")), "is not an encoding"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_broken_or_hostile_encoding_is_refused_with_the_reason(
    server: RunningServer, pair: Orchestrator, change: Callable[[bytes], bytes], reason: str
) -> None:
    data = change(pair.encoding_to_bytes(pair.encode(["a"])))
    for route, more in (("/v1/completions", {}), ("/v1/score", {"responses": ["a"]})):
        found = post(server, {"encoding": base64.b64encode(data).decode(), **more}, route)
        error = found.json()["error"]
        assert (found.status_code, error["param"], error["type"]) == (400, "encoding", "invalid_request_error")
        assert reason in error["message"]
        assert "\x1b" not in error["message"]
    assert post(server, {"prompt": "a", "max_tokens": 2}, "/v1/completions").json()["choices"][0]["text"] == "ab"


def test_several_prompts_in_one_encoding_are_refused(server: RunningServer, pair: Orchestrator) -> None:
    data = pair.encoding_to_bytes(pair.encode(["a", "b"]))
    found = post(server, {"encoding": base64.b64encode(data).decode()}, "/v1/completions").json()["error"]
    assert "has 2 prompts" in found["message"]


def test_a_large_body_is_refused_with_the_option(pair: Orchestrator) -> None:
    with http_server({"toy": pair}, options=AppOptions(max_body_bytes=10_000_000)) as server:
        found = post(server, {"encoding": "A" * 10_000_000}, "/v1/completions")
        assert found.status_code == 413
        assert "--max-body-bytes" in found.json()["error"]["message"]
        assert post(server, {"encoding": "A" * 9_999_000}, "/v1/completions").status_code == 400


def test_encodings_wait_in_the_queue_and_leave_with_their_client(server: RunningServer, pair: Orchestrator) -> None:
    toy, scheduler = toy_of(pair), server.schedulers["toy"]
    assert isinstance(toy, Gated)
    toy.gate.clear()
    running = threading.Thread(target=post, args=(server, {"prompt": "a", "max_tokens": 3}, "/v1/completions"))
    running.start()
    assert toy.reached.wait(PATIENCE)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/encodings", json={"model": "toy", "prompt": ["a", "b"]}, timeout=0.3)
    until(lambda: server.state.active == 1)
    found: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda body=body: found.append(post(server, body)))
        for body in ({"prompt": "c", "timeout": 0.05}, {"prompt": "d"})
    ]
    for thread in threads:
        thread.start()
    until(lambda: scheduler.stats.waiting == 4)
    assert post(server, {"prompt": "e"}).json()["error"]["code"] == "queue_full"
    toy.gate.set()
    for thread in (running, *threads):
        thread.join(PATIENCE)
    late, done = sorted(found, key=lambda response: response.status_code, reverse=True)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert done.json()["data"][0]["prompt_tokens"] == 2
    assert scheduler.stats.outcomes == {"length": 1, "cancelled": 2, "deadline": 1, "encoded": 1}


def test_encodings_that_are_left_after_draining_end_with_an_error(pair: Orchestrator) -> None:
    toy = toy_of(pair)
    assert isinstance(toy, Gated)
    found: list[httpx.Response] = []
    with http_server({"toy": pair}, drain=0.2) as server:
        toy.gate.clear()
        threads = [
            threading.Thread(target=lambda body=body: found.append(post(server, body[1], body[0])))
            for body in (("/v1/completions", {"prompt": "a"}), ("/v1/encodings", {"prompt": "a"}))
        ]
        threads[0].start()
        assert toy.reached.wait(PATIENCE)
        threads[1].start()
        until(lambda: server.schedulers["toy"].stats.submitted == 2)
        server.terminate()
        threads[1].join(PATIENCE)
        toy.gate.set()
        threads[0].join(PATIENCE)
    assert [(response.status_code, response.json()["error"]["code"]) for response in found] == [(503, "cancelled")] * 2


def test_metrics_count_encodings(server: RunningServer) -> None:
    post(server, {"prompt": ["a", "bb"]})
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    assert values['llm2slm_requests_finished_total{bundle="toy",outcome="encoded"}'] == 2
    assert values['llm2slm_encoding_latency_seconds_count{model="toy"}'] == 1
    assert values['llm2slm_request_encode_time_seconds_count{model="toy"}'] == 2
    assert values['llm2slm_request_prompt_tokens_sum{model="toy"}'] == 5
    assert values['llm2slm_prompt_tokens_total{bundle="toy"}'] == 5


def test_the_description_has_encodings(server: RunningServer) -> None:
    description = httpx.get(server.url + "/openapi.json").json()
    content = description["paths"]["/v1/encodings"]["post"]["responses"]["200"]["content"]
    assert content.keys() == {"application/json", "application/octet-stream"}
    assert "encoding" in description["components"]["schemas"]["CompletionBody"]["properties"]


def test_a_repeated_prompt_is_not_encoded_again(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, SCRIPTS, cache=EncodingCache(directory=tmp_path / "kept"))
    with http_server({"toy": pair}) as server:
        body, route = {"prompt": "aaa", "max_tokens": 2}, "/v1/completions"
        assert post(server, body, route).json()["choices"][0]["cached"] is False
        assert post(server, body, route).json()["choices"][0]["cached"] is True
        events = [
            line.removeprefix("data: ") for line in post(server, {**body, "stream": True}, route).text.split("\n\n")
        ]
        assert json.loads(events[-3])["choices"][0]["cached"] is True
        assert [item["cached"] for item in post(server, {"prompt": ["aaa", "b"]}).json()["data"]] == [True, False]
        assert len(toy_of(pair).read) == 2
        metrics = httpx.get(server.url + "/metrics").text
        assert 'llm2slm_encoding_cache_total{model="toy",result="hit"} 3.0' in metrics
        assert 'llm2slm_encoding_cache_total{model="toy",result="miss"} 2.0' in metrics
        assert 'llm2slm_prompt_tokens_total{bundle="toy"} 6.0' in metrics
    again = make_pair(tmp_path, SCRIPTS, cache=EncodingCache(directory=tmp_path / "kept"))
    with http_server({"toy": again}) as server:
        assert post(server, body, route).json()["choices"][0]["cached"] is True
    assert toy_of(again).read == []
