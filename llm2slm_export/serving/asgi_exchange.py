"""One HTTP request to an ASGI application in another process, and its response: what is sent between the two."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope


@dataclass(frozen=True)
class HttpRequest:
    """A request with its whole body. It can be pickled.

    Args:
        method, path, query: of the request's first line.
        headers: names and values.
        body: the body.
    """

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""

    @property
    def scope(self) -> Scope:
        """The ASGI scope of the request."""
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
            "method": self.method, "path": self.path, "raw_path": self.path.encode(), "root_path": "",
            "query_string": self.query, "headers": list(self.headers), "client": None, "server": None,
        }  # fmt: skip


@dataclass(frozen=True)
class HttpResponse:
    """A whole response. It can be pickled.

    Args:
        status: the HTTP status.
        headers: names and values.
        body: the body.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


async def exchange(app: ASGIApp, request: HttpRequest) -> AsyncGenerator[list[Message]]:
    """The messages of the response, as they come: all that have come meanwhile. Closing this cancels the request."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    body: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        # The end of the client is a cancellation.
        return body.pop() if body else await asyncio.get_running_loop().create_future()

    task = asyncio.ensure_future(app(request.scope, receive, sent.put))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            messages = [message]
            while not sent.empty() and (more := sent.get_nowait()) is not None:
                messages.append(more)
            yield messages
            if task.done() and sent.empty():
                break
        await task
    finally:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def response_of(app: ASGIApp, request: HttpRequest) -> HttpResponse:
    """The whole response of an application."""
    status, headers, body = 500, tuple[tuple[bytes, bytes], ...](), bytearray()
    async for messages in exchange(app, request):
        for message in messages:
            if message["type"] == "http.response.start":
                status, headers = message["status"], tuple(message["headers"])
            elif message["type"] == "http.response.body":
                body += message.get("body", b"")
    return HttpResponse(status, headers, bytes(body))
