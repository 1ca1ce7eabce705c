"""Events from threads to an event loop."""

import asyncio
import threading

import pytest

from llm2slm_export.serving.mailboxes import Mailbox, Mailboxes


def test_every_event_arrives_in_its_mailbox_and_in_order() -> None:
    async def consume() -> list[list[int]]:
        mailboxes = Mailboxes[int]()
        opened = [mailboxes.open() for _ in range(3)]

        def produce() -> None:
            for number in range(3000):
                mailboxes.put(opened[number % 3], number)

        async def all_of(mailbox_index: int) -> list[int]:
            found: list[int] = []
            while len(found) < 1000:
                found += await opened[mailbox_index].take(10)
            return found

        thread = threading.Thread(target=produce)
        thread.start()
        found = await asyncio.gather(*map(all_of, range(3)))
        thread.join()
        return found

    assert asyncio.run(consume()) == [list(range(first, 3000, 3)) for first in range(3)]


def test_a_loop_is_woken_once_for_what_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wakes() -> tuple[int, list[int]]:
        mailboxes, count = Mailboxes[int](), 0
        mailbox, loop = mailboxes.open(), asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(*arguments: object) -> object:
            nonlocal count
            count += 1
            return wake(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        for number in range(5):
            mailboxes.put(mailbox, number)
        return count, await mailbox.take(10)

    assert asyncio.run(wakes()) == (1, [0, 1, 2, 3, 4])


def test_silence_is_an_empty_list() -> None:
    async def take() -> list[int]:
        return await Mailboxes[int]().open().take(0.01)

    assert asyncio.run(take()) == []


def test_a_closed_loop_is_no_error() -> None:
    async def opened() -> tuple[Mailboxes[int], Mailbox[int]]:
        mailboxes = Mailboxes[int]()
        return mailboxes, mailboxes.open()

    mailboxes, mailbox = asyncio.run(opened())
    mailboxes.put(mailbox, 1)
