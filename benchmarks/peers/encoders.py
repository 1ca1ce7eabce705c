"""The time to encode a prompt: our encoder on its runtimes and what else encodes with the same weights, by error.

Errors are of the hidden states, rms over rms of transformers' at fp32. Peers have environments and processes of their own
and run in turns, as in the benchmark of writing.

Usage: python benchmarks/peers/encoders.py --work DIR [--model t5-large] [--tokens 64 256 512] [--rounds 5]
"""

import argparse
import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from host import busy, conditions
from preparation import Workshop
from ready_peers import Refused, ready_peers
from spec import ENCODERS, OURS, REFERENCE
from worker import Worker, WorkerError

from llm2slm_export.environment.hardware import probe, processor

CLASSES = (1e-4, 2e-2, 6e-2, 1.2e-1)  # of errors: within one, the faster is the better


@dataclass
class Entry:
    """A peer at a precision. `ms`, `error`: by the prompt's length."""

    peer: str
    precision: str
    worker: Worker
    ms: dict[int, list[float]] = field(default_factory=dict)
    error: dict[int, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.peer} {self.precision}"

    def median(self, tokens: int) -> float:
        return median(self.ms[tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where environments and models are made, and kept")
    parser.add_argument("--model", default="t5-large", help="in llm2slm_export's table of known models")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--peers", nargs="+", metavar="NAME[:PRECISION]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prepare", action="store_true", help="make what is missing, and time nothing")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()

    workshop = Workshop(given.work, given.threads, 64)
    every = [(peer, precision) for peer in ENCODERS for precision in peer.precisions]
    wanted = [(p, x) for p, x in every if not given.peers or p.name in given.peers or f"{p.name}:{x}" in given.peers]
    refused: Refused = []
    with ExitStack() as stack, TemporaryDirectory() as directory:
        ready = ready_peers(given.model, wanted, workshop, stack, refused, load=not given.prepare)
        entries = [Entry(peer.name, precision, worker) for peer, precision, worker in ready]
        bandwidth: list[float] = []
        used: list[float] = []
        for turn in range(0 if given.prepare else given.rounds):
            print(f"round {turn + 1} of {given.rounds} …", file=sys.stderr, flush=True)
            used.append(busy() or 0.0)
            bandwidth.append(probe().bandwidth)
            time.sleep(0.2)  # the probe's own threads spin for a while
            for entry in list(entries):
                try:
                    _turn(entry, given.tokens, Path(directory) if turn == 0 else None)
                except WorkerError as error:
                    entry.worker.close()
                    entries.remove(entry)
                    refused.append((entry.peer, entry.precision, str(error)))
        if given.prepare:
            return
        _measure_errors(entries, given.tokens, Path(directory))
    print(_markdown(entries, given, bandwidth, used, refused))
    if given.json:
        given.json.write_text(json.dumps(_report(entries, given, bandwidth, used, refused), indent=1) + "\n", "utf-8")


def _turn(entry: Entry, lengths: list[int], keep: Path | None) -> None:
    with entry.worker.running():
        for tokens in lengths:
            out = str(keep / f"{entry.label}-{tokens}.npy") if keep else None
            _, *ms = entry.worker.ask({"tokens": tokens, "calls": 4, "out": out})["ms"]  # the first is cold
            entry.ms.setdefault(tokens, []).append(median(ms))


def _measure_errors(entries: list[Entry], lengths: list[int], directory: Path) -> None:
    for tokens in lengths:
        reference = directory / f"{' '.join(REFERENCE)}-{tokens}.npy"
        if not reference.is_file():
            continue
        expected = np.load(reference)
        for entry in entries:
            got = np.load(directory / f"{entry.label}-{tokens}.npy")
            error = np.square(got - expected).mean() / np.square(expected).mean()
            entry.error[tokens] = float(np.sqrt(error))


def _markdown(
    entries: list[Entry], given: argparse.Namespace, bandwidth: list[float], used: list[float], refused: Refused
) -> str:
    settings = f"{given.threads} threads, batch 1, median of {given.rounds}"
    lines = conditions(f"Encoder of {given.model}: ms by prompt tokens", settings, bandwidth, used)
    heads = ["", "precision", *(f"{tokens}" for tokens in given.tokens), f"error at {given.tokens[-1]}", "versions"]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for entry in sorted(entries, key=lambda entry: entry.median(given.tokens[-1])):
        name = f"**{entry.peer}**" if entry.peer == OURS else entry.peer
        error = entry.error.get(given.tokens[-1])
        cells = [name, entry.precision, *(f"{entry.median(tokens):.0f}" for tokens in given.tokens)]
        cells.append("" if error is None else f"{error:.1e}")
        cells.append(", ".join(f"{package} {version}" for package, version in entry.worker.versions.items()))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| error up to | tokens | ours | ms | fastest peer | ms | ratio |", "|---|---|---|---|---|---|---|"]
    for bound in CLASSES:
        for tokens in given.tokens:
            within = [entry for entry in entries if entry.error.get(tokens, 1.0) <= bound]
            own = min((e for e in within if e.peer == OURS), key=lambda e: e.median(tokens), default=None)
            other = min((e for e in within if e.peer != OURS), key=lambda e: e.median(tokens), default=None)
            if own and other:
                mine, theirs = own.median(tokens), other.median(tokens)
                cells = [f"{bound:g}", str(tokens), own.precision, f"{mine:.1f}", other.label, f"{theirs:.1f}"]
                lines.append("| " + " | ".join([*cells, f"{mine / theirs:.2f}"]) + " |")
    if refused:
        lines += ["", "Not measured:", ""]
        lines += [f"- {peer} {precision}: {reason}" for peer, precision, reason in refused]
    return "\n".join(lines)


def _report(
    entries: list[Entry], given: argparse.Namespace, bandwidth: list[float], used: list[float], refused: Refused
) -> dict[str, Any]:
    figures = [
        {"peer": e.peer, "precision": e.precision, "versions": e.worker.versions, "ms": e.ms, "error": e.error}
        for e in entries
    ]
    return {
        "date": datetime.now(UTC).date().isoformat(), "model": given.model, "threads": given.threads,
        "rounds": given.rounds, "machine": {"processor": processor(), "cpus": os.cpu_count(), "system": platform.platform()},
        "bandwidth": bandwidth, "busy": used, "figures": figures, "refused": refused,
    }  # fmt: skip


if __name__ == "__main__":
    main()
