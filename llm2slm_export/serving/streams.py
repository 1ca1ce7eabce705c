"""Responses that are streamed, and the end of a request whose client has gone."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

_Result = TypeVar("_Result")


class ClientGoneError(Exception):
    """The client has closed the connection."""


class EventStream(StreamingResponse):
    """A stream of server-sent events.

    Args:
        events: the events.
        on_end: called once when the response has ended, however it did.
    """

    def __init__(self, events: AsyncGenerator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. A client that goes may leave the generator unfinished, or not even begun."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
            await self._events.aclose()


async def unless_gone(http: Request, work: Awaitable[_Result]) -> _Result:
    """The result of `work`, which is cancelled if the client closes the connection.

    Raises:
        ClientGoneError: the client has closed the connection.
    """

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
