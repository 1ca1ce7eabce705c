"""Decoding speed per token: our bundles and their peers, the same weights, one prompt, batch 1, greedy.

Each peer has an environment and a process of its own. They write in turns, all others stopped (idle ones' threads spin,
and made times 3 to 60 times as long); a figure is the median of the rounds. The end-of-sequence token is suppressed, so
each writes as many tokens as it is asked for. A peer that cannot be had is named with the reason.

Usage: python benchmarks/peers --work DIR [--models t5-small …] [--peers NAME[:PRECISION] …] [--threads 2] [--rounds 5]
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from figures import Figure, Results
from host import busy
from plot import svg
from preparation import Workshop
from ready_peers import ready_peers
from spec import MODELS, PEERS, Peer
from worker import Worker, WorkerError

from llm2slm_export.environment.hardware import probe, processor

LONG = 512  # tokens of a response whose later tokens --growth times
WARM_UP = 16  # tokens: the first call after a stop is cold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where environments and models are made, and kept")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--peers", nargs="+", metavar="NAME[:PRECISION]", help=", ".join(peer.name for peer in PEERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens that are written")
    parser.add_argument("--growth", action="store_true", help=f"also time the tokens after those, up to {LONG}")
    parser.add_argument("--prepare", action="store_true", help="make what is missing, and time nothing")
    parser.add_argument(
        "--json", type=Path, help="write the figures there; peers.json in the work directory by default"
    )
    parser.add_argument("--svg", type=Path, help="write the plot there; peers.svg in the work directory by default")
    given = parser.parse_args()
    try:
        wanted = list(_selected(given.peers))
    except ValueError as error:
        parser.error(str(error))
    if given.threads < 1 or given.rounds < 1 or given.prompt < 2 or not 2 <= given.new < LONG:
        parser.error(f"--threads and --rounds are at least 1, --prompt at least 2, --new from 2 to {LONG - 1}")

    workshop = Workshop(given.work, given.threads, given.prompt)
    settings = {
        "threads": given.threads, "rounds": given.rounds, "prompt_tokens": given.prompt, "new_tokens": given.new,
        "long": LONG if given.growth else None, "batch": 1, "search": "greedy", "weights": "random, seed 0",
    }  # fmt: skip
    machine = {"processor": processor(), "cpus": os.cpu_count(), "system": platform.platform()}
    report = {"date": datetime.now(UTC).date().isoformat(), "machine": machine, "settings": settings}
    caption = (
        f"{machine['processor']}, {given.threads} threads, prompt {given.prompt}, tokens 2-{given.new}, batch 1, greedy, "
        f"median of {given.rounds}, {report['date']}"
    )
    print(f"{caption}\n", flush=True)
    results = []
    for name in given.models:
        results.append(_results(name, wanted, workshop, given))
        print(results[-1].markdown(given.new, settings["long"]) + "\n", flush=True)
        if not given.prepare:  # after each model: what was measured is kept if a later one is interrupted
            whole = report | {"models": [result.as_json() for result in results]}
            _write(given.json or workshop.work / "peers.json", json.dumps(whole, indent=1) + "\n")
            _write(given.svg or workshop.work / "peers.svg", svg(results, caption))


def _selected(names: list[str] | None) -> Iterator[tuple[Peer, str]]:
    """The peers with their precisions, of those named; in the table's order.

    Raises:
        ValueError: a name that none has.
    """
    every = [(peer, precision) for peer in PEERS for precision in peer.precisions]
    if names is None:
        yield from every
        return
    known = {name for peer, precision in every for name in (peer.name, f"{peer.name}:{precision}")}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown peers: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    yield from ((p, precision) for p, precision in every if p.name in names or f"{p.name}:{precision}" in names)


def _results(name: str, wanted: list[tuple[Peer, str]], workshop: Workshop, given: argparse.Namespace) -> Results:
    """What the peers do with one model."""
    results = Results(name)
    with ExitStack() as stack:
        ready = ready_peers(name, wanted, workshop, stack, results.refused, load=not given.prepare)
        workers = [(worker, Figure(peer.name, precision, worker.versions)) for peer, precision, worker in ready]
        for turn in range(0 if given.prepare else given.rounds):
            print(f"{name}: round {turn + 1} of {given.rounds} …", file=sys.stderr, flush=True)
            _round(workers, results, given)
        results.figures = [figure for _, figure in workers]
    return results


def _round(workers: list[tuple[Worker, Figure]], results: Results, given: argparse.Namespace) -> None:
    """Each peer writes once; one that fails leaves."""
    used = busy()
    if used is not None:
        results.busy.append(round(used, 3))
    results.bandwidth.append(probe().bandwidth)
    time.sleep(0.2)  # the probe's own threads spin for a while
    for worker, figure in list(workers):
        try:
            with worker.running():
                worker.write(WARM_UP)
                figure.add(worker.write(given.new))
                if given.growth:
                    figure.add_growth(worker.write(LONG), given.new)
        except WorkerError as error:
            worker.close()
            workers.remove((worker, figure))
            results.refused.append((figure.peer, figure.precision, str(error)))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
