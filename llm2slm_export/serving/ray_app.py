"""The server on Ray Serve: readers, writers, and the front that sends requests to them.

    serve run llm2slm_export.serving.ray_app:build bundle=/models/demo

A replica of a reader or of a writer has the application of `serve --part`. The front has neither: it hands requests on, and sends
them once more if a replica is lost.
"""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

# Before the import: Ray's usage statistics are on otherwise.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from llm2slm_export.errors import Llm2SlmError
from llm2slm_export.inference.encodings.cache import EncodingCache
from llm2slm_export.inference.orchestrator import BundlePart, Orchestrator, load
from llm2slm_export.inference.scheduler import Scheduler
from llm2slm_export.serving.api_errors import RETRY_AFTER, ApiError
from llm2slm_export.serving.app import AppOptions, ServerState, create_app
from llm2slm_export.serving.asgi_exchange import HttpRequest, HttpResponse, exchange, response_of
from llm2slm_export.serving.gate import Gate, read_api_keys
from llm2slm_export.serving.protocol import ErrorResponse
from llm2slm_export.serving.ray_options import RayOptions, ray_options
from llm2slm_export.serving.reader_client import ReaderClient
from llm2slm_export.serving.served_models import ServedModels

_ATTEMPTS = 3  # a node takes several replicas with it
_READER_TARGET = 4  # prompts at a reader, above which another one is started: more only wait for the batch before them
_log = logging.getLogger(__name__)


class PartReplica:
    """A part of the bundles, and the application that serves it.

    Args:
        options: the arguments of the application.
        part: the part that is loaded.
        reader: handle of the readers, for a writer.
    """

    def __init__(self, options: RayOptions, part: BundlePart, reader: Any = None) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        self._stack, loaded = ExitStack(), list[tuple[str, Scheduler, Orchestrator]]()
        # Ray reserves cores, and limits nobody to them: `threads` does.
        runtime: dict[str, Any] = {"device": options.writer_device, "threads": options.writer_threads}
        if part == "reader":
            runtime = {
                "device": options.reader_device, "threads": options.reader_threads, "runtime": options.runtime,
            }  # fmt: skip
        limits = {
            "max_rows": options.max_rows, "max_waiting": options.max_waiting,
            "max_prefill_tokens": options.max_prefill_tokens,
        }  # fmt: skip
        cache = None
        if part == "reader" and options.cache_mb is not None:
            cache = EncodingCache(max_bytes=options.cache_mb * 10**6)
        try:
            for name, path in options.bundles:
                pair = self._stack.enter_context(load(path, part=part, cache=cache, **runtime))
                scheduler = self._stack.enter_context(Scheduler(pair, **limits))
                loaded.append((name, scheduler, pair))
            self._models, self._state = ServedModels(loaded, part=part), ServerState()
        except Llm2SlmError as error:
            self._stack.close()
            raise RuntimeError(str(error)) from None  # it does not survive Ray's pickling
        client = None
        if reader is not None:
            client = ReaderClient(
                "http://reader", transport=ReaderTransport(reader), name="The deployment Reader",
                max_waiting=options.max_waiting,
            )  # fmt: skip
        self._app = create_app(
            self._models,
            AppOptions(
                timeout=options.timeout, max_body_bytes=options.max_body_bytes, log_prompts=options.log_prompts,
                reader=client,
            ),
            self._state,
        )  # fmt: skip

    async def respond(self, request: HttpRequest) -> HttpResponse:
        """The whole response to a request."""
        return await response_of(self._app, request)

    async def stream(self, request: HttpRequest) -> AsyncGenerator[list[Message]]:
        """The messages of the response to a request, as they come."""
        async for messages in exchange(self._app, request):
            yield messages

    def check_health(self) -> None:
        """Have Ray replace the replica if a bundle takes no requests any more.

        Raises:
            RuntimeError: a scheduler has ended.
        """
        if not self._models.are_open:
            raise RuntimeError("A bundle's scheduler has ended.")

    def __del__(self) -> None:
        """Close the bundles. Ray calls this when the running requests have ended, or have had their time."""
        if hasattr(self, "_stack"):
            self._stack.close()


class ReaderTransport(httpx.AsyncBaseTransport):
    """Sends the requests of a `ReaderClient` through a handle.

    Args:
        reader: handle of the readers.
    """

    def __init__(self, reader: Any) -> None:
        self._respond = reader.options(method_name="respond")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The response to a request.

        Raises:
            httpx.ReadError: the replica is lost.
        """
        body = await request.aread()
        found = self._respond.remote(
            HttpRequest(
                request.method, request.url.path, request.url.query, tuple((name.lower(), value) for name, value in request.headers.raw), body
            )
        )  # fmt: skip
        try:
            response: HttpResponse = await found
        except RayTaskError as error:
            raise httpx.RequestError(_fact(error)) from None
        except (RayError, DeploymentUnavailableError) as error:
            raise httpx.ReadError(_fact(error)) from None
        except asyncio.CancelledError:
            found.cancel()
            raise
        return httpx.Response(response.status, headers=list(response.headers), content=response.body)


class Front:
    """Hands requests on to readers and writers. A response of which nothing was sent is asked for once more if its replica is lost.

    Args:
        options: the arguments of the application.
        writer, reader: handles of the parts.
    """

    def __init__(self, options: RayOptions, writer: Any, reader: Any) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        try:
            keys = () if options.api_key_file is None else read_api_keys(options.api_key_file)
        except Llm2SlmError as error:
            raise RuntimeError(str(error)) from None
        self._writer = writer.options(method_name="stream", stream=True)
        self._reader = reader.options(method_name="stream", stream=True)
        self._gate = Gate(
            self._serve, keys=keys, max_body_bytes=options.max_body_bytes, body_timeout=AppOptions.body_timeout,
            on_error=lambda _: None,
        )  # fmt: skip

    async def __call__(self, _: Request) -> Response:
        """The response to a request."""
        return _AppResponse(self._gate)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()  # the gate hands the whole body on
        if scope["type"] != "http" or message["type"] != "http.request":
            return
        try:
            if scope["path"] == "/metrics":
                raise ApiError(
                    404, "Replicas have no metrics here: each request reaches another one.\n  → read the metrics of Ray"
                )
            if scope["path"] == "/live":
                await Response()(scope, receive, send)
                return
            headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
            request = HttpRequest(
                scope["method"], scope["path"], scope["query_string"], headers, bytes(message["body"])
            )
            part = self._reader if scope["path"] == "/v1/encodings" else self._writer
            await self._hand_on(part, request, _Response(send))
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)

    async def _hand_on(self, part: Any, request: HttpRequest, response: "_Response") -> None:
        """Have a replica respond, or another one if it is lost.

        Raises:
            ApiError: none did, and nothing was sent.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            found = part.remote(request)
            try:
                async for messages in found:
                    await response.send(messages)
                return
            except BackPressureError:
                raise ApiError(
                    429, "The replicas are busy, and the queue before them is full.\n"
                    "  → send the request again later, or raise max_waiting or the number of replicas",
                    kind="rate_limit_exceeded", code="queue_full", headers={"Retry-After": str(RETRY_AFTER)},
                ) from None  # fmt: skip
            except (RayError, DeploymentUnavailableError) as error:
                if response.is_complete:
                    return
                _log.warning("attempt %d at %s: %s", attempt, request.path, _fact(error))
                if isinstance(error, RayTaskError) or response.is_begun:
                    failure = ApiError(
                        500, "The replica that was responding has failed.\n  → send the request again",
                        kind="server_error", code="replica_failed",
                    )  # fmt: skip
                    if not response.is_begun:
                        raise failure from None
                    await response.end(failure)
                    return
                response.forget()
            except BaseException:  # the client has gone
                found.cancel()
                raise
        raise ApiError(
            503, f"{_ATTEMPTS} replicas were lost while they responded.\n  → send the request again later",
            kind="service_unavailable", code="replica_lost", headers={"Retry-After": str(RETRY_AFTER)},
        )  # fmt: skip


class _Response:
    """A response on its way to the client. Its head waits for the first bytes of its body."""

    def __init__(self, send: Send) -> None:
        self._send, self._head = send, list[Message]()
        self.is_begun = self.is_complete = False

    async def send(self, messages: list[Message]) -> None:
        for message in messages:
            is_last = not message.get("more_body")
            if message["type"] == "http.response.start" or not (message.get("body") or is_last or self.is_begun):
                self._head.append(message)
                continue
            for waiting in self._head:
                await self._send(waiting)
            self._head, self.is_begun = [], True
            await self._send(message)
            self.is_complete = is_last

    def forget(self) -> None:
        """The head, of which nothing was sent."""
        self._head = []

    async def end(self, error: ApiError) -> None:
        """End a stream with an error, as the server does."""
        event = f"data: {ErrorResponse.model_validate(error.body).model_dump_json()}\n\n"
        await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})


class _AppResponse(Response):
    """The response that an ASGI application makes."""

    def __init__(self, app: Any) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The routes, and the gate, know no prefix.
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
        await self._app({**scope, "path": path, "root_path": ""}, receive, send)


@dataclass(frozen=True)
class _Resources:
    """What a part's replicas have, and how many there are."""

    replicas: str
    threads: int
    device: str
    gpus: float | None
    target: int  # requests of a replica, above which another one is started

    def deployment(self, options: RayOptions) -> dict[str, Any]:
        """The options of the deployment."""
        gpus = self.gpus if self.gpus is not None else 0 if self.device == "cpu" else 1
        found: dict[str, Any] = {
            "ray_actor_options": {"num_cpus": self.threads, "num_gpus": gpus},
            "graceful_shutdown_timeout_s": options.drain, "graceful_shutdown_wait_loop_s": 0.5,
            "health_check_period_s": 5, "health_check_timeout_s": 30,
        }  # fmt: skip
        least, dash, most = self.replicas.partition("-")
        if not dash:
            return {**found, "num_replicas": int(least)}
        scaling = {"min_replicas": int(least), "max_replicas": int(most), "target_ongoing_requests": self.target}
        return {**found, "autoscaling_config": {**scaling, **options.autoscaling}}


def build(arguments: Mapping[str, Any]) -> Any:
    """The application, for `serve run` and `serve deploy`.

    Args:
        arguments: those of `RayOptions`.

    Raises:
        UsageError: some are wrong; all of them are named.
    """
    options = ray_options(arguments)
    of_reader = _Resources(
        options.reader_replicas, options.reader_threads, options.reader_device, options.reader_gpus, _READER_TARGET
    )
    of_writer = _Resources(
        options.writer_replicas, options.writer_threads, options.writer_device, options.writer_gpus, options.max_rows
    )
    # The scheduler makes the batches, by their tokens; it drops the prompts of clients that left, and those that are too late.
    reader = serve.deployment(
        PartReplica, name="Reader", max_ongoing_requests=options.max_waiting, **of_reader.deployment(options)
    ).bind(options, "reader")
    # While the rows of some run, the prompts of others are encoded. The rest waits for any replica, a new one too.
    writer = serve.deployment(
        PartReplica, name="Writer", max_ongoing_requests=2 * options.max_rows, max_queued_requests=options.max_waiting,
        **of_writer.deployment(options),
    ).bind(options, "writer", reader)  # fmt: skip
    return serve.deployment(
        Front, name="Front", num_replicas=options.front_replicas, max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=options.drain,
    ).bind(options, writer, reader)  # fmt: skip


def _fact(error: Exception) -> str:
    """One line on an error of Ray. The message of a task's error is a traceback."""
    if isinstance(error, RayTaskError):
        return f"the replica raised {type(error.cause).__name__}"
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
