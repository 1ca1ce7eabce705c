"""The FastAPI application: OpenAI's routes over schedulers, and those of operations."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import llm2slm_export
from llm2slm_export.errors import Llm2SlmError
from llm2slm_export.inference.encodings.host_encoding import HostEncoding
from llm2slm_export.inference.orchestrator import BundlePart
from llm2slm_export.inference.outputs import PromptScores
from llm2slm_export.serving.api_errors import ApiError, api_error, draining, refused_fields
from llm2slm_export.serving.api_request import ApiRequest, Arrived
from llm2slm_export.serving.encodings import EncodingsRequest, encodings_body, read_encoding
from llm2slm_export.serving.gate import Gate
from llm2slm_export.serving.mailboxes import Mailboxes
from llm2slm_export.serving.metrics import ServerMetrics
from llm2slm_export.serving.protocol import (
    Chat,
    ChatBody,
    ChatChunk,
    Completion,
    CompletionBody,
    Encodings,
    EncodingsBody,
    ErrorResponse,
    Model,
    Models,
    RequestBody,
    ResponseScore,
    ScoreBody,
    Scores,
    Usage,
)
from llm2slm_export.serving.reader_client import ReaderClient
from llm2slm_export.serving.served_models import ServedModel, ServedModels
from llm2slm_export.serving.streams import ClientGoneError, EventStream, unless_gone

_Result = TypeVar("_Result")
_Request = TypeVar("_Request", bound=ApiRequest | EncodingsRequest)
_BYTES = "application/octet-stream"
_log = logging.getLogger(__name__)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The request is invalid, or asks for what is not supported.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "The queue is full.",
        500: "The request failed.",
        502: "The reader failed, or serves another bundle.",
        503: "The server is shutting down, or its reader cannot be reached.",
        504: "The request was not finished in time.",
    }.items()
}

# The page is one file, and asks this server alone.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_BODIES: dict[str, type[RequestBody]] = {
    "/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody, "/v1/score": ScoreBody,
    "/v1/encodings": EncodingsBody,
}  # fmt: skip
_CHUNKS: dict[str, type[BaseModel]] = {"/v1/completions": Completion, "/v1/chat/completions": ChatChunk}


@dataclass(frozen=True)
class AppOptions:
    """Options of the application.

    Args:
        api_keys: keys of which a request below /v1/ must have one; empty: none is needed.
        timeout: seconds until a request ends with an error, if it gives no timeout; None: never.
        max_body_bytes: maximum size of a request's body.
        body_timeout: seconds in which a body must arrive.
        cors_origins: origins whose pages may use the server.
        log_prompts: whether prompts and responses are written to the log.
        reader: encodes the prompts of a writer; None: a writer takes encodings alone.
    """

    api_keys: Sequence[str] = ()
    timeout: float | None = None
    max_body_bytes: int = 1_000_000
    body_timeout: float = 30.0
    cors_origins: Sequence[str] = ()
    log_prompts: bool = False
    reader: ReaderClient | None = None


class ServerState:
    """What the routes share with the server.

    Attributes:
        draining: whether new requests are refused.
        active: number of requests that are being served.
        requests: those of them that are for responses or encodings.
        on_shutdown: called when the server has ended.
    """

    def __init__(self) -> None:
        self.draining, self.active = False, 0
        self.requests: set[ApiRequest | EncodingsRequest] = set()
        self.on_shutdown: list[Callable[[], Awaitable[None]]] = []

    def cancel(self) -> None:
        """End all requests for responses or encodings."""
        for request in self.requests:
            request.cancel()


def create_app(models: ServedModels, options: AppOptions | None = None, state: ServerState | None = None) -> ASGIApp:
    """The application that serves models.

    Args:
        models: the models. The application does not close them.
        options: None: the defaults.
        state: shared with the caller; None: a new one.
    """
    options, state = options or AppOptions(), state or ServerState()
    writes = models.part != "reader"
    metrics, started = ServerMetrics(models.schedulers), int(time.time())
    mailboxes = Mailboxes[Arrived]()
    page = files("llm2slm_export.serving").joinpath("page.html").read_text(encoding="utf-8")
    if options.reader is not None:
        state.on_shutdown.append(options.reader.close)
    app = FastAPI(
        title="llm2slm-export", version=llm2slm_export.__version__, docs_url=None, redoc_url=None,
        description="Pairs of a large language model that reads and a small one that writes, behind OpenAI's protocol.",
    )  # fmt: skip

    def failed(error: ApiError) -> JSONResponse:
        metrics.error(error.status)
        return JSONResponse(error.body, error.status, error.headers)

    async def served(http: Request, work: Callable[[], Awaitable[_Result]]) -> _Result | Response:
        """The result of `work`, counted as an active request; an error as a response."""
        if state.draining:
            return failed(draining())
        state.active += 1
        try:
            return await unless_gone(http, work())
        except ApiError as error:
            return failed(error)
        except Llm2SlmError as error:
            return failed(api_error(error))
        except ClientGoneError:
            return Response(status_code=499)  # nobody receives it
        finally:
            state.active -= 1

    def end(request: ApiRequest | EncodingsRequest) -> None:
        state.requests.discard(request)
        request.finish()

    async def submitted(request: _Request) -> _Request:
        state.requests.add(request)
        try:
            await request.prepare()
            await asyncio.to_thread(request.submit)
        except BaseException:
            end(request)
            raise
        return request

    def check_prompt(param: str, prompts: Sequence[str]) -> None:
        """Refuse prompts that nothing here encodes."""
        if prompts and models.part == "writer" and options.reader is None:
            raise ApiError(
                400, "This server has the decoders alone, and no --reader: it generates from encodings.\n"
                f"  → give encoding, from a reader's /v1/encodings, instead of {param}", param=param,
            )  # fmt: skip

    async def responded(http: Request, body: CompletionBody | ChatBody) -> Any:
        check_part(models, "writer")
        check_prompt("messages" if isinstance(body, ChatBody) else "prompt", body.prompts)

        async def submitted_body() -> ApiRequest:
            request = ApiRequest(
                body, models.find(body.model), metrics, mailboxes,
                log_prompts=options.log_prompts, default_timeout=options.timeout, reader=options.reader,
            )  # fmt: skip
            return await submitted(request)

        async def complete() -> Any:
            request = await submitted_body()
            try:
                # FastAPI would validate the body again.
                return Response((await request.complete()).model_dump_json(), media_type="application/json")
            finally:
                end(request)

        if not body.stream:
            return await served(http, complete)
        request = await served(http, submitted_body)
        if isinstance(request, Response):
            return request
        state.active += 1

        def end_stream() -> None:
            end(request)
            state.active -= 1

        return EventStream(request.chunks(), end_stream)

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def list_models() -> Models:
        """List the models: each bundle, and its other heads as BUNDLE/HEAD."""
        return Models(data=[Model(id=model.name, created=started) for model in models])

    @app.get("/v1/models/{name:path}", responses={status: _ERRORS[status] for status in (401, 404)})
    async def show_model(name: str) -> Model:
        """Describe one model."""
        return Model(id=models.find(name).name, created=started)

    @app.post("/v1/completions", response_model=Completion, responses=_ERRORS, include_in_schema=writes)
    async def complete_prompt(http: Request, body: CompletionBody) -> Any:
        """Generate responses to prompts."""
        return await responded(http, body)

    @app.post("/v1/chat/completions", response_model=Chat, responses=_ERRORS, include_in_schema=writes)
    async def complete_chat(http: Request, body: ChatBody) -> Any:
        """Generate responses to a message of the user."""
        return await responded(http, body)

    @app.post(
        "/v1/encodings", response_model=Encodings, include_in_schema=models.part != "writer",
        responses={**_ERRORS, 200: {"content": {_BYTES: {"schema": {"type": "string", "format": "binary"}}}}},
    )  # fmt: skip
    async def encode_prompts(http: Request, body: EncodingsBody) -> Any:
        """Encode prompts, to generate from them later or elsewhere.

        With `Accept: application/octet-stream` the response to one prompt is the encoding's bytes.
        """
        check_part(models, "reader")
        wants_bytes = _BYTES in http.headers.get("accept", "").lower()

        async def encoded() -> Response:
            if wants_bytes and len(body.prompts) != 1:
                raise ApiError(
                    400, f"The request has {len(body.prompts)} prompts, and accepts {_BYTES}, which holds the encoding of one.\n"
                    "  → send one prompt, or accept application/json", param="prompt",
                )  # fmt: skip
            model = models.find(body.model)
            request = await submitted(
                EncodingsRequest(body, model, metrics, log_prompts=options.log_prompts, default_timeout=options.timeout)
            )
            try:
                encodings = await request.complete()
            finally:
                end(request)
            if wants_bytes:
                return Response(await asyncio.to_thread(encodings[0].to_bytes), media_type=_BYTES)
            content = await asyncio.to_thread(encodings_body, model.name, encodings)
            return Response(content, media_type="application/json")

        return await served(http, encoded)

    async def scored_encoding(body: ScoreBody, model: ServedModel) -> HostEncoding | None:
        """The encoding of a prompt to score responses to; None: it is encoded here."""
        if body.encoding is not None:
            return await asyncio.to_thread(read_encoding, body.encoding, model.pair)
        if options.reader is None:
            return None
        rows = await asyncio.to_thread(model.pair.tokenize, body.prompts, truncate=body.truncate)
        (encoding,) = await options.reader.encode(
            model, body.prompts, rows, metrics, truncate=body.truncate, timeout=options.timeout
        )
        return encoding

    @app.post("/v1/score", response_model=Scores, responses=_ERRORS, include_in_schema=writes)
    async def score_responses(http: Request, body: ScoreBody) -> Any:
        """Compute the log-probabilities of given responses to a prompt."""
        check_part(models, "writer")
        check_prompt("prompt", body.prompts)

        async def scored() -> Scores:
            model = models.find(body.model)

            encoding = await scored_encoding(body, model)

            def score() -> PromptScores:
                if encoding is not None:
                    scores = model.pair.score(encoding, body.responses, add_eos=body.add_eos)
                    return PromptScores(encoding.prompt_tokens[0], encoding.dropped_tokens[0], tuple(scores))
                (found,) = model.pair.score_batches(
                    [body.prompt or ""], [body.responses], batch_size=None, add_eos=body.add_eos, truncate=body.truncate
                )
                return found

            started = time.perf_counter()
            try:
                async with asyncio.timeout(options.timeout):
                    found = await asyncio.wrap_future(model.scheduler.run(score))
            except TimeoutError:
                raise ApiError(
                    504, f"The responses were not scored within {options.timeout:g} seconds.\n  → give fewer or shorter ones",
                    kind="timeout", code="deadline_exceeded",
                ) from None  # fmt: skip
            _log.info(
                "model=%r scored=%d ms=%.1f", model.name, len(found.scores), (time.perf_counter() - started) * 1e3
            )
            tokens = sum(len(score.token_ids) for score in found.scores)
            return Scores(
                model=model.name,
                data=[
                    ResponseScore(
                        index=index, text=score.text, logprob=score.logprob, token_logprobs=list(score.token_logprobs),
                        is_greedy=score.is_greedy,
                    )
                    for index, score in enumerate(found.scores)
                ],
                usage=Usage(prompt_tokens=found.prompt_tokens, completion_tokens=tokens, total_tokens=found.prompt_tokens + tokens),
            )  # fmt: skip

        return await served(http, scored)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_class=Response, responses={503: {"description": "The server is shutting down."}})
    async def health() -> Response:
        """Whether the server takes requests."""
        return Response(status_code=200 if models.are_open and not state.draining else 503)

    @app.head("/live", include_in_schema=False)
    @app.get("/live", response_class=Response)
    async def live() -> Response:
        """Whether the server's process answers, also while it shuts down."""
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of the package."""
        return {"version": llm2slm_export.__version__}

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Metrics in Prometheus' format."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    def openapi() -> dict[str, Any]:
        """The description of the routes, without FastAPI's status 422, with the streams and the API key."""
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            for chunk in _CHUNKS.values():
                found = chunk.model_json_schema(ref_template="#/components/schemas/{model}")
                for name, value in {**found.pop("$defs"), chunk.__name__: found}.items():
                    schema["components"]["schemas"].setdefault(name, value)
            if options.api_keys:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if options.api_keys and path.startswith("/v1/"):
                        operation["security"] = [{"key": []}]
                    if path in _CHUNKS:
                        operation["responses"]["200"]["content"]["text/event-stream"] = _event_schema(_CHUNKS[path])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    @app.exception_handler(ApiError)
    async def _of_api(_: Request, error: ApiError) -> JSONResponse:
        return failed(error)

    @app.exception_handler(RequestValidationError)
    async def _of_body(http: Request, error: RequestValidationError) -> JSONResponse:
        body = _BODIES.get(http.url.path, RequestBody)
        problems = [_problem(item, body) for item in error.errors()]
        named = [item["loc"][1] for item in error.errors() if len(item["loc"]) > 1 and isinstance(item["loc"][1], str)]
        # A rule on several fields names them itself.
        named += [name for problem in problems if (name := problem.partition(":")[0]) in body.model_fields]
        return failed(refused_fields(problems, next(iter(named), None)))

    @app.exception_handler(HTTPException)
    async def _of_http(_: Request, error: HTTPException) -> JSONResponse:
        remedy = "send JSON in UTF-8" if error.status_code == 400 else "the routes are listed in /openapi.json"
        text = f"{error.detail}.\n  → {remedy}"
        return failed(ApiError(error.status_code, text, headers=error.headers))

    @app.exception_handler(Exception)
    async def _of_any(_: Request, error: Exception) -> JSONResponse:
        # The log has the traceback.
        text = f"The request failed: {type(error).__name__}.\n  → report this error, with the server's log"
        return failed(ApiError(500, text, kind="server_error"))

    gate = Gate(
        app, keys=options.api_keys, max_body_bytes=options.max_body_bytes, body_timeout=options.body_timeout,
        on_error=metrics.error,
    )  # fmt: skip
    if not options.cors_origins:
        return gate
    # Outside the gate: a browser asks first, without a key, and must be able to read a refusal.
    return CORSMiddleware(gate, allow_origins=list(options.cors_origins), allow_methods=["*"], allow_headers=["*"])


def check_part(models: ServedModels, part: BundlePart) -> None:
    """Refuse a route that the part of the bundles that is loaded does not serve.

    Raises:
        ApiError: it has what the server has, and which other one serves the route.
    """
    if models.part in ("pair", part):
        return
    has, serves, other = {
        "reader": ("encoders and projectors", "serves /v1/encodings", "writer"),
        "writer": ("decoders", "generates from encodings", "reader"),
    }[models.part]
    raise ApiError(
        404, f"This server has the {has} alone: it {serves}.\n  → send the request to a {other}", code="other_part"
    )


def _event_schema(chunk: type[BaseModel]) -> dict[str, Any]:
    """The description of a stream's events: chunks, or an error, and the end."""
    values = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in (chunk.__name__, ErrorResponse.__name__)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": values}
    fields = {"data": {"anyOf": [{"const": "[DONE]"}, data]}}
    return {"itemSchema": {"type": "object", "required": ["data"], "properties": fields}}


def _problem(item: Any, body: type[RequestBody]) -> str:
    """One line for a problem of a body: the field, what is wrong, and what was given."""
    if item["type"] == "json_invalid":
        return f"the body is not JSON: {item['ctx']['error']} at character {item['loc'][-1]}"
    if item["loc"] == ("body",) and item["type"] in ("missing", "model_attributes_type", "dict_type"):
        return "the body is not a JSON object, or its Content-Type is not application/json"
    where = ".".join(_short(str(part)) for part in item["loc"] if part != "body") or "body"
    if item["type"] == "extra_forbidden":
        return f"{where}: {body.refusal(str(item['loc'][-1]))}"
    if item["type"] == "missing":
        return f"{where}: required, not given"
    if where == "body":
        return str(item["msg"])
    return f"{where}: {item['msg']} (got {_short(repr(item.get('input')))})"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:79]}…"
