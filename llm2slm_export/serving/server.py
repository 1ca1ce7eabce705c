"""The server process: its socket, its models, and its end."""

import asyncio
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llm2slm_export.errors import UsageError
from llm2slm_export.serving.app import ServerState
from llm2slm_export.serving.http_protocol import HttpProtocol

_log = logging.getLogger(__name__)
_BACKLOG = 2048
_LAST_SECONDS = 2.0  # after the end of draining, in which cancelled requests are answered


def listen(host: str, port: int, *, has_keys: bool) -> socket.socket:
    """A listening socket. An address that other machines reach needs API keys.

    Args:
        port: 0 for a free one.

    Raises:
        UsageError: there is no such address, other machines reach it and there are no keys, or the port is in use.
    """
    try:
        ((family, _, _, _, address), *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            f"The host {host!r} has no address: {error}.", remedy="give an address of this machine (--host)"
        ) from None
    if not has_keys and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UsageError(
            f"Other machines reach {host}, and there are no API keys.",
            remedy="give --api-key-file FILE, or --host 127.0.0.1",
        )
    # asyncio sends small chunks at once (TCP_NODELAY) only where the protocol is named. Without that a client's first tokens
    # wait for its delayed acknowledgement, 40 ms.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise UsageError(
            f"Cannot listen on {host}:{port}: {error.strerror}.", remedy="give another --port (0: a free one) or --host"
        ) from None
    return found


class DrainingServer(uvicorn.Server):
    """A server whose first SIGTERM or SIGINT lets the running requests finish; the second ends it at once.

    While it drains, new requests and /health are answered with 503.

    Args:
        app: the application.
        state: shared with the application.
        drain: seconds that running requests have.
        on_ready: called when the server takes requests.
    """

    def __init__(self, app: ASGIApp, state: ServerState, *, drain: float, on_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app, http=HttpProtocol, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1,
            server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self._state, self._drain, self._on_ready = state, drain, on_ready
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End."""
        await super().shutdown(sockets)
        for close in self._state.on_shutdown:
            await close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at once."""
        del frame
        if self._deadline is not None:
            self.should_exit = self.force_exit = True
            return
        self._state.draining, self._deadline = True, time.monotonic() + self._drain
        _log.info(
            "%s: %d requests have %g seconds to finish", signal.Signals(sig).name, self._state.active, self._drain
        )

    async def on_tick(self, counter: int) -> bool:
        """Whether the server ends now."""
        if self._deadline is not None:
            late = time.monotonic() - self._deadline
            if late >= 0:
                # Each ends with an error, which its client receives.
                self._state.cancel()
            if not self._state.active or late >= _LAST_SECONDS:
                self.should_exit = True
        return bool(await super().on_tick(counter))


def serve(
    app: ASGIApp, state: ServerState, listener: socket.socket, *, drain: float, on_ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT."""
    server = DrainingServer(app, state, drain=drain, on_ready=on_ready)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[listener]))
