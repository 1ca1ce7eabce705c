"""A whole response: the LLM generating by itself in the peers that are fastest at it, our pair that it reads for, and our
SLM alone. Prompt in, last token out; the first call of each is not counted.

Usage: python benchmarks/peers/end_to_end.py --work DIR [--llm t5-xl] [--new 128] [--rounds 5]
"""

import argparse
import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from host import busy, conditions
from preparation import Workshop
from ready_peers import Refused, ready_peers
from spec import OURS, PAIR, PEERS, SLM
from worker import Worker, WorkerError

from llm2slm_export.environment.hardware import probe, processor

GENERATING = {"transformers": "bf16", "ctranslate2": "int8", "openvino": "int8"}
WARM_UP = 4  # tokens


@dataclass
class Entry:
    """What writes. `first`, `total`: ms until the first and the last token, one for each round."""

    label: str
    worker: Worker
    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Times in ms."""
        own = {name: value for name, value in asdict(self).items() if name != "worker"}
        return own | {"versions": self.worker.versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where environments and models are made, and kept")
    parser.add_argument("--llm", default="t5-xl", help="in llm2slm_export's table of known models")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens that are written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prepare", action="store_true", help="make what is missing, and time nothing")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()

    workshop = Workshop(given.work, given.threads, given.prompt)
    peers = [(peer, GENERATING[peer.name]) for peer in PEERS if peer.name in GENERATING]
    refused: Refused = []
    with ExitStack() as stack:
        # The SLM first: the pair is built with it.
        alone = ready_peers(SLM, [(PEERS[0], "int8")], workshop, stack, refused, load=not given.prepare)
        wanted = [*((PAIR, precision) for precision in PAIR.precisions), *peers]
        whole = ready_peers(given.llm, wanted, workshop, stack, refused, load=not given.prepare)
        entries = [Entry(f"{peer.name} {precision}: {SLM} alone", worker) for peer, precision, worker in alone]
        for peer, precision, worker in whole:
            writer = f"{given.llm} reads, {SLM} writes" if peer is PAIR else given.llm
            entries.append(Entry(f"{peer.name} {precision}: {writer}", worker))
        bandwidth: list[float] = []
        used: list[float] = []
        for turn in range(0 if given.prepare else given.rounds):
            print(f"round {turn + 1} of {given.rounds} …", file=sys.stderr, flush=True)
            used.append(busy() or 0.0)
            bandwidth.append(probe().bandwidth)
            time.sleep(0.2)  # the probe's own threads spin for a while
            for entry in list(entries):
                try:
                    with entry.worker.running():
                        entry.worker.write(WARM_UP)
                        written = entry.worker.write(given.new)
                except WorkerError as error:
                    entry.worker.close()
                    entries.remove(entry)
                    refused.append((*entry.label.split(" ", 1), str(error)))
                    continue
                entry.first.append(written.ms[0])
                entry.total.append(written.ms[-1])
    if given.prepare:
        for name, precision, why in refused:
            print(f"{name} {precision}: {why}")
        return
    print(_markdown(entries, given, bandwidth, used, refused))
    if given.json:
        report = {
            "date": datetime.now(UTC).date().isoformat(), "llm": given.llm, "slm": SLM, "prompt_tokens": given.prompt,
            "new_tokens": given.new, "threads": given.threads, "rounds": given.rounds, "bandwidth": bandwidth, "busy": used,
            "machine": {"processor": processor(), "cpus": os.cpu_count(), "system": platform.platform()},
            "figures": [entry.as_json() for entry in entries], "refused": refused,
        }  # fmt: skip
        given.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def _markdown(
    entries: list[Entry], given: argparse.Namespace, bandwidth: list[float], used: list[float], refused: Refused
) -> str:
    settings = f"{given.threads} threads, batch 1, greedy, median of {given.rounds}"
    lines = conditions(f"{given.llm}: prompt {given.prompt}, {given.new} new tokens", settings, bandwidth, used)
    pairs = [median(entry.total) for entry in entries if entry.label.startswith(OURS) and "reads" in entry.label]
    lines += ["| | ms in all | rounds | first token | a further token | against our pair |", "|---" * 6 + "|"]
    for entry in sorted(entries, key=lambda entry: median(entry.total)):
        total, first = median(entry.total), median(entry.first)
        further = median((all_ - one) / (given.new - 1) for one, all_ in zip(entry.first, entry.total, strict=True))
        ratio = f"{total / min(pairs):.2f}" if pairs else ""
        rounds = f"{min(entry.total):.0f}-{max(entry.total):.0f}"
        lines.append(f"| {entry.label} | {total:.0f} | {rounds} | {first:.0f} | {further:.2f} | {ratio} |")
    if refused:
        lines += ["", "Not measured:", "", *(f"- {name} {precision}: {why}" for name, precision, why in refused)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
