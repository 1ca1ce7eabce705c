"""A server in a thread of the test, on a free port."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llm2slm_export.inference.orchestrator import BundlePart, Orchestrator
from llm2slm_export.inference.scheduler import Scheduler
from llm2slm_export.serving.app import AppOptions, ServerState, create_app
from llm2slm_export.serving.served_models import ServedModels
from llm2slm_export.serving.server import DrainingServer, listen
from tests.support.gated_toy import PATIENCE


@dataclass
class RunningServer:
    """A server, its address, its pairs, and what runs their requests."""

    url: str
    pairs: dict[str, Orchestrator]
    schedulers: dict[str, Scheduler]
    state: ServerState
    thread: threading.Thread
    _server: DrainingServer

    def terminate(self) -> None:
        """What SIGTERM does."""
        self._server.handle_exit(signal.SIGTERM, None)


@contextmanager
def http_server(
    pairs: dict[str, Orchestrator],
    *,
    options: AppOptions | None = None,
    drain: float = 0.0,
    part: BundlePart = "pair",
    **limits: Any,
) -> Iterator[RunningServer]:
    """Serve pairs, or a part of them, by name; `limits` are those of `Scheduler`."""
    schedulers = {name: Scheduler(pair, **limits) for name, pair in pairs.items()}
    state, ready = ServerState(), threading.Event()
    models = ServedModels([(name, schedulers[name], pair) for name, pair in pairs.items()], part=part)
    options = options or AppOptions()
    with listen("127.0.0.1", 0, has_keys=bool(options.api_keys)) as listener:
        server = DrainingServer(create_app(models, options, state), state, drain=drain, on_ready=ready.set)

        def serve() -> None:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(server.serve(sockets=[listener]))

        thread = threading.Thread(target=serve)
        thread.start()
        assert ready.wait(PATIENCE)
        try:
            yield RunningServer(
                f"http://127.0.0.1:{listener.getsockname()[1]}", pairs, schedulers, state, thread, server
            )
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            for scheduler in schedulers.values():
                scheduler.close()
            assert not thread.is_alive()
