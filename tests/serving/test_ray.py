"""The server on Ray: it answers as one process does; no answer is lost with a replica or a node; it grows and shrinks with the load."""

import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llm2slm_export.inference.orchestrator import load
from tests.support import waiting
from tests.support.ray_server import RayServer, ray_server

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra [ray] is not installed"),
]
PATIENCE = 240.0  # seconds; a replica imports Ray before it loads a bundle
PROMPTS = [f"{word} {count}" for word in ("one", "two", "three", "four") for count in range(4)]
TOKENS = 24
KEY = "secret"
QUICK = {
    "upscale_delay_s": 1,
    "downscale_delay_s": 5,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
}


@pytest.fixture(scope="module")
def bundle(bundles: Callable[..., tuple[Path, Path]]) -> Path:
    return bundles("t5")[1]


@pytest.fixture(scope="module")
def texts(bundle: Path) -> dict[str, str]:
    """The responses of the pair in this process."""
    with load(bundle, threads=1) as pair:
        return {prompt: pair.generate([prompt], max_new_tokens=TOKENS)[0].text for prompt in PROMPTS}


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(KEY)
    with ray_server(
        bundle=f"toy={bundle}", reader_replicas="1-2", writer_replicas="1-2", max_rows=2, max_waiting=64,
        autoscaling=QUICK, api_key_file=str(keys),
    ) as found:  # fmt: skip
        yield found


@pytest.fixture
def client(server: RayServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as found:
        yield found


def client_of(server: RayServer) -> openai.OpenAI:
    # What is lost must not be hidden by the client.
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)


until = partial(waiting.until, patience=PATIENCE, pause=0.2)  # most conditions read all processes


class Load:
    """Clients that ask for responses, one after another, until `stop` is set: whole, or as streams of completions and chats."""

    def __init__(self, server: RayServer, texts: dict[str, str]) -> None:
        self._server, self._texts, self.stop = server, texts, threading.Event()
        self.answered = 0
        self.wrong: list[str] = []
        self.broken: list[str] = []  # streams that had begun

    def run(self, number: int) -> None:
        with client_of(self._server) as client:
            for count in range(number, 1_000_000):
                if self.stop.is_set():
                    return
                prompt = PROMPTS[count % len(PROMPTS)]
                try:
                    text = (self.whole if count % 3 else self.streamed)(client, prompt)
                except Exception as error:  # noqa: BLE001
                    self.wrong.append(repr(error))
                else:
                    if text is not None and text != self._texts[prompt]:
                        self.wrong.append(f"{prompt}: {text!r}")
                self.answered += 1

    @staticmethod
    def whole(client: openai.OpenAI, prompt: str) -> str:
        return client.completions.create(model="toy", prompt=prompt, max_tokens=TOKENS).choices[0].text

    def streamed(self, client: openai.OpenAI, prompt: str) -> str | None:
        chunks: list[str] = []
        try:
            for chunk in client.completions.create(model="toy", prompt=prompt, max_tokens=TOKENS, stream=True):
                chunks += [choice.text for choice in chunk.choices]
        except openai.APIError as error:
            if not chunks or "The replica that was responding has failed" not in str(error):
                raise
            self.broken.append(str(error))
            return None
        return "".join(chunks)


@contextmanager
def under_load(server: RayServer, texts: dict[str, str], clients: int = 8) -> Iterator[Load]:
    load = Load(server, texts)
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(load.run, number) for number in range(clients)]
        try:
            until(lambda: load.answered > 2 * clients)
            yield load
        finally:
            load.stop.set()
        for future in running:
            future.result(PATIENCE)
    print(f"{load.answered} requests, {len(load.broken)} streams that had begun ended with an error")
    assert load.wrong == []


def test_it_answers_as_one_process_does(client: openai.OpenAI, texts: dict[str, str]) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    found = client.completions.create(model="toy", prompt=PROMPTS, max_tokens=TOKENS)
    assert [choice.text for choice in found.choices] == list(texts.values())
    timings: Any = found.choices[0].model_extra
    assert timings["timings_ms"]["reader"] > 0
    prompt = PROMPTS[0]
    stream = client.completions.create(model="toy", prompt=prompt, max_tokens=TOKENS, stream=True)
    chunks = [chunk.choices[0].text for chunk in stream]
    assert "".join(chunks) == texts[prompt]
    assert len(chunks) > 2
    messages: Any = [{"role": "user", "content": prompt}]
    chat = client.chat.completions.create(model="toy", messages=messages, max_tokens=TOKENS)
    assert chat.choices[0].message.content == texts[prompt]
    deltas = client.chat.completions.create(model="toy", messages=messages, max_tokens=TOKENS, stream=True)
    assert "".join(delta.choices[0].delta.content or "" for delta in deltas) == texts[prompt]


def test_encodings_come_from_the_readers(server: RayServer, texts: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "toy", "prompt": PROMPTS[0]}
    found = httpx.post(f"{server.url}/v1/encodings", json=body, headers=headers, timeout=PATIENCE).json()
    from_encoding = {"model": "toy", "encoding": found["data"][0]["encoding"], "max_tokens": TOKENS}
    answered = httpx.post(f"{server.url}/v1/completions", json=from_encoding, headers=headers, timeout=PATIENCE)
    assert answered.json()["choices"][0]["text"] == texts[PROMPTS[0]]


def test_errors_are_the_servers_own(server: RayServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="toy", prompt="a", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="empty") as refused:
        client.completions.create(model="toy", prompt="", stream=True)
    assert refused.value.param == "prompt"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="a")
    late = {"timeout": 0.001, "min_new_tokens": 60}
    with pytest.raises(openai.InternalServerError) as error:
        client.completions.create(model="toy", prompt="a", max_tokens=60, extra_body=late)
    assert error.value.status_code == 504
    for path, status in (("/v1/models", 401), ("/live", 200), ("/health", 200), ("/metrics", 404), ("/", 200)):
        assert httpx.get(server.url + path, timeout=PATIENCE).status_code == status
    large = httpx.post(
        f"{server.url}/v1/completions", content=b" " * 1_000_001, headers={"Authorization": f"Bearer {KEY}"}
    )
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")


def test_no_answer_is_lost_with_a_replica_and_the_number_follows_the_load(
    server: RayServer, texts: dict[str, str]
) -> None:
    assert [len(server.replicas(name)) for name in ("Writer", "Reader", "Front")] == [1, 1, 1]
    # Each is killed when it is the only one, or one of two, and while its successor starts the requests wait.
    with under_load(server, texts) as load:
        for name in ("Reader", "Writer"):
            victim = server.replicas(name)[0]
            before = load.answered
            os.kill(victim, signal.SIGKILL)
            until(lambda victim=victim, name=name: victim not in server.replicas(name) and bool(server.replicas(name)))  # type: ignore[misc]
            until(lambda before=before: load.answered > before + 40)  # type: ignore[misc]
        until(lambda: len(server.replicas("Writer")) == 2)
        victim = server.replicas("Writer")[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(server.replicas("Writer")) == 2 and victim not in server.replicas("Writer"))
    assert len(load.broken) <= 8  # streams that had begun, of eight clients
    until(lambda: len(server.replicas("Writer")) == len(server.replicas("Reader")) == 1)


def test_no_answer_is_lost_with_a_node(bundle: Path, texts: dict[str, str]) -> None:
    # The head has room for Ray's own processes, the front, and one replica of each part.
    with ray_server(
        nodes=2, cores=3, bundle=f"toy={bundle}", reader_replicas=2, writer_replicas=2, max_rows=4
    ) as server:
        with under_load(server, texts, clients=6) as load:
            assert [len(server.replicas(name)) for name in ("Writer", "Reader")] == [2, 2]
            server.kill_node()
            until(lambda: sum(len(server.replicas(name)) for name in ("Writer", "Reader")) < 4)
            before = load.answered
            until(lambda: load.answered > before + 40)
        assert len(load.broken) <= 6
