"""The events of a request's prompts as they arrive, and the end of a request whose client has gone."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request

from llm2slm_export.inference.submission import Event, Submission

_Result = TypeVar("_Result")


class ClientGoneError(Exception):
    """The client has closed the connection."""


async def merged(submissions: Sequence[Submission]) -> AsyncIterator[tuple[int, Event]]:
    """The events of several submissions, each with its submission's index. Leaving the loop early cancels them."""
    queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

    async def pump(index: int, submission: Submission) -> None:
        async for event in submission:
            queue.put_nowait((index, event))
        queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(index, submission)) for index, submission in enumerate(submissions)]
    open_streams = len(tasks)
    try:
        while open_streams:
            item = await queue.get()
            if item is None:
                open_streams -= 1
            else:
                yield item
    finally:
        for submission in submissions:
            submission.cancel()
        for task in tasks:
            task.cancel()


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
