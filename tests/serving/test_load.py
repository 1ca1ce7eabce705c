"""Many requests at once over HTTP: everyone gets what it gets alone, also beside clients that leave."""

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

import llm2slm_export
from llm2slm_export.inference.outputs import Generation
from tests.support.gated_toy import PATIENCE
from tests.support.http_server import http_server
from tests.support.mixed_requests import mixed_requests
from tests.support.tiers import tiered

AT_ONCE = 32
LEAVES = 8  # one client of so many leaves after its first token


def http_body(prompt: str, options: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    """A completion's body for transformers' options."""
    renamed = {"max_new_tokens": "max_tokens", "num_return_sequences": "n"}
    body = {renamed.get(name, name): value for name, value in options.items() if name != "output_scores"}
    logprobs = {"logprobs": 0} if options.get("output_scores") else {}
    return {"model": "tiny", "prompt": prompt, "stream": stream, **body, **logprobs}


def known(generations: Sequence[Generation]) -> list[tuple[str, str]]:
    """What a response over HTTP has of responses."""
    return [(generation.text, generation.finish_reason) for generation in generations]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> list[tuple[str, str]]:
    """The texts and finish reasons of a request's responses, in order."""
    if not body["stream"]:
        found = await client.post("/v1/completions", json=body)
        assert found.status_code == 200, found.text
        return [(choice["text"], choice["finish_reason"]) for choice in found.json()["choices"]]
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    for choice in itertools.chain.from_iterable(json.loads(event)["choices"] for event in events[:-1]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"] is not None:
            assert choice["index"] not in reasons
            reasons[choice["index"]] = choice["finish_reason"]
    return [(texts[index], reasons[index]) for index in sorted(texts)]


async def leave(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """Close the connection after the first event."""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line:
                return


@pytest.mark.parametrize(
    ("slm", "count"), tiered([("t5", 60), ("t5", 500), ("llama", 500)], fast=[("t5", 60)]),
)  # fmt: skip
def test_requests_at_random_times_get_what_they_get_alone(
    slm: str, count: int, bundles: Callable[..., tuple[Path, Path]]
) -> None:
    requests, chance = mixed_requests(count), random.Random(3)

    async def ask_all(url: str) -> list[list[tuple[str, str]] | None]:
        places = asyncio.Semaphore(AT_ONCE)
        limits = httpx.Limits(max_connections=AT_ONCE)

        async def one(number: int, delay: float) -> list[tuple[str, str]] | None:
            prompt, options = requests[number]
            streams = "num_beams" not in options and number % 4 != 3
            async with places:
                await asyncio.sleep(delay)
                if streams and number % LEAVES == 0:
                    await leave(client, http_body(prompt, {**options, "max_new_tokens": 24}, stream=True))
                    return None
                return await ask(client, http_body(prompt, options, stream=streams))

        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
            delays = [chance.choice([0, 0, 0.002, 0.01]) for _ in requests]
            return await asyncio.gather(*(one(number, delay) for number, delay in enumerate(delays)))

    with llm2slm_export.load(bundles(slm)[1], threads=1) as pair:
        expected = [known(pair.generate([prompt], **options)) for prompt, options in requests]
        with http_server({"tiny": pair}, max_rows=12, max_waiting=count, max_prefill_tokens=40) as server:
            found = asyncio.run(ask_all(server.url))
            scheduler = server.schedulers["tiny"]
            scheduler.close(drain=PATIENCE)
            stats = scheduler.stats
            assert server.state.active == 0
    assert sum(one is None for one in found) > count // 20
    for own, alone in zip(found, expected, strict=True):
        assert own in (None, alone)
    assert stats.submitted == sum(stats.outcomes.values()) == count
    assert (stats.rows, stats.outcomes.get("failed", 0)) == (0, 0)
