"""Throughput and latency of `llm2slm-export serve`, beside one request after another with `generate`, and beside other servers.

A server process answers streams from one client process: at each load so many clients ask one prompt after another until the time
is over. In every round each server has its turn at each load, and `generate` answers prompts alone, one at a time. Reported are
medians over the rounds: new tokens per second, the ratio to `generate`, and percentiles of the time to the first token and between
two tokens. Servers are warmed up at each load, uncounted. All responses are greedy.

A peer is a command that serves a model named `model` with OpenAI's protocol, with {port} where its port belongs. The peers' README has
a server for CTranslate2 and transformers.

Usage: python benchmarks/serving.py BUNDLE [--data FILE] [--clients 1 4 16 64] [--seconds 8] [--rounds 3] [--json FILE]
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import llm2slm_export
from llm2slm_export.environment.hardware import processor

HELD_OUT = Path(__file__).parent.parent / "tests/data/held_out.tsv"
WARM_UP = 1.0  # seconds at each load, uncounted
PERCENTILES = (50, 90, 99)


@dataclass
class Load:
    """What clients saw.

    `first_ms`, `gap_ms`: of each response, and between two chunks of text. A token that releases no text has no chunk.
    """

    tokens: int = 0
    responses: int = 0
    seconds: float = 0.0
    first_ms: list[float] = field(default_factory=list)
    gap_ms: list[float] = field(default_factory=list)


@contextmanager
def server(bundle: Path, threads: int, rows: int) -> Iterator[int]:
    """A server's port."""
    command = [
        sys.executable, "-m", "llm2slm_export", "serve", f"model={bundle}", "--port", "0", "--threads", str(threads),
        "--max-rows", str(rows), "--max-waiting", "256",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            port = next(int(m[1]) for line in process.stderr if (m := re.search(r"^serving .*:(\d+)$", line)))
            # The log of requests must be read, or the server would wait for it.
            sink = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
            yield port
        finally:
            process.terminate()
    sink.wait()


@contextmanager
def peer_server(command: str) -> Iterator[int]:
    """A peer's port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen(shlex.split(command.format(port=port)), stdout=subprocess.DEVNULL) as process:
        try:
            while True:
                if process.poll() is not None:
                    raise SystemExit(f"{command} ended with {process.returncode}")
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()


async def client(port: int, prompts: Iterator[str], until: float, load: Load, request: Mapping[str, Any]) -> None:
    """Ask one prompt after another until the time is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        body = json.dumps({**request, "prompt": next(prompts)})
        last = time.perf_counter()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body.encode())}\r\n\r\n"
        writer.write((head + body).encode())
        first = True
        while (line := await reader.readline()) != b"data: [DONE]\n":
            if not line.startswith(b"data: "):
                if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                    raise SystemExit(f"the server answered {line!r}")
                continue
            if b'"usage":{' in line:
                load.tokens += json.loads(line[6:])["usage"]["completion_tokens"]
            if b'"finish_reason":null' not in line:
                continue
            now = time.perf_counter()
            (load.first_ms if first else load.gap_ms).append((now - last) * 1e3)
            first, last = False, now
        # The rest of the chunked body.
        while (await reader.readline()) != b"0\r\n":
            pass
        await reader.readline()
        load.responses += 1
    writer.close()


async def measured(port: int, clients: int, prompts: Sequence[str], seconds: float, request: Mapping[str, Any]) -> Load:
    """What so many clients saw."""
    load, cycle = Load(), itertools.cycle(prompts)
    begin = time.perf_counter()
    await asyncio.gather(*(client(port, cycle, begin + seconds, load, request) for _ in range(clients)))
    load.seconds = time.perf_counter() - begin
    return load


def sequential(bundle: Path, prompts: Sequence[str], threads: int, seconds: float, options: Mapping[str, Any]) -> float:
    """New tokens per second of `generate`, one prompt at a time."""
    with llm2slm_export.load(bundle, threads=threads) as pair:
        tokens, cycle = 0, itertools.cycle(prompts)
        for _ in range(8):
            pair.generate([next(cycle)], **options)
        begin = time.perf_counter()
        while time.perf_counter() < begin + seconds:
            (found,) = pair.generate([next(cycle)], **options)
            tokens += found.new_tokens
        return tokens / (time.perf_counter() - begin)


def figures(loads: Sequence[Load], alone: Sequence[float]) -> dict[str, Any]:
    """The figures of one number of clients."""
    rates = [load.tokens / load.seconds for load in loads]

    def percentiles(of: str) -> dict[str, float]:
        return {f"p{p}": median(float(np.percentile(getattr(load, of), p)) for load in loads) for p in PERCENTILES}

    return {
        "tokens_per_second": median(rates),
        "ratio": median(rate / one for rate, one in zip(rates, alone, strict=True)),
        "responses_per_second": median(load.responses / load.seconds for load in loads),
        "first_token_ms": percentiles("first_ms"),
        "between_tokens_ms": percentiles("gap_ms"),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table."""
    lines = [
        f"{report['processor']}, {report['cpus']} CPUs, {report['date']}, onnxruntime {report['onnxruntime']}, llm2slm-export "
        f"{report['llm2slm_export']}, {report['threads']} thread(s); load at the start {report['load_at_start']:.1f}. "
        f"{report['bundle']} ({report['precision']}), {report['rounds']} rounds of {report['seconds']:g} s, "
        f"{'exactly' if report['fixed_length'] else 'at most'} {report['max_new_tokens']} new tokens, clients on the same machine. "
        f"`generate`, one prompt at a time: {report['sequential_tokens_per_second']:.0f} tokens/s.",
        "",
        "| server | clients | tokens/s | of `generate` | responses/s | first token p50 / p90 / p99, ms | between tokens p50 / p90 / p99, ms |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, loads in report["servers"].items():
        for clients, one in loads.items():
            times = (
                " / ".join(f"{one[of][f'p{p}']:.2f}" for p in PERCENTILES)
                for of in ("first_token_ms", "between_tokens_ms")
            )
            lines.append(
                f"| {name} | {clients} | {one['tokens_per_second']:.0f} | {one['ratio']:.2f} | {one['responses_per_second']:.1f} | "
                + " | ".join(times) + " |"
            )  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=HELD_OUT, help="prompts: the first column of a .tsv file")
    parser.add_argument("--clients", type=int, nargs="*", default=(1, 4, 16, 64))
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--fixed-length", action="store_true", help="every response has --max-new-tokens tokens")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=COMMAND", help="another server; repeatable"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    prompts = [line.split("\t")[0] for line in given.data.read_text(encoding="utf-8").splitlines() if line]
    load_at_start, most = os.getloadavg()[0], given.max_new_tokens
    request: dict[str, Any] = {
        "model": "model", "stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": most,
    }  # fmt: skip
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "truncate": True, "max_new_tokens": most}
    if given.fixed_length:
        request["min_new_tokens"] = options["min_new_tokens"] = most
    peers = dict(peer.split("=", 1) for peer in given.peer)
    loads: dict[str, dict[int, list[Load]]] = {
        name: {clients: [] for clients in given.clients} for name in ("llm2slm-export", *peers)
    }
    alone = []
    for number in range(given.rounds):
        print(f"round {number + 1} of {given.rounds} …", file=sys.stderr, flush=True)
        alone.append(sequential(given.bundle, prompts, given.threads, given.seconds, options))
        for name, of_server in loads.items():
            running = peer_server(peers[name]) if name in peers else server(given.bundle, given.threads, given.max_rows)
            with running as port:
                for clients, found in of_server.items():
                    asyncio.run(measured(port, clients, prompts, WARM_UP, request))
                    found.append(asyncio.run(measured(port, clients, prompts, given.seconds, request)))
    from llm2slm_export.bundle.manifest_file import read_manifest

    graphs = read_manifest(given.bundle).graphs
    report = {
        "date": datetime.now(UTC).date().isoformat(), "processor": processor(), "cpus": os.cpu_count(),
        "python": platform.python_version(), "onnxruntime": version("onnxruntime"),
        "llm2slm_export": version("llm2slm-export"), "load_at_start": load_at_start, "threads": given.threads,
        "rounds": given.rounds, "seconds": given.seconds, "max_new_tokens": most, "fixed_length": given.fixed_length,
        "bundle": given.bundle.name,
        "precision": ", ".join(f"{name} {graph.precision}" for name, graph in graphs.items()),
        "peers": peers,
        "sequential_tokens_per_second": median(alone),
        "servers": {
            name: {str(clients): figures(found, alone) for clients, found in of_server.items()}
            for name, of_server in loads.items()
        },
    }  # fmt: skip
    print(markdown(report))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
