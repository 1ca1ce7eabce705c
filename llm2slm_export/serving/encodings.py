"""Encodings over HTTP: a request for the encodings of prompts, and encodings in bodies, as base64."""

import asyncio
import base64
import binascii
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future

from llm2slm_export.errors import EncodingError, Llm2SlmError, RequestCancelledError
from llm2slm_export.inference.encodings.host_encoding import HostEncoding
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.serving.api_errors import api_error, refused_prompt, require_few
from llm2slm_export.serving.metrics import ServerMetrics
from llm2slm_export.serving.protocol import EncodedPrompt, Encodings, EncodingsBody, Usage
from llm2slm_export.serving.served_models import ServedModel

_log = logging.getLogger(__name__)


class EncodingsRequest:
    """One request for the encodings of prompts.

    Args:
        body: the request.
        model: the model.
        metrics: record the request.
        log_prompts: whether prompts are written to the log.
        default_timeout: seconds until the request ends with an error, if it gives none; None: never.
    """

    def __init__(
        self, body: EncodingsBody, model: ServedModel, metrics: ServerMetrics, *, log_prompts: bool,
        default_timeout: float | None,
    ) -> None:  # fmt: skip
        self._body, self._model, self._metrics, self._log_prompts = body, model, metrics, log_prompts
        self._timeout = body.timeout if body.timeout is not None else default_timeout
        self._id, self._started, self._outcome = f"enc-{uuid.uuid4().hex}", time.perf_counter(), "cancelled"
        self._futures: list[Future[HostEncoding]] = []
        self._is_cancelled = False

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    async def prepare(self) -> None:
        """Nothing: the prompts are encoded here."""

    def submit(self) -> None:
        """Tokenize and submit the prompts: all of them or none.

        Raises:
            ApiError: one of them is refused, or there is no room.
        """
        prompts, scheduler = self._body.prompts, self._model.scheduler
        require_few("prompts", len(prompts), scheduler.max_waiting)
        head = self._model.pair.manifest.head
        for index, prompt in enumerate(prompts):
            # The client may go while another thread submits its prompts.
            if self._is_cancelled:
                break
            try:
                self._futures.append(
                    scheduler.encode(
                        prompt,
                        head=head,
                        timeout=self._timeout,
                        truncate=self._body.truncate,
                        max_prompt_tokens=self._body.max_prompt_tokens,
                    )
                )
            except Llm2SlmError as error:
                self.cancel()
                raise refused_prompt(error, "prompt", index, len(prompts)) from None
        if self._is_cancelled:
            self.cancel()

    def cancel(self) -> None:
        """End the request: prompts that wait are not encoded."""
        self._is_cancelled = True
        for future in self._futures:
            future.cancel()

    async def complete(self) -> list[HostEncoding]:
        """The encodings, one for each prompt.

        Raises:
            ApiError: a prompt's request failed.
        """
        try:
            encodings = await asyncio.gather(*map(asyncio.wrap_future, self._futures))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # the client has gone
            raise api_error(RequestCancelledError("The request was cancelled.", remedy="submit it again")) from None
        except Llm2SlmError as error:
            self._outcome = "failed"
            raise api_error(error) from None
        self._outcome = "encoded"
        self._metrics.encoded(self._model.name, encodings, time.perf_counter() - self._started)
        return encodings

    def finish(self) -> None:
        """Cancel what is still running, and write the request's line to the log."""
        self.cancel()
        facts = {
            "id": self._id, "model": self._model.name, "user": self._body.user, "outcome": self._outcome,
            "prompts": len(self._futures), "ms": round((time.perf_counter() - self._started) * 1e3, 1),
            "prompt": self._body.prompts if self._log_prompts else None,
        }  # fmt: skip
        _log.info(" ".join(f"{name}={value!r}" for name, value in facts.items() if value is not None))


def encodings_body(model: str, encodings: Sequence[HostEncoding]) -> bytes:
    """The JSON body of encodings, one for each prompt."""
    data = [
        EncodedPrompt(
            index=index, encoding=base64.b64encode(encoding.to_bytes()).decode(), prompt_tokens=encoding.prompt_tokens[0],
            dropped_tokens=encoding.dropped_tokens[0] or None, cached=encoding.cached[0] if encoding.cached else None,
            timings_ms={stage: round(ms, 3) for stage, ms in encoding.timings_ms.items()},
        )
        for index, encoding in enumerate(encodings)
    ]  # fmt: skip
    tokens = sum(item.prompt_tokens for item in data)
    usage = Usage(prompt_tokens=tokens, completion_tokens=0, total_tokens=tokens)
    return Encodings(model=model, data=data, usage=usage).model_dump_json().encode()


def read_encoding(text: str, pair: Orchestrator) -> HostEncoding:
    """The encoding of one prompt in a request's body.

    Raises:
        EncodingError: it is not base64, damaged, not an encoding, one of several prompts, or one of another pair.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EncodingError(
            "The encoding is not base64.",
            str(error),
            remedy="send what /v1/encodings returned, or a file of it in base64",
        ) from None
    encoding = pair.encoding_from_bytes(data)
    if len(encoding) != 1:
        raise EncodingError(f"The encoding has {len(encoding)} prompts.", remedy="send the encoding of one prompt")
    return encoding
