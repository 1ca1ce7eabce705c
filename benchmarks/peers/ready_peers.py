"""Peers that are ready to be timed: prepared and loaded; they are stopped with the caller's stack."""

import sys
from collections.abc import Iterable
from contextlib import ExitStack

from preparation import PreparationError, Workshop
from spec import Peer
from worker import Worker, WorkerError

Refused = list[tuple[str, str, str]]  # peer, precision and reason of each missing figure


def ready_peers(
    name: str, wanted: Iterable[tuple[Peer, str]], workshop: Workshop, stack: ExitStack, refused: Refused, *, load: bool
) -> list[tuple[Peer, str, Worker]]:
    """The peers that can run a model at the wanted precisions, each with its loaded worker.

    Args:
        name: the model's name.
        stack: stops the workers when it closes.
        refused: receives the peers that cannot run.
        load: False prepares the peers only, and returns none.
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
