"""What is checked before a request is read: the API key, and the size and the time of the body."""

import asyncio
import hashlib
import hmac
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm2slm_export.errors import UsageError
from llm2slm_export.serving.api_errors import ApiError

_MOST_DISCARDED = 64_000_000  # bytes of a body that is too large


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one per line. Empty lines and lines that begin with # are skipped.

    Raises:
        UsageError: the file cannot be read, or has no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The API keys in {path} cannot be read: {error}.", remedy="give a text file with one key per line"
        ) from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise UsageError(f"{path} has no API key.", remedy="write one key per line, and start again")
    return keys


class Gate:
    """An ASGI application that refuses requests without a key, and bodies that are too large or too slow.

    Args:
        inner: the application.
        keys: the API keys; empty: none is needed. They guard the routes below /v1/.
        max_body_bytes: maximum size of a body.
        body_timeout: seconds in which a body must arrive.
        on_error: called with the status of every refusal.
    """

    def __init__(
        self, inner: ASGIApp, *, keys: Iterable[str], max_body_bytes: int, body_timeout: float,
        on_error: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._inner, self._most, self._timeout, self._on_error = inner, max_body_bytes, body_timeout, on_error
        # Hashes have one length: the time of a comparison shows nothing about a key.
        self._keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            if scope["path"].startswith("/v1/"):
                self._check_key(headers.get(b"authorization", b""))
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self._most:
                raise self._too_large()
            receive = await self._with_body(receive)
        except ApiError as error:
            self._on_error(error.status)
            if error.status == 413:
                await self._discard(receive)
            headers_out = {**error.headers, "Connection": "close"}
            await JSONResponse(error.body, error.status, headers_out)(scope, receive, send)
            return
        await self._inner(scope, receive, send)

    def _check_key(self, given: bytes) -> None:
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        known = [hmac.compare_digest(digest, other) for other in self._keys]
        if self._keys and not (scheme.lower() == b"bearer" and any(known)):
            raise ApiError(
                401, "The API key is missing or wrong.\n  → send the header Authorization: Bearer KEY",
                kind="authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _with_body(self, receive: Receive) -> Receive:
        """Read the body, which is bounded, and hand it on whole."""
        body, deadline = bytearray(), asyncio.get_running_loop().time() + self._timeout
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"The body did not arrive within {self._timeout:g} seconds.\n  → send it faster",
                    code="body_timeout",
                ) from None
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            if len(body) > self._most:
                raise self._too_large()
            if not message.get("more_body"):
                break
        first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        if message["type"] != "http.request":
            first = [message]

        async def rest() -> Message:
            return first.pop() if first else await receive()

        return rest

    async def _discard(self, receive: Receive) -> None:
        """Read a part of the rest of a body: a client that is still sending would not see the response."""
        left = _MOST_DISCARDED
        try:
            async with asyncio.timeout(self._timeout):
                while left > 0 and (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    left -= len(message.get("body", b""))
        except TimeoutError:
            return

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is larger than {self._most} bytes.\n  → send a smaller one, or raise the server's --max-body-bytes",
            code="body_too_large",
        )  # fmt: skip


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
