"""Peers that are ready to be timed: prepared, loaded and stopped."""

import sys
from collections.abc import Iterable
from contextlib import ExitStack

from preparation import PreparationError, Workshop
from spec import Peer
from worker import Worker, WorkerError

Refused = list[tuple[str, str, str]]  # peer, precision and the reason of each that gives no figure


def line_up(
    name: str, wanted: Iterable[tuple[Peer, str]], workshop: Workshop, stack: ExitStack, refused: Refused, *, load: bool
) -> list[tuple[Peer, str, Worker]]:
    """Those that can be had of the peers with their precisions.

    Args:
        name: of the model that they are given.
        stack: ends the workers.
        refused: takes those that cannot be had.
        load: else they are prepared alone, and nobody is lined up.
    """
    try:
        model = workshop.model(name)
    except PreparationError as error:
        refused += [(peer.name, precision, str(error)) for peer, precision in wanted]
        return []
    prepared = []
    for peer, precision in wanted:
        try:
            prepared.append((peer, precision, workshop.prepared(peer, precision, model)))
        except PreparationError as error:
            refused.append((peer.name, precision, str(error)))
    ready = []
    for peer, precision, made in prepared if load else []:
        print(f"{name}: load {peer.name} {precision} …", file=sys.stderr, flush=True)
        command = workshop.command(peer, "serve", model, made, precision)
        log = workshop.log / f"serve-{name}-{'encoder-' if peer.encodes else ''}{peer.name}-{precision}.log"
        worker = Worker(command, log, workshop.variables(peer))
        stack.callback(worker.close)
        try:
            worker.load()
        except WorkerError as error:
            worker.close()
            refused.append((peer.name, precision, str(error)))
            continue
        ready.append((peer, precision, worker))
    return ready
