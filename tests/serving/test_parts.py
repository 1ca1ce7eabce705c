"""A reader and a writer as two servers: together they answer as one, and each says what it is when it is asked for the other."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm2slm_export.bundle.manifest import FileEntry
from llm2slm_export.inference.encodings.cache import EncodingCache
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.serving.app import AppOptions
from llm2slm_export.serving.reader_client import ReaderClient
from tests.support.gated_toy import PATIENCE, Gated
from tests.support.http_server import RunningServer, http_server
from tests.support.toy_pair import Toy, make_pair, toy_of
from tests.support.waiting import until

SCRIPTS = {letter: letter + "bcdefghijklmnopqrstuvwxyz" for letter in "abcdefgh"}
PROMPT = {"prompt": "a", "max_tokens": 3}


class SlowReader(Toy):
    """A toy whose encoder waits for the gate."""

    def __init__(self, scripts: dict[int, list[int]]) -> None:
        super().__init__(scripts)
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()

    def encode(self, input_ids: Any, attention_mask: Any) -> Any:
        self.reached.set()
        assert self.gate.wait(PATIENCE)
        return super().encode(input_ids, attention_mask)


class Writer(Gated):
    """A toy without encoder and projector."""

    def encode(self, *_: Any) -> Any:
        raise AssertionError

    def project(self, *_: Any) -> Any:
        raise AssertionError


def pair_of(directory: Path, name: str, toy: type[Toy], **changes: Any) -> Orchestrator:
    (directory / name).mkdir()
    return make_pair(directory / name, SCRIPTS, toy=toy, **changes)


@contextmanager
def writer_of(
    pair: Orchestrator, url: str, *, drain: float = 0.0, api_key: str | None = None, **options: Any
) -> Iterator[RunningServer]:
    client = ReaderClient(url, api_key=api_key, max_waiting=4)
    settings = AppOptions(reader=client, **options)
    with http_server({"toy": pair}, options=settings, part="writer", drain=drain, max_waiting=4) as server:
        yield server


@pytest.fixture
def reading(tmp_path: Path) -> Orchestrator:
    return pair_of(tmp_path, "reader", SlowReader)


@pytest.fixture
def writing(tmp_path: Path) -> Orchestrator:
    return pair_of(tmp_path, "writer", Writer)


@pytest.fixture
def reader(reading: Orchestrator) -> Iterator[RunningServer]:
    with http_server({"toy": reading}, part="reader") as server:
        yield server


@pytest.fixture
def writer(writing: Orchestrator, reader: RunningServer) -> Iterator[RunningServer]:
    with writer_of(writing, reader.url) as server:
        yield server


def gate_of(pair: Orchestrator) -> SlowReader:
    toy = toy_of(pair)
    assert isinstance(toy, SlowReader)
    return toy


def post(server: RunningServer, body: Any, route: str = "/v1/completions", **more: Any) -> httpx.Response:
    return httpx.post(server.url + route, json={"model": "toy", **body}, timeout=PATIENCE, **more)


def metrics_of(server: RunningServer) -> dict[str, float]:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_together_they_answer_as_one_server(
    writer: RunningServer, reading: Orchestrator, writing: Orchestrator
) -> None:
    found = post(writer, {"prompt": ["a", "bbb", "c" * 30], "max_tokens": 4, "truncate": True}).json()
    assert [(c["index"], c["text"], c.get("dropped_tokens")) for c in found["choices"]] == [
        (0, "abcd", None), (1, "bbcd", None), (2, "cbcd", 19),
    ]  # fmt: skip
    assert found["usage"] == {"prompt_tokens": 18, "completion_tokens": 12, "total_tokens": 30}
    timings = found["choices"][0]["timings_ms"]
    assert timings["reader"] > 0
    assert timings["total"] >= timings["reader"]
    stream = post(writer, {**PROMPT, "stream": True, "n": 2, "temperature": 0.5, "seed": 3}).text
    assert stream.endswith("data: [DONE]\n\n")
    chat = {"messages": [{"role": "user", "content": "d"}], "max_tokens": 2}
    assert post(writer, chat, "/v1/chat/completions").json()["choices"][0]["message"]["content"] == "db"
    score = {"prompt": "a", "responses": ["abc", "xyz"], "add_eos": False}
    scored = post(writer, score, "/v1/score").json()
    assert [item["is_greedy"] for item in scored["data"]] == [True, False]
    assert (scored["usage"]["prompt_tokens"], scored["usage"]["completion_tokens"]) == (2, 6)
    assert "prefill" not in toy_of(reading).calls
    metrics = metrics_of(writer)
    assert metrics['llm2slm_reader_requests_total{model="toy",result="ok"}'] == 6
    assert metrics['llm2slm_reader_latency_seconds_count{model="toy"}'] == 6
    assert metrics['llm2slm_prompt_tokens_total{bundle="toy"}'] == 0
    assert toy_of(writing).calls.count("prefill") >= 4


def test_a_writer_without_a_reader_generates_from_encodings_alone(reader: RunningServer, writing: Orchestrator) -> None:
    encoding = post(reader, {"prompt": "a"}, "/v1/encodings").json()["data"][0]["encoding"]
    with http_server({"toy": writing}, part="writer") as server:
        assert post(server, {"encoding": encoding, "max_tokens": 3}).json()["choices"][0]["text"] == "abc"
        for route, body, param in (
            ("/v1/completions", PROMPT, "prompt"),
            ("/v1/score", {"prompt": "a", "responses": ["a"]}, "prompt"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ):
            refused = post(server, body, route)
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (400, param)
            assert "has the decoders alone, and no --reader" in error["message"]
            assert f"give encoding, from a reader's /v1/encodings, instead of {param}" in error["message"]


def test_each_says_what_it_is(reader: RunningServer, writer: RunningServer) -> None:
    for route, more in (("completions", PROMPT), ("score", {"prompt": "a", "responses": ["a"]})):
        found = post(reader, more, f"/v1/{route}")
        assert (found.status_code, found.json()["error"]["code"]) == (404, "other_part")
        assert "has the encoders and projectors alone: it serves /v1/encodings" in found.json()["error"]["message"]
    found = post(writer, {"prompt": "a"}, "/v1/encodings")
    assert (found.status_code, found.json()["error"]["code"]) == (404, "other_part")
    assert "has the decoders alone: it generates from encodings" in found.json()["error"]["message"]
    paths = [httpx.get(server.url + "/openapi.json").json()["paths"].keys() for server in (reader, writer)]
    assert "/v1/encodings" in paths[0]
    assert not {"/v1/completions", "/v1/chat/completions", "/v1/score"} & paths[0]
    assert "/v1/encodings" not in paths[1]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/score"} <= paths[1]


@pytest.mark.parametrize(
    ("body", "param", "fact"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": ["a", "b" * 30]}, "prompt", "Prompt 1 of 2"),
        ({"prompt": "a", "temperature": -1}, "temperature", "temperature"),
        ({"prompt": "a", "num_beams": 2, "stream": True}, "stream", "not with num_beams"),
        ({"prompt": ["a"] * 5}, "prompt", "at most 4"),
    ],
)
def test_what_is_wrong_is_refused_before_the_reader_is_asked(
    writer: RunningServer, reading: Orchestrator, body: dict[str, Any], param: str, fact: str
) -> None:
    found = post(writer, body)
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)
    assert fact in found.json()["error"]["message"]
    assert toy_of(reading).read == []
    assert not any("reader_requests" in name for name in metrics_of(writer))


def test_a_reader_that_is_down_is_named(writing: Orchestrator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with writer_of(writing, url) as writer:
        for body in (PROMPT, {**PROMPT, "stream": True}):
            found = post(writer, body)
            error = found.json()["error"]
            assert (found.status_code, found.headers["Retry-After"], error["code"]) == (503, "1", "reader_unavailable")
            assert error["message"].startswith(f"The reader at {url} cannot be reached.\n  - ConnectError")
        assert httpx.get(writer.url + "/health").status_code == 200  # it still answers encodings
        assert metrics_of(writer)['llm2slm_reader_requests_total{model="toy",result="unavailable"}'] == 2


class OddReader(BaseHTTPRequestHandler):
    """Sends what it is told, or hangs up."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        server.asked += 1
        if server.hang_ups:
            server.hang_ups -= 1
            self.close_connection = True
            return
        status, body = server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def odd() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OddReader) as server:
        found: Any = server
        found.hang_ups, found.asked, found.answer = 0, 0, (200, b"")
        found.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found
        server.shutdown()
        thread.join(PATIENCE)


def error_body(message: str = "No.\n  → do otherwise", param: str | None = None, code: str | None = None) -> bytes:
    return json.dumps(
        {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}
    ).encode()


ODD: dict[str, tuple[int, bytes, int, str | None, str]] = {
    "refusal": (400, error_body(param="prompt"), 400, "prompt", "No."),
    "large": (413, error_body(code="body_too_large"), 413, None, "The reader at URL: No."),
    "busy": (429, error_body(code="queue_full"), 429, None, "The reader at URL: No."),
    "draining": (503, error_body(code="draining"), 503, None, "The reader at URL: No."),
    "late": (504, error_body(code="deadline_exceeded"), 504, None, "The reader at URL: No."),
    "key": (401, error_body(code="invalid_api_key"), 502, None, "--reader-api-key-file"),
    "model": (404, error_body(code="model_not_found"), 502, None, "under the same names"),
    "failure": (500, b"oops", 502, None, "The reader at URL answered with status 500.\n  → see the reader's log"),
    "proxy": (503, b"<html>", 502, None, "answered with status 503"),
    "redirect": (302, b"", 502, None, "answered with status 302"),
    "long error": (500, b"x" * 200_000, 502, None, "sent more bytes"),
    "no encoding": (200, b"x", 502, None, "sent an encoding that this server cannot use.\n  - The encoding cannot be read"),
    "too many bytes": (200, b"x" * 100_000, 502, None, "sent more bytes than an encoding has"),
}  # fmt: skip


@pytest.mark.parametrize(("status", "body", "mapped", "param", "fact"), ODD.values(), ids=ODD)
def test_a_readers_errors_are_its_own(
    writing: Orchestrator, odd: Any, status: int, body: bytes, mapped: int, param: str | None, fact: str
) -> None:
    odd.answer = (status, body)
    with writer_of(writing, odd.url) as writer:
        found = post(writer, PROMPT)
        error = found.json()["error"]
        assert (found.status_code, error["param"]) == (mapped, param)
        assert error.keys() == {"message", "type", "param", "code"}
        assert fact.replace("URL", odd.url) in error["message"]
        assert ("Retry-After" in found.headers) == (mapped in (429, 503))
        assert odd.asked == 1  # an answer is an answer
        if status == 400:
            chat = post(writer, {"messages": [{"role": "user", "content": "d"}]}, "/v1/chat/completions")
            assert chat.json()["error"]["param"] == "messages"


def test_a_lost_connection_is_tried_once_more(writing: Orchestrator, reading: Orchestrator, odd: Any) -> None:
    odd.answer = (200, reading.encoding_to_bytes(reading.encode(["a"])))
    with writer_of(writing, odd.url) as writer:
        odd.hang_ups = 1
        assert post(writer, PROMPT).json()["choices"][0]["text"] == "abc"
        assert odd.asked == 2
        odd.hang_ups = 9
        assert post(writer, PROMPT).json()["error"]["code"] == "reader_unavailable"
        assert odd.asked == 4


def test_another_bundle_or_prompt_at_the_reader_is_found_out(
    tmp_path: Path, writing: Orchestrator, reading: Orchestrator, odd: Any
) -> None:
    names = {"encoder": "new", "projector": "projector", "decoder": "decoder"}
    files = tuple(FileEntry(path=f"{name}.onnx", bytes=1, sha256=sha256) for name, sha256 in names.items())
    other = pair_of(tmp_path, "other", SlowReader, files=files)
    with writer_of(writing, odd.url) as writer:
        for source, prompts, fact in (
            (other, ["a"], "belongs to another pair"),
            (reading, ["abc"], "It has (4,) tokens"),
            (reading, ["a", "b"], "It has (2, 2) tokens"),
        ):
            odd.answer = (200, source.encoding_to_bytes(source.encode(prompts)))
            error = post(writer, PROMPT).json()["error"]
            assert error["code"] == "reader_failed"
            assert fact in error["message"]
            assert "→ serve the same bundles on both" in error["message"]


def test_a_late_reader_is_504_and_is_told(writer: RunningServer, reader: RunningServer, reading: Orchestrator) -> None:
    gate_of(reading).gate.clear()
    found = post(writer, {**PROMPT, "timeout": 0.2})
    assert (found.status_code, found.json()["error"]["code"]) == (504, "deadline_exceeded")
    gate_of(reading).gate.set()
    until(lambda: reader.state.active == writer.state.active == 0)
    assert post(writer, PROMPT).json()["choices"][0]["text"] == "abc"


def test_a_prompt_whose_client_is_gone_leaves_the_reader(
    writer: RunningServer, reader: RunningServer, reading: Orchestrator
) -> None:
    toy = gate_of(reading)
    toy.gate.clear()
    other: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: other.append(post(writer, {"prompt": "b", "max_tokens": 2})))
    thread.start()
    assert toy.reached.wait(PATIENCE)
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                writer.url + "/v1/completions", json={"model": "toy", **PROMPT, "stream": stream}, timeout=0.3
            )  # fmt: skip
    until(lambda: reader.state.active == writer.state.active == 1)
    toy.gate.set()
    thread.join(PATIENCE)
    assert other[0].json()["choices"][0]["text"] == "bb"
    until(lambda: reader.schedulers["toy"].stats.outcomes == {"encoded": 1, "cancelled": 2})
    assert len(toy.read) == 1


def test_few_prompts_wait_for_the_reader(writer: RunningServer, reading: Orchestrator) -> None:
    toy = gate_of(reading)
    toy.gate.clear()
    body = {"prompt": ["a", "b"], "max_tokens": 2}
    found: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: found.append(post(writer, body))) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: writer.state.active == 2)
    until(lambda: post(writer, PROMPT).status_code == 429)
    error = post(writer, PROMPT).json()["error"]
    assert error["code"] == "queue_full"
    assert "4 prompts are being encoded by the reader" in error["message"]
    toy.gate.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert [response.status_code for response in found] == [200, 200]


def test_draining_ends_what_waits_for_the_reader(
    writing: Orchestrator, reader: RunningServer, reading: Orchestrator
) -> None:
    toy = gate_of(reading)
    toy.gate.clear()
    found: list[httpx.Response] = []
    with writer_of(writing, reader.url, drain=0.2) as writer:
        threads = [
            threading.Thread(target=lambda stream=stream: found.append(post(writer, {**PROMPT, "stream": stream})))
            for stream in (False, True)
        ]
        for thread in threads:
            thread.start()
        assert toy.reached.wait(PATIENCE)
        until(lambda: writer.state.active == 2)
        writer.terminate()
        for thread in threads:
            thread.join(PATIENCE)
    toy.gate.set()
    assert [(response.status_code, response.json()["error"]["code"]) for response in found] == [(503, "cancelled")] * 2


def test_the_readers_key_is_the_servers_own(writing: Orchestrator, reading: Orchestrator) -> None:
    with http_server({"toy": reading}, options=AppOptions(api_keys=["inner"]), part="reader") as reader:
        with writer_of(writing, reader.url, api_key="inner", api_keys=["outer"]) as writer:
            headers = {"Authorization": "Bearer outer"}
            assert post(writer, PROMPT, headers=headers).json()["choices"][0]["text"] == "abc"
        with writer_of(writing, reader.url) as writer:
            error = post(writer, PROMPT).json()["error"]
            assert "answered with status 401" in error["message"]
            assert "inner" not in error["message"]


def test_a_prompt_is_truncated_to_fewer_tokens_if_asked(tmp_path: Path) -> None:
    reading = pair_of(tmp_path, "reader", SlowReader)
    with http_server({"toy": reading}, part="reader") as reader:
        body = {"prompt": "c" * 30, "truncate": True, "max_prompt_tokens": 5}
        assert post(reader, body, "/v1/encodings").json()["data"][0]["prompt_tokens"] == 5
        for more, fact in (
            ({"truncate": False}, "has no effect without truncate"),
            ({"max_prompt_tokens": 0}, "greater than"),
        ):
            error = post(reader, {**body, **more}, "/v1/encodings").json()["error"]
            assert error["param"] == "max_prompt_tokens"
            assert fact in error["message"]


def test_a_reader_has_a_cache(tmp_path: Path, writing: Orchestrator) -> None:
    reading = pair_of(tmp_path, "cached", SlowReader, cache=EncodingCache())
    with http_server({"toy": reading}, part="reader") as reader, writer_of(writing, reader.url) as writer:
        for _ in range(3):
            assert post(writer, PROMPT).json()["choices"][0]["text"] == "abc"
        assert len(toy_of(reading).read) == 1
        assert metrics_of(reader)['llm2slm_encoding_cache_total{model="toy",result="hit"}'] == 2
