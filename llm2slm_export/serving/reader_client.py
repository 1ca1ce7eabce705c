"""The reader of a writer: another server, with the same bundles, that encodes the prompts."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx

from llm2slm_export.errors import EncodingError, UsageError
from llm2slm_export.inference.encodings.host_encoding import HostEncoding, max_encoding_bytes
from llm2slm_export.inference.tokenization import PromptIds
from llm2slm_export.serving.api_errors import RETRY_AFTER, ApiError, labelled
from llm2slm_export.serving.metrics import ServerMetrics
from llm2slm_export.serving.served_models import ServedModel

_CONNECT_SECONDS = 5.0
_SECONDS = 60.0  # for the encoding of a prompt, if the request has no timeout
_ATTEMPTS = 2
_MOST_ERROR = 100_000  # bytes of an error's body
_PASSED_ON = (400, 413, 429, 503, 504)  # what the client, or the reader's load, is the reason for


class ReaderClient:
    """Has prompts encoded by a reader.

    Encoding has no side effects: a request whose connection was refused or lost is sent once more.

    Args:
        url: address of the reader, as http://HOST:PORT. Model names are the same there.
        api_key: the key that it asks for; None: none.
        max_waiting: maximum prompts that are being encoded. More are refused, because each holds the memory of an encoding.
        transport: sends the requests; None: over HTTP.
        name: stands for the reader in messages; None: its address.

    Raises:
        UsageError: `url` is not an address.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, max_waiting: int = 64,
        transport: httpx.AsyncBaseTransport | None = None, name: str | None = None,
    ) -> None:  # fmt: skip
        self._url, self._most, self._active = _checked(url), max_waiting, 0
        self._name = name or f"The reader at {self._url}"
        self._remedy = "see whether it runs" if name else "start the reader, or correct the server's --reader"
        headers = {"Accept": "application/octet-stream", "Accept-Encoding": "identity"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._client = httpx.AsyncClient(
            headers=headers, timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS), limits=httpx.Limits(max_connections=None),
            transport=transport,
        )  # fmt: skip

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def encode(
        self, model: ServedModel, prompts: Sequence[str], rows: Sequence[PromptIds], metrics: ServerMetrics, *,
        truncate: bool, timeout: float | None,
    ) -> list[HostEncoding]:  # fmt: skip
        """The encodings of prompts, one each. Cancelling this closes the connections, and the reader drops the prompts.

        Args:
            rows: the prompts' ids: truncated ones are truncated to as many tokens by the reader.
            metrics: record the requests.
            truncate, timeout: of the client's request.

        Raises:
            ApiError: the reader cannot be reached, is late, refuses a prompt, or serves another bundle. With several prompts
                the first of them is named.
        """
        if self._active + len(prompts) > self._most:
            raise ApiError(
                429, f"{self._active} prompts are being encoded by the reader; this server waits for at most {self._most}.\n"
                "  → send the request again later, or raise the server's --max-waiting",
                kind="rate_limit_exceeded", code="queue_full", headers={"Retry-After": str(RETRY_AFTER)},
            )  # fmt: skip
        self._active += len(prompts)
        tasks = [
            asyncio.ensure_future(self._encode_one(model, prompt, row, metrics, truncate=truncate, timeout=timeout))
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        try:
            found = []
            for index, task in enumerate(tasks):
                try:
                    found.append(await task)
                except ApiError as error:
                    raise labelled(error, "prompt", index, len(prompts)) from None
            return found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._active -= len(prompts)

    async def _encode_one(
        self, model: ServedModel, prompt: str, row: PromptIds, metrics: ServerMetrics, *, truncate: bool,
        timeout: float | None,
    ) -> HostEncoding:  # fmt: skip
        body: dict[str, Any] = {"model": model.name, "prompt": prompt, "truncate": truncate}
        if row.dropped:
            body["max_prompt_tokens"] = len(row.ids)
        if timeout is not None:
            body["timeout"] = timeout
        started, result = time.perf_counter(), "cancelled"
        patience = _SECONDS if timeout is None else timeout
        manifest = model.pair.manifest
        try:
            async with asyncio.timeout(patience):
                data = await self._post(body, max_encoding_bytes(manifest))
            encoding = await asyncio.to_thread(HostEncoding.from_bytes, data, manifest=manifest)
            if encoding.prompt_tokens != (len(row.ids),):
                raise EncodingError(
                    f"It has {encoding.prompt_tokens} tokens, the prompt {len(row.ids)}.", remedy="report this"
                )
            result = "ok"
        except ApiError as error:
            result = "refused" if error.status in (400, 413) else "busy" if error.status in _PASSED_ON else "failed"
            raise
        except TimeoutError:
            result = "timeout"
            raise ApiError(
                504, f"{self._name} did not encode the prompt within {patience:g} seconds.\n"
                "  → send the request again later, or give it a longer timeout",
                kind="timeout", code="deadline_exceeded",
            ) from None  # fmt: skip
        except httpx.HTTPError as error:
            result = "unavailable"
            raise ApiError(
                503, f"{self._name} cannot be reached.\n  - {type(error).__name__}: {error}\n"
                f"  → send the request again later; if it lasts, {self._remedy}",
                kind="service_unavailable", code="reader_unavailable", headers={"Retry-After": str(RETRY_AFTER)},
            ) from None  # fmt: skip
        except EncodingError as error:
            result = "failed"
            lines = "".join(f"\n  - {line}" for line in (error.fact, *error.evidence))
            raise self._failed(
                f"sent an encoding that this server cannot use.{lines}", "serve the same bundles on both"
            ) from None
        finally:
            metrics.read(model.name, result, time.perf_counter() - started)
        return replace(encoding, timings_ms={**encoding.timings_ms, "reader": (time.perf_counter() - started) * 1e3})

    async def _post(self, body: dict[str, Any], most: int) -> bytes:
        """The body of the reader's response.

        Raises:
            ApiError: it is an error.
            httpx.HTTPError: there is none.
        """
        attempts = 0
        while True:
            attempts += 1
            try:
                async with self._client.stream("POST", f"{self._url}/v1/encodings", json=body) as response:
                    is_ok = response.status_code == 200
                    data = bytearray()
                    async for part in response.aiter_bytes():
                        data += part
                        if len(data) > (most if is_ok else _MOST_ERROR):
                            raise self._failed(
                                "sent more bytes than an encoding has.", "serve the same bundles on both"
                            )
                    if is_ok:
                        return bytes(data)
                    raise self._error(response, bytes(data))
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                if attempts == _ATTEMPTS:
                    raise

    def _error(self, response: httpx.Response, data: bytes) -> ApiError:
        """The response to the client, from the reader's error."""
        status = response.status_code
        try:
            found = json.loads(data)["error"]
            message, kind, param, code = (found[name] for name in ("message", "type", "param", "code"))
        except (ValueError, KeyError, TypeError):
            message, kind, param, code = "", "server_error", None, None
        if status in _PASSED_ON and message:
            headers = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else {}
            if status != 400:
                message = f"{self._name}: {message}"
            return ApiError(status, message, kind=kind, param=param, code=code, headers=headers)
        remedy = {
            401: "start this server with a key of the reader's in --reader-api-key-file",
            404: "start the reader with the same bundles, under the same names",
        }.get(status, "see the reader's log")
        evidence = "".join(f"\n  - {line}" for line in str(message).splitlines()[:1])
        return self._failed(f"answered with status {status}.{evidence}", remedy)

    def _failed(self, fact: str, remedy: str) -> ApiError:
        return ApiError(502, f"{self._name} {fact}\n  → {remedy}", kind="server_error", code="reader_failed")


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    # A password would be in messages.
    if not is_address or "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"The reader {url.rpartition('@')[2]!r} is not an address.",
            remedy="give http://HOST:PORT or https://HOST:PORT (--reader)",
        )
    return url.rstrip("/").removesuffix("/v1")
