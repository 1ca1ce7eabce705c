"""A request that a scheduler runs, and the events by which its caller follows it."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from llm2slm_export.errors import Llm2SlmError
from llm2slm_export.inference.encodings.host_encoding import HostEncoding
from llm2slm_export.inference.outputs import Generation, Step


@dataclass(frozen=True)
class NewToken:
    """One token of a response.

    Args:
        sequence: index among the responses to the prompt (`num_return_sequences`).
    """

    sequence: int
    step: Step


@dataclass(frozen=True)
class Finished:
    """The last event of a submission.

    Args:
        generations: the responses. With an error they may be incomplete: what was generated before it.
        error: why they are incomplete; None: they are complete.
        encoding: the prompt's encoding, if the request was for that.
    """

    generations: tuple[Generation, ...]
    error: Llm2SlmError | None = None
    encoding: HostEncoding | None = None


Event = NewToken | Finished


class Submission:
    """A request of a scheduler. Its events are consumed once: by one loop, `for` or `async for`, by `result` or by `listen`."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._arrived = threading.Condition()
        self._wake: Callable[[], None] | None = None  # of an asynchronous consumer
        self._listener: Callable[[Event], None] | None = None
        self._cancelled = False

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Cancel the request: its rows leave before the next decoder call. Without effect on a finished one."""
        self._cancelled = True

    def put(self, event: Event) -> None:
        """Append an event, from the scheduler's thread."""
        with self._arrived:
            if self._listener is not None:
                self._listener(event)
                return
            self._events.append(event)
            self._arrived.notify()
            wake = self._wake
        if wake is not None:
            wake()

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with each event: with those that have arrived now, and with later ones on the scheduler's thread.

        It must return at once. What it raises ends the scheduler.
        """
        with self._arrived:
            while self._events:
                listener(self._events.popleft())
            self._listener = listener

    def __iter__(self) -> Iterator[Event]:
        """The events, as they arrive. Leaving the loop early cancels the request."""
        try:
            while True:
                with self._arrived:
                    while not self._events:
                        self._arrived.wait()
                    event = self._events.popleft()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The events, as they arrive. Leaving the loop early, or a cancelled task, cancels the request."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # The loop may have been closed while the request was running.
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.set)

        self._wake = wake
        try:
            while True:
                arrived.clear()
                while self._events:
                    event = self._events.popleft()
                    yield event
                    if isinstance(event, Finished):
                        return
                await arrived.wait()
        finally:
            self.cancel()

    def result(self) -> tuple[Generation, ...]:
        """Wait for the complete responses.

        Raises:
            Llm2SlmError: that of `Finished`.
        """
        for event in self:
            if isinstance(event, Finished):
                if event.error is not None:
                    raise event.error
                return event.generations
        raise AssertionError("the last event is `Finished`")

    async def result_async(self) -> tuple[Generation, ...]:
        """As `result`, without blocking the event loop."""
        async for event in self:
            if isinstance(event, Finished):
                if event.error is not None:
                    raise event.error
                return event.generations
        raise AssertionError("the last event is `Finished`")
