"""The HTTP protocol of a connection: uvicorn's, with bounds on the headers of a request."""

import asyncio
import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llm2slm_export.serving.api_errors import ApiError

_MOST_BYTES = 65_536  # of a request's line and headers


class HttpProtocol(HttpToolsProtocol):
    """A connection whose requests must send their headers in time, and not too many of them.

    What ends here has not reached the application, so no metric counts it.
    """

    seconds = 30.0  # in which the headers must arrive: after the connection was opened, and after a later request's first byte

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._received = 0
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the wait."""
        self._end_wait()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin to wait for a request's headers."""
        super().on_message_begin()
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._late)

    def on_headers_complete(self) -> None:
        """End the wait."""
        self._end_wait()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        super().data_received(data)
        if self._timer is not None:
            self._received += len(data)
            if self._received > _MOST_BYTES:
                text = f"The headers are larger than {_MOST_BYTES} bytes.\n  → send fewer or shorter ones"
                self._refuse(ApiError(431, text, code="headers_too_large"))

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(ApiError(400, f"{msg}\n  → send a request of HTTP/1.1"))

    def _late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            # The response to the request before it is still being sent.
            self._timer = self.loop.call_later(self.seconds, self._late)
        elif self._received:
            text = f"The headers did not arrive within {self.seconds:g} seconds.\n  → send them faster"
            self._refuse(ApiError(408, text, code="headers_timeout"))
        else:
            self.transport.close()

    def _end_wait(self) -> None:
        self._received = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, and close the connection."""
        self._end_wait()
        body = json.dumps(error.body).encode()
        lines = [
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "content-type: application/json",
            f"content-length: {len(body)}", "connection: close",
        ]  # fmt: skip
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
