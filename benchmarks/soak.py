"""A server under load for hours, with faults: whether its texts stay those of a prompt alone, and whether it grows.

First each prompt is asked alone, which gives the expected texts, and then by many clients at once, which gives the capacity. Then
requests arrive at random (Poisson) at a share of the capacity. Most are completions and chats, whole and streamed, whose texts are
compared. The others are faults: clients that reset the connection in a stream, leave before the response, read slowly, send half a
body, malformed bodies or no HTTP at all, and requests that are too late. Memory, threads, file descriptors and counts are sampled.

It ends with 1 if a request had an outcome that its kind must not have, if a text differs (of a bundle at fp32: int8 promises none),
if the server's counts do not add up, or if memory, threads or file descriptors grew. Memory grew if its median in the last quarter of
the time is above that in the second by 5 % and 16 MB; threads and descriptors, if there are 4 more of them at rest.

Usage: python benchmarks/soak.py BUNDLE [--seconds 3600] [--load 0.7] [--faults 0.3] [--threads N] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from llm2slm_export.bundle.manifest_file import read_manifest
from llm2slm_export.environment.hardware import processor

HELD_OUT = Path(__file__).parent.parent / "tests/data/held_out.tsv"
PATIENCE = 120.0  # seconds of a request
CLIENTS = 16  # that ask at once when the capacity is measured
WARM_UP = 5.0  # seconds at that load, and seconds in which the capacity is measured
MEMORY_SHARE, MEMORY_BYTES, COUNT = 0.05, 16 << 20, 4  # growth that is none
MALFORMED = (
    b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b'{"model": "model", "prompt": 3}', b'{"model": "none", "prompt": "a"}',
    b'{"model": "model", "prompt": "a", "nonsense": 1}', b"[" * 20_000, b'{"model": "model", "prompt": "' + b"a" * 2_000_000 + b'"}',
)  # fmt: skip


@dataclass
class Sample:
    """The server at one time."""

    seconds: float
    memory_bytes: int
    threads: int
    descriptors: int
    waiting: int
    running: int
    requests: int
    outcomes: dict[str, int] = field(default_factory=dict)


class Server:
    """A server process.

    Args:
        port: where it listens.
        process: the process.
    """

    def __init__(self, port: int, process: subprocess.Popen[str]) -> None:
        self.port, self._process = port, process

    async def metrics(self) -> dict[str, float]:
        """The server's metrics."""
        _, text = await request(self.port, None, route="/metrics")
        return {name: float(value) for name, value in re.findall(r"^(llm2slm_[^ ]+) (\S+)$", text, re.MULTILINE)}

    async def sample(self, seconds: float) -> Sample:
        """The server now."""
        found, proc = await self.metrics(), Path(f"/proc/{self._process.pid}")
        status = dict(re.findall(r"^(\w+):\s+(\d+)", (proc / "status").read_text(encoding="utf-8"), re.MULTILINE))
        outcomes = {
            outcome: int(value)
            for name, value in found.items()
            for outcome in re.findall(r'finished_total\{.*outcome="(\w+)"', name)
        }
        return Sample(
            round(seconds, 1), int(status["VmRSS"]) * 1024, int(status["Threads"]), len(list((proc / "fd").iterdir())),
            *(int(found[f'llm2slm_{name}{{bundle="model"}}']) for name in ("num_requests_waiting", "num_requests_running", "requests_submitted_total")),
            outcomes,
        )  # fmt: skip

    async def rest(self) -> Sample:
        """The server when it has nothing to do, and connections that were kept are closed."""
        until = time.monotonic() + PATIENCE
        while True:
            found = await self.sample(0)
            if not found.waiting + found.running or time.monotonic() > until:
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(7)
        return await self.sample(0)


@contextmanager
def server(bundle: Path, threads: int | None) -> Iterator[Server]:
    """A server process, which ends with it."""
    command = [
        sys.executable,
        "-m",
        "llm2slm_export",
        "serve",
        f"model={bundle}",
        "--port",
        "0",
        "--max-waiting",
        "1024",
    ]
    command += [] if threads is None else ["--threads", str(threads)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            port = next(int(m[1]) for line in process.stderr if (m := re.search(r"^serving .*:(\d+)$", line)))
            # The log of requests must be read, or the server would wait for it.
            sink = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
            yield Server(port, process)
        finally:
            process.terminate()
    sink.wait()


def head(route: str, length: int, method: str = "POST") -> bytes:
    """A request's head."""
    return (
        f"{method} {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


async def request(
    port: int,
    body: Any,
    *,
    route: str = "/v1/completions",
    pause: float = 0.0,
    leave: Callable[[bytes], bool] | None = None,
) -> tuple[int, str]:
    """One request on a connection of its own: status and body, 0 if the client left or the server closed without a response.

    Args:
        body: JSON or bytes; None: a GET.
        pause: seconds between two reads of at most 256 bytes, on a socket with a small buffer; 0: as fast as it comes.
        leave: whether the client resets the connection, given what has arrived.
    """
    connection = socket.socket()
    if pause:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024 if pause else 1 << 16)
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    received = bytearray()
    try:
        writer.write(head(route, len(content), "GET" if body is None else "POST") + content)
        while part := await reader.read(256 if pause else 1 << 16):
            received += part
            if leave is not None and leave(bytes(received)):
                # With unread data a close is a reset.
                writer.transport.abort()
                return 0, ""
            await asyncio.sleep(pause)
    except (ConnectionError, BrokenPipeError):
        if not received:
            return 0, ""
    finally:
        writer.close()
    top, _, rest = bytes(received).partition(b"\r\n\r\n")
    if b"chunked" in top.lower():
        rest = b"".join(dechunked(rest))
    return int(top.split(b" ", 2)[1]) if top else 0, rest.decode()


def dechunked(content: bytes) -> Iterator[bytes]:
    """The parts of a chunked body."""
    while content:
        size, _, content = content.partition(b"\r\n")
        length = int(size or b"0", 16)
        yield content[:length]
        content = content[length + 2 :]


def text_of(answer: str, *, chat: bool, stream: bool) -> str:
    """The text of a response; of a stream that has no end, nothing."""
    if not stream:
        (choice,) = json.loads(answer)["choices"]
        return str(choice["message"]["content"] if chat else choice["text"])
    lines = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    if not lines or lines[-1] != "[DONE]":
        return "(the stream has no end)"
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content", "") if chat else choice["text"] for choice in choices)


class Clients:
    """Clients of all kinds, and the count of their outcomes.

    Args:
        port: the server's.
        expected: the texts by prompt.
        most: maximum number of new tokens.
        seed: of the choice of kinds and prompts.
    """

    FAULTS = ("reset", "leave", "slow", "half body", "malformed", "no HTTP", "late")

    def __init__(self, port: int, expected: dict[str, str], most: int, seed: int) -> None:
        self._port, self._expected, self._most, self._random = port, expected, most, random.Random(seed)
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        self.differing: list[dict[str, str]] = []

    async def one(self, kind: str) -> None:
        """One request of a kind, counted."""
        prompt = self._random.choice(list(self._expected))
        verb: Callable[[str], Awaitable[str]] = getattr(self, "_" + kind.replace(" ", "_").lower())
        try:
            async with asyncio.timeout(PATIENCE):
                outcome = await verb(prompt)
        except TimeoutError:
            outcome = "bad: no response in time"
        except (OSError, ValueError, KeyError) as error:
            outcome = f"bad: {type(error).__name__}: {error}"
        self.outcomes[kind, outcome] += 1
        if outcome.startswith("bad"):
            self.problems.append(f"{kind}: {outcome}")

    def kind(self, faults: float) -> str:
        """The kind of the next request; `faults` is the share of those that are none of the usual ones."""
        return self._random.choice(self.FAULTS) if self._random.random() < faults else "usual"

    def _body(self, prompt: str, **more: Any) -> dict[str, Any]:
        return {
            "model": "model",
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": self._most,
            "truncate": True,
            **more,
        }

    async def _asked(self, prompt: str, *, stream: bool, chat: bool, pause: float = 0.0) -> str:
        body, route = self._body(prompt, stream=stream), "/v1/completions"
        if chat:
            del body["prompt"]
            body, route = {**body, "messages": [{"role": "user", "content": prompt}]}, "/v1/chat/completions"
        status, answer = await request(self._port, body, route=route, pause=pause)
        if status == 429:
            return "429"
        if status != 200:
            return f"bad: status {status}"
        found = text_of(answer, chat=chat, stream=stream)
        if found != self._expected[prompt]:
            self.differing.append({"prompt": prompt, "alone": self._expected[prompt], "found": found})
            return "another text"
        return "same text"

    async def _usual(self, prompt: str) -> str:
        return await self._asked(prompt, stream=self._random.random() < 0.5, chat=self._random.random() < 0.5)

    async def _slow(self, prompt: str) -> str:
        return await self._asked(prompt, stream=True, chat=True, pause=0.02)

    async def _reset(self, prompt: str) -> str:
        events = self._random.randint(1, 6)
        status, _ = await request(
            self._port, self._body(prompt, stream=True, min_new_tokens=self._most), leave=lambda found: found.count(b"data: ") >= events
        )  # fmt: skip
        return "left" if status == 0 else "ended before" if status == 200 else f"bad: status {status}"

    async def _leave(self, prompt: str) -> str:
        content = json.dumps(self._body(prompt, min_new_tokens=self._most)).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(head("/v1/completions", len(content)) + content)
        await writer.drain()
        await asyncio.sleep(self._random.uniform(0, 0.05))
        writer.transport.abort()
        return "left"

    async def _half_body(self, prompt: str) -> str:
        content = json.dumps(self._body(prompt)).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(head("/v1/completions", len(content)) + content[: len(content) // 2])
        await writer.drain()
        await asyncio.sleep(self._random.uniform(0, 0.5))
        writer.close()
        return "left"

    async def _malformed(self, prompt: str) -> str:
        del prompt
        status, answer = await request(self._port, self._random.choice(MALFORMED))
        if status not in (400, 404, 413) or "error" not in json.loads(answer):
            return f"bad: status {status}"
        return f"status {status}"

    async def _no_http(self, prompt: str) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(os.urandom(64) + prompt.encode() + b"\r\n\r\n")
        found = await reader.read(100)
        writer.close()
        return "refused" if not found or b" 400 " in found else f"bad: {found!r}"

    async def _late(self, prompt: str) -> str:
        status, _ = await request(self._port, self._body(prompt, timeout=0.001))
        return f"status {status}" if status in (504, 429) else f"bad: status {status}"


async def alone(port: int, prompts: list[str], most: int) -> dict[str, str]:
    """The texts of prompts, one request at a time."""
    found = {}
    for prompt in prompts:
        body = {"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": most, "truncate": True}
        status, answer = await request(port, body)
        if status != 200:
            raise SystemExit(f"the server answered {status}: {answer}")
        found[prompt] = text_of(answer, chat=False, stream=False)
    return found


async def capacity(clients: Clients) -> float:
    """Usual requests per second of clients that ask again at once."""
    finished = 0

    async def client(until: float) -> None:
        nonlocal finished
        while time.perf_counter() < until:
            await clients.one("usual")
            finished += 1

    for _ in range(2):
        finished, begin = 0, time.perf_counter()
        await asyncio.gather(*(client(begin + WARM_UP) for _ in range(CLIENTS)))
        taken = time.perf_counter() - begin
    return finished / taken


async def soak(running: Server, given: argparse.Namespace, prompts: list[str]) -> dict[str, Any]:
    """The run, as a report."""
    expected = await alone(running.port, prompts, given.max_new_tokens)
    clients = Clients(running.port, expected, given.max_new_tokens, given.seed)
    rate = given.load * await capacity(clients)
    # Every kind has been there before the start.
    await asyncio.gather(*(clients.one(kind) for kind in Clients.FAULTS * 4))
    start, arrivals = await running.rest(), random.Random(given.seed)
    samples: list[Sample] = []
    begin = time.perf_counter()

    async def watch() -> None:
        while True:
            samples.append(await running.sample(time.perf_counter() - begin))
            print(samples[-1], file=sys.stderr, flush=True)
            await asyncio.sleep(max(1.0, given.seconds / 120))

    watching, tasks = asyncio.create_task(watch()), set[asyncio.Task[None]]()
    due = begin
    while (due := due + arrivals.expovariate(rate)) < begin + given.seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(clients.one(clients.kind(given.faults)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if watching.done():
            watching.result()
    watching.cancel()
    await asyncio.gather(*tasks)
    return {
        "requests_per_second": rate, "start": asdict(start), "end": asdict(await running.rest()),
        "samples": [asdict(sample) for sample in samples], "differing": clients.differing[:20],
        "outcomes": {f"{kind}: {outcome}": number for (kind, outcome), number in sorted(clients.outcomes.items())},
        "problems": clients.problems,
    }  # fmt: skip


def faults(report: dict[str, Any], *, is_exact: bool) -> list[str]:
    """What must not be.

    Args:
        is_exact: whether a text must be that of its prompt alone.
    """
    start, end, found = report["start"], report["end"], [f"{text}" for text in report["problems"][:20]]
    if is_exact and (number := len(report["differing"])):
        found.append(f"{number} or more texts differ from those of the prompts alone")
    if end["requests"] != sum(end["outcomes"].values()) or end["waiting"] or end["running"]:
        found.append(f"the counts do not add up: {end}")
    if end["outcomes"].get("failed"):
        found.append(f"{end['outcomes']['failed']} requests failed")
    found += [
        f"{name} grew from {start[name]} to {end[name]}"
        for name in ("threads", "descriptors")
        if end[name] > start[name] + COUNT
    ]
    memory = [sample["memory_bytes"] for sample in report["samples"]]
    quarter = len(memory) // 4
    if quarter:
        before, after = median(memory[quarter : 2 * quarter]), median(memory[-quarter:])
        if after > max(before * (1 + MEMORY_SHARE), before + MEMORY_BYTES):
            found.append(f"memory grew from {before / 1e6:.0f} MB to {after / 1e6:.0f} MB")
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [
        f"{report['processor']}, {report['cpus']} CPUs, {report['date']}, onnxruntime {report['onnxruntime']}, llm2slm-export "
        f"{report['llm2slm_export']}. {report['bundle']} ({report['precision']}), {report['seconds']:g} s at {report['load']:.0%} of the "
        f"capacity, {report['requests_per_second']:.1f} requests/s, of which {report['faults']:.0%} are faults.",
        "",
        "| time, s | memory, MB | threads | descriptors | waiting | running | requests |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    samples = report["samples"]
    rows = [
        ("at rest", report["start"]),
        *((f"{one['seconds']:.0f}", one) for one in samples[:: max(1, len(samples) // 12)]),
    ]
    for name, one in [*rows, ("at rest", report["end"])]:
        lines.append(
            f"| {name} | {one['memory_bytes'] / 1e6:.0f} | {one['threads']} | {one['descriptors']} | {one['waiting']} | {one['running']} | {one['requests']} |"
        )
    lines += ["", "| client: outcome | number |", "|---|---|"]
    lines += [f"| {name} | {number} |" for name, number in report["outcomes"].items()]
    lines += [f"| the server: {name} | {number} |" for name, number in report["end"]["outcomes"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=HELD_OUT, help="prompts: the first column of a .tsv file")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--load", type=float, default=0.7, help="share of the capacity")
    parser.add_argument("--faults", type=float, default=0.3, help="share of the requests")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the samples and counts there")
    given = parser.parse_args()
    lines = [line.split("\t")[0] for line in given.data.read_text(encoding="utf-8").splitlines() if line]
    graphs = read_manifest(given.bundle).graphs
    with server(given.bundle, given.threads) as running:
        report = asyncio.run(soak(running, given, list(dict.fromkeys(lines))[: given.prompts]))
    report |= {
        "date": datetime.now(UTC).date().isoformat(), "processor": processor(), "cpus": os.cpu_count(),
        "onnxruntime": version("onnxruntime"), "llm2slm_export": version("llm2slm-export"), "bundle": given.bundle.name,
        "precision": ", ".join(f"{name} {graph.precision}" for name, graph in graphs.items()),
        "seconds": given.seconds, "load": given.load, "faults": given.faults,
    }  # fmt: skip
    print(markdown(report))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    wrong = faults(report, is_exact=all(graph.precision == "fp32" for graph in graphs.values()))
    for text in wrong:
        print(f"- {text}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
