"""The front of the application on Ray, with handles of this process: what is asked for once more, and what the client sees."""

import asyncio
import warnings
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from llm2slm_export.serving.asgi_exchange import HttpRequest, exchange, response_of
from llm2slm_export.serving.ray_options import ray_options

with warnings.catch_warnings():
    # Ray uses what newer releases of its dependencies deprecate.
    warnings.simplefilter("ignore")
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.serve.exceptions import BackPressureError

    from llm2slm_export.serving.ray_app import Front, ReaderTransport

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
LOST = ActorDiedError()


def body(data: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Handle:
    """A deployment whose attempts send what they are told, or raise it."""

    def __init__(self, *attempts: Sequence[Any]) -> None:
        self.attempts, self.requests, self.cancelled = list(attempts), list[HttpRequest](), 0

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, request: HttpRequest) -> "Found":
        self.requests.append(request)
        return Found(self, self.attempts.pop(0))


class Found:
    def __init__(self, handle: Handle, steps: Sequence[Any]) -> None:
        self._handle, self._steps = handle, steps

    async def __aiter__(self) -> AsyncIterator[Any]:
        for step in self._steps:
            if isinstance(step, Exception):
                raise step
            if step is None:
                await asyncio.sleep(60)
            yield [step]

    def __await__(self) -> Any:
        (step,) = self._steps
        if isinstance(step, Exception):
            raise step
        yield from asyncio.sleep(0).__await__()
        return step

    def cancel(self) -> None:
        self._handle.cancelled += 1


def answer(writer: Handle, path: str = "/v1/completions", *, reader: Handle | None = None, **arguments: Any) -> Any:
    front = Front(ray_options({"bundle": "/models/demo", **arguments}), writer, reader or Handle())

    async def asked() -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await (await front(None))(scope, receive, send)  # type: ignore[arg-type]

        return await response_of(app, HttpRequest("POST", path, body=b"{}"))

    return asyncio.run(asked())


WHOLE = [START, body(b"whole", False)]
STREAM = [START, body(b"data: 1\n\n", True), body(b"data: [DONE]\n\n", True), body(b"", False)]


@pytest.mark.parametrize("lost", [[LOST], [START, LOST], [START, body(b"", True), LOST]])
def test_a_response_that_has_not_begun_is_asked_for_once_more(lost: list[Any]) -> None:
    for good, text in ((WHOLE, b"whole"), (STREAM, b"data: 1\n\ndata: [DONE]\n\n")):
        writer = Handle(lost, lost, good)
        found = answer(writer)
        assert (found.status, found.body, found.headers) == (200, text, tuple(START["headers"]))  # type: ignore[arg-type]
        assert len(writer.requests) == 3
        assert writer.requests[0] == writer.requests[2]


def test_a_request_that_loses_every_replica_ends() -> None:
    writer = Handle([LOST], [LOST], [LOST], WHOLE)
    found = answer(writer)
    assert (found.status, len(writer.requests)) == (503, 3)
    assert b'"code":"replica_lost"' in found.body


def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    writer = Handle([START, body(b"data: 1\n\n", True), LOST], WHOLE)
    found = answer(writer)
    assert (found.status, len(writer.requests)) == (200, 1)
    assert found.body.startswith(b"data: 1\n\ndata: {")
    assert b'"code":"replica_failed"' in found.body
    assert answer(Handle([*WHOLE, LOST])).body == b"whole"  # nothing is missing


def test_errors_of_the_replica_and_of_its_queue() -> None:
    failed = answer(Handle([RayTaskError("stream", "Traceback: secret", ValueError("x"))]))
    assert (failed.status, b"secret" in failed.body) == (500, False)
    busy = answer(Handle([BackPressureError(1, 1)]))
    assert (busy.status, dict(busy.headers)[b"retry-after"]) == (429, b"1")
    assert answer(Handle(), "/metrics").status == 404
    assert answer(Handle(), "/live").status == 200
    assert answer(Handle(), "/v1/encodings", reader=Handle(WHOLE)).body == b"whole"


def test_keys_are_checked_below_a_prefix(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret")
    front = Front(ray_options({"bundle": "/b", "api_key_file": str(tmp_path / "keys")}), writer := Handle(), Handle())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (await front(None))({**scope, "root_path": "/llm"}, receive, send)  # type: ignore[arg-type]

    found = asyncio.run(response_of(app, HttpRequest("POST", "/llm/v1/completions", body=b"{}")))
    assert (found.status, writer.requests) == (401, [])


def test_a_client_that_leaves_cancels_its_request() -> None:
    writer = Handle([START, None])
    front = Front(ray_options({"bundle": "/models/demo"}), writer, Handle())

    async def left() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await (await front(None))(scope, receive, send)  # type: ignore[arg-type]

        messages = exchange(app, HttpRequest("POST", "/v1/completions", body=b"{}"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(messages), 0.1)

    asyncio.run(left())
    assert writer.cancelled == 1


def test_a_lost_reader_is_a_lost_connection() -> None:
    async def read(step: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=ReaderTransport(Handle([step]))) as client:
            return await client.post("http://reader/v1/encodings", json={})

    with pytest.raises(httpx.ReadError):
        asyncio.run(read(LOST))
    with pytest.raises(httpx.RequestError, match="the replica raised ValueError"):
        asyncio.run(read(RayTaskError("stream", "Traceback", ValueError("x"))))
