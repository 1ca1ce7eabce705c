"""Events of schedulers' threads, brought to the consumers on an event loop."""

import asyncio
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

_Event = TypeVar("_Event")


class Mailbox(Generic[_Event]):
    """The events of one consumer, on its event loop."""

    def __init__(self) -> None:
        self._events: list[_Event] = []
        self._waiter: asyncio.Future[None] | None = None

    async def take(self, patience: float) -> list[_Event]:
        """All events that have arrived; waits for the first one. Empty: none has arrived for `patience` seconds."""
        if not self._events:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(patience, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        events, self._events = self._events, []
        return events

    def _put(self, event: _Event) -> None:
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Mailboxes(Generic[_Event]):
    """The mailboxes of an event loop. The loop is woken once for all events that have arrived meanwhile."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[Mailbox[_Event], _Event]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_woken = False

    def open(self) -> Mailbox[_Event]:
        """A mailbox on the running loop, which is the same for all of them."""
        self._loop = asyncio.get_running_loop()
        return Mailbox()

    def put(self, mailbox: Mailbox[_Event], event: _Event) -> None:
        """Bring an event to its mailbox, from any thread."""
        self._arrived.append((mailbox, event))
        if not self._is_woken:
            assert self._loop is not None, "the mailbox was opened on it"
            self._is_woken = True
            # The loop may have been closed while a request was running.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before the events are taken: one that arrives meanwhile wakes the loop again.
        self._is_woken = False
        while self._arrived:
            mailbox, event = self._arrived.popleft()
            mailbox._put(event)
