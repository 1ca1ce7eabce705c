"""What vLLM's tests assert of completions and chats through OpenAI's client, for a pair: in other words, and for a server that is ours.

From tests/entrypoints/openai of vLLM, its files and what is asserted here:

- completion/test_completion.py: one completion and its usage; no, zero and too many log-probabilities; a stream that is the whole
  text, with one finish reason; several responses, whole and streamed; stream options; batches of prompts.
- completion/test_completion_text_offset.py: offsets of tokens in a stream are those of the whole response, with a stop string.
- completion/test_empty_prompt_list.py, test_prompt_validation.py: no prompts, an empty prompt.
- chat_completion/test_chat.py: no, zero and too many log-probabilities; one chat; a stream; stream options; a content of parts; a text
  response format; seeds; several responses, whole, streamed and with a seed; one response.
- chat_completion/test_non_object_body_validation.py: bodies that are no objects.
- basic/test_basic.py: the version, health, requests that are cancelled, a wrong content type.
- completion/test_shutdown.py: running requests finish and new ones are refused; the server ends in time (also in test_server.py).

Not asserted, because a pair has no such thing, and the request is refused by the field's name (NOT_SUPPORTED): token ids as a prompt,
`echo`, `prompt_logprobs`, `top_logprobs`, structured outputs, tools, `min_tokens`, `min_characters`, `continuous_usage_stats`,
`truncate_prompt_tokens`, LoRA, several messages, other roles, unknown fields in a message, /invocations, /load.
vLLM's last chunk of text has the finish reason; here, as at OpenAI, it follows in a chunk without text.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import llm2slm_export
from llm2slm_export.inference.orchestrator import Orchestrator
from tests.support.gated_toy import PATIENCE, Gated
from tests.support.http_server import RunningServer, http_server
from tests.support.toy_pair import make_pair, toy_of

SCRIPTS = {letter: letter + "bcdefghijklmnopqrstuvwxyz" for letter in "abcdefgh"}
SAMPLED: dict[str, Any] = {"temperature": 1.5, "seed": 42, "max_tokens": 24}


@pytest.fixture
def pair(tmp_path: Path) -> Orchestrator:
    return make_pair(tmp_path, SCRIPTS, toy=Gated)


@pytest.fixture
def server(pair: Orchestrator) -> Iterator[RunningServer]:
    with http_server({"toy": pair}, max_waiting=256, max_rows=16) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any = "a", **options: Any) -> Any:
    return client.completions.create(**{"model": "toy", "prompt": prompt, "max_tokens": 5, "temperature": 0, **options})


def chat(client: openai.OpenAI, content: Any = "a", **options: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        **{"model": "toy", "messages": messages, "max_completion_tokens": 5, "temperature": 0, **options}
    )


@pytest.mark.parametrize("create", [complete, chat])
def test_one_response_and_its_usage(client: openai.OpenAI, create: Any) -> None:
    found = create(client)
    assert found.id
    (choice,) = found.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (2, 5, 7)
    if create is chat:
        assert (choice.message.role, choice.message.content) == ("assistant", "abcde")


def test_logprobs_none_zero_and_too_many(client: openai.OpenAI) -> None:
    assert complete(client, logprobs=None).choices[0].logprobs is None
    assert len(complete(client, logprobs=0).choices[0].logprobs.token_logprobs) == 5
    assert chat(client, logprobs=False).choices[0].logprobs is None
    content = chat(client, logprobs=True, top_logprobs=0).choices[0].logprobs.content
    assert [token.top_logprobs for token in content] == [[]] * 5
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="logprobs"):
            complete(client, logprobs=21, stream=stream)
        with pytest.raises(openai.BadRequestError, match="top_logprobs"):
            chat(client, logprobs=True, top_logprobs=21, stream=stream)
    # The server works afterwards.
    assert complete(client).choices[0].text == "abcde"


@pytest.mark.parametrize("create", [complete, chat])
def test_a_stream_is_the_whole_text_with_one_reason(client: openai.OpenAI, create: Any) -> None:
    whole = create(client).choices[0]
    chunks = [choice for chunk in create(client, stream=True) for choice in chunk.choices]
    texts = [choice.text if create is complete else choice.delta.content or "" for choice in chunks]
    assert "".join(texts) == (whole.text if create is complete else whole.message.content)
    assert [choice.finish_reason for choice in chunks if choice.finish_reason] == [whole.finish_reason]
    assert chunks[-1].finish_reason == "length"
    if create is chat:
        assert {choice.delta.role for choice in chunks} <= {"assistant", None}


@pytest.mark.parametrize("create", [complete, chat])
def test_several_responses(client: openai.OpenAI, create: Any) -> None:
    given = {**SAMPLED, "n": 3}
    if create is chat:
        given["max_completion_tokens"] = given.pop("max_tokens")
    whole = create(client, **given)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.text if create is complete else choice.message.content for choice in whole.choices]
    assert all(choice.finish_reason for choice in whole.choices)
    assert len(set(texts)) == 3
    streamed, reasons = [""] * 3, 0
    for chunk in create(client, **given, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text if create is complete else choice.delta.content or ""
            reasons += choice.finish_reason is not None
    assert (streamed, reasons) == (texts, 3)
    (one,) = create(client, **{**given, "n": 1}).choices
    assert one.index == 0


def test_responses_end_at_different_times(client: openai.OpenAI) -> None:
    found = complete(client, **{**SAMPLED, "temperature": 3.0}, n=4, logprobs=0, stop=["d", "k", "z"])
    assert len({len(choice.logprobs.tokens) for choice in found.choices}) > 1


@pytest.mark.parametrize("create", [complete, chat])
def test_stream_options(client: openai.OpenAI, create: Any) -> None:
    for options in ({"include_usage": False}, {}):
        assert all(chunk.usage is None for chunk in create(client, stream=True, stream_options=options))
    *others, last = create(client, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in others)
    assert others[-1].choices[0].finish_reason is not None
    assert last.choices == []
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert min(last.usage.prompt_tokens, last.usage.completion_tokens) > 0
    for name in ("include_usage", "continuous_usage_stats"):
        for value in (None, True):
            with pytest.raises(openai.BadRequestError):
                create(client, stream=False, stream_options={name: value})


def test_batches_of_prompts(client: openai.OpenAI) -> None:
    found = complete(client, ["a", "a"])
    assert [choice.text for choice in found.choices] == ["abcde", "abcde"]
    beams = [choice.text for choice in complete(client, ["a", "a"], n=2, extra_body={"num_beams": 2}).choices]
    assert beams[0] != beams[1]
    assert beams[:2] == beams[2:]
    texts = ["", ""]
    for chunk in complete(client, ["a", "a"], stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
    assert texts == ["abcde", "abcde"]


def test_offsets_in_a_stream_are_those_of_the_whole(client: openai.OpenAI) -> None:
    # A stop string of two characters holds one back, and the text comes later than its token.
    given = {"logprobs": 0, "stop": ["ef"], "max_tokens": 8}
    whole = complete(client, **given).choices[0]
    chunks = [choice for chunk in complete(client, **given, stream=True) for choice in chunk.choices]
    assert whole.text == "abcd" == "".join(choice.text for choice in chunks)
    for name in ("text_offset", "tokens", "token_logprobs"):
        streamed = [item for choice in chunks if choice.logprobs for item in getattr(choice.logprobs, name)]
        assert streamed == getattr(whole.logprobs, name)
    offsets = whole.logprobs.text_offset
    assert offsets == sorted(offsets)


def test_a_chat_of_parts_and_a_text_format(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "a"}]
    assert chat(client, parts).choices[0].message.content == chat(client, "a").choices[0].message.content
    assert chat(client, response_format={"type": "text"}).choices[0].message.content == "abcde"


def test_a_seed_is_any_whole_number_from_0(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="seed: must be a whole number, at least 0"):
        chat(client, temperature=1.0, seed=-(2**63) - 1)
    # vLLM refuses this one too: its seeds have 64 bits.
    texts = [chat(client, temperature=1.5, seed=2**64).choices[0].message.content for _ in range(2)]
    assert texts[0] == texts[1]


NOT_SUPPORTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "echo": (complete, {"echo": True}), "suffix": (complete, {"suffix": "x"}), "prompt": (complete, {"prompt": [0, 0]}),
    "prompt_logprobs": (complete, {"extra_body": {"prompt_logprobs": 1}}),
    "truncate_prompt_tokens": (complete, {"extra_body": {"truncate_prompt_tokens": 4}}),
    "structured_outputs": (chat, {"extra_body": {"structured_outputs": {"regex": "a+"}}}),
    "min_tokens": (chat, {"extra_body": {"min_tokens": 3}}), "response_format": (chat, {"response_format": {"type": "json_object"}}),
    "tools": (chat, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    "continuous_usage_stats": (chat, {"stream": True, "stream_options": {"continuous_usage_stats": True}}),
    "role": (chat, {"messages": [{"role": "my-role", "content": "a"}]}),
    "extra_field": (chat, {"messages": [{"role": "user", "content": "a", "extra_field": "0"}]}),
    "empty": (complete, {"prompt": ""}), "no prompts": (complete, {"prompt": []}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "asked"), NOT_SUPPORTED.items(), ids=NOT_SUPPORTED)
def test_what_is_not_supported_is_refused_by_its_name(client: openai.OpenAI, name: str, asked: Any) -> None:
    create, given = asked
    with pytest.raises(openai.BadRequestError) as error:
        create(client, **given)
    assert name in str(error.value)


@pytest.mark.parametrize("content", [b"this is not JSON{{{", b'["not", "an object"]', b"42", b"null", b'"text"'])
def test_bodies_that_are_no_objects(server: RunningServer, content: bytes) -> None:
    for route in ("/v1/completions", "/v1/chat/completions", "/v1/score"):
        found = httpx.post(server.url + route, content=content, headers={"Content-Type": "application/json"})
        assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error")


def test_the_version_the_health_and_a_wrong_content_type(server: RunningServer, client: openai.OpenAI) -> None:
    assert httpx.get(server.url + "/version").json() == {"version": llm2slm_export.__version__}
    assert httpx.get(server.url + "/health").status_code == 200
    with pytest.raises(openai.APIStatusError, match="application/json"):
        chat(client, extra_headers={"Content-Type": "application/x-www-form-urlencoded"})


@pytest.mark.slow
def test_many_cancelled_requests_are_not_decoded(server: RunningServer, pair: Orchestrator) -> None:
    toy = toy_of(pair)
    assert isinstance(toy, Gated)
    toy.gate.clear()

    async def cancelled() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=2.0
        ) as client:
            asked: Any = {"model": "toy", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1000}
            many = (client.chat.completions.create(**asked) for _ in range(200))
            return await asyncio.gather(*many, return_exceptions=True)

    assert {type(error) for error in asyncio.run(cancelled())} == {openai.APITimeoutError}
    toy.gate.set()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        assert complete(client).choices[0].text == "abcde"
    deadline = time.monotonic() + PATIENCE
    while server.state.active:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # None of them was decoded to its end.
    assert server.schedulers["toy"].stats.calls < 50


def test_a_shutdown_finishes_what_runs_and_ends_in_time(pair: Orchestrator) -> None:
    toy = toy_of(pair)
    assert isinstance(toy, Gated)
    with http_server({"toy": pair}, drain=PATIENCE) as server:
        toy.gate.clear()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
            found: list[Any] = []
            running = threading.Thread(target=lambda: found.append(complete(client)))
            running.start()
            assert toy.reached.wait(PATIENCE)
            server.terminate()
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                complete(client)
            toy.gate.set()
            running.join(PATIENCE)
            assert found[0].choices[0].text == "abcde"
        server.thread.join(10)
        assert not server.thread.is_alive()
