"""Errors in OpenAI's shape, and the status of each kind of error."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm2slm_export.errors import (
    ClosedError,
    DeadlineError,
    EncodingError,
    Llm2SlmError,
    PromptError,
    QueueFullError,
    RequestCancelledError,
    ResponseError,
    UsageError,
)

RETRY_AFTER = 1  # seconds
# What the library's messages name, in the words of the protocol.
FIELDS = {"max_new_tokens": "max_tokens", "num_return_sequences": "n"}
_WORDS = {
    **FIELDS,
    "truncate=True": "truncate: true",
    "do_sample=True": "do_sample: true",
    "the scheduler's max_rows": "the server's --max-rows",
}
_OPTION = re.compile(r" \(--[a-z-]+\)")  # of the command line
_LISTED = 10  # problems in one message


class ApiError(Exception):
    """An error that a client receives.

    Args:
        status: HTTP status.
        message: the fact, the evidence and the remedy.
        kind: OpenAI's `type`.
        param: the field at fault.
        code: OpenAI's `code`.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refused_fields(problems: Sequence[str], param: str | None) -> ApiError:
    """A request with fields that are wrong, or that the server does not support; all of them are named."""
    more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    lines = "\n".join(f"  - {problem}" for problem in [*problems[:_LISTED], *more])
    return ApiError(400, f"The request is invalid.\n{lines}\n  → fix or remove these fields", param=param)


def refused_prompt(error: Llm2SlmError, param: str, index: int, count: int) -> ApiError:
    """The response to an error about one of a request's prompts, or of its encodings.

    Args:
        param: the field of the prompts.
        index: of the one that is refused.
        count: of all.
    """
    return labelled(api_error(error), param, index, count)


def labelled(error: ApiError, param: str, index: int, count: int) -> ApiError:
    """The same error with the field of the prompts, and the number of the one that is refused, if there are several."""
    if error.param == "prompt":
        error.param = param
    if count > 1:
        what = "Encoding" if param == "encoding" else "Prompt"
        error.message = f"{what} {index} of {count}, from 0: {error.message}"
    return error


def require_few(param: str, count: int, most: int) -> None:
    """Refuse more prompts, or encodings, than the queue holds.

    Raises:
        ApiError: with both numbers.
    """
    if count > most:
        raise ApiError(
            400, f"The request has {count} {param}; the queue holds at most {most}.\n  → send several requests",
            param=param.removesuffix("s"),
        )  # fmt: skip


def draining() -> ApiError:
    """The server is shutting down."""
    return ApiError(
        503, "The server is shutting down.\n  → send the request to another server, or again later",
        kind="service_unavailable", code="draining", headers={"Retry-After": str(RETRY_AFTER)},
    )  # fmt: skip


def api_error(error: Llm2SlmError) -> ApiError:
    """The response to an error of the pair or of its scheduler."""
    evidence = [_worded(line) for line in error.evidence]
    message = "\n".join([_worded(error.fact), *(f"  - {line}" for line in evidence), f"  → {_worded(error.remedy)}"])
    if isinstance(error, ClosedError):
        return ApiError(503, message, kind="service_unavailable", code="closed")
    if isinstance(error, QueueFullError):
        return ApiError(
            429, message, kind="rate_limit_exceeded", code="queue_full", headers={"Retry-After": str(RETRY_AFTER)}
        )
    if isinstance(error, DeadlineError):
        return ApiError(504, message, kind="timeout", code="deadline_exceeded")
    if isinstance(error, RequestCancelledError):
        return ApiError(503, message, kind="service_unavailable", code="cancelled")
    if isinstance(error, PromptError):
        return ApiError(400, message, param="prompt")
    if isinstance(error, ResponseError):
        return ApiError(400, message, param="responses")
    if isinstance(error, EncodingError):
        return ApiError(400, message, param="encoding")
    if isinstance(error, UsageError):
        name = next(iter(evidence), "").partition(":")[0]
        return ApiError(400, message, param=name if name.isidentifier() else None)
    return ApiError(500, message, kind="server_error")


def _worded(text: str) -> str:
    """A message of the library in the words of the protocol."""
    text = _OPTION.sub("", text)
    for word, other in _WORDS.items():
        text = text.replace(word, other)
    return text
