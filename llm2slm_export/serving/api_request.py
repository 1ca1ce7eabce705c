"""A request for responses: its submission, the complete response body, and the stream of its chunks."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from llm2slm_export.errors import Llm2SlmError, RequestCancelledError
from llm2slm_export.inference.encodings.host_encoding import HostEncoding
from llm2slm_export.inference.generation.options import GenerationOptions
from llm2slm_export.inference.outputs import Generation, Step
from llm2slm_export.inference.submission import Finished, NewToken, Submission
from llm2slm_export.inference.tokenization import PromptIds
from llm2slm_export.serving.api_errors import (
    ApiError,
    api_error,
    labelled,
    refused_fields,
    refused_prompt,
    require_few,
)
from llm2slm_export.serving.encodings import read_encoding
from llm2slm_export.serving.mailboxes import Mailbox, Mailboxes
from llm2slm_export.serving.metrics import ServerMetrics
from llm2slm_export.serving.protocol import (
    Chat,
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    ErrorResponse,
    TokenLogprob,
    Usage,
)
from llm2slm_export.serving.reader_client import ReaderClient
from llm2slm_export.serving.served_models import ServedModel

# An event, and the index of its prompt.
Arrived = tuple[int, NewToken | Finished]
_KEEP_ALIVE = 15.0  # seconds of silence after which a stream sends a comment, so that proxies keep it open
_log = logging.getLogger(__name__)


@dataclass
class _Choice:
    """One response as it arrives."""

    steps: list[Step] = field(default_factory=list)
    characters: int = 0
    last: float | None = None  # when its last token arrived


class ApiRequest:
    """One request for responses.

    Args:
        body: the request.
        model: the model.
        metrics: record the request.
        mailboxes: bring the events from the scheduler's thread.
        log_prompts: whether prompts and responses are written to the log.
        default_timeout: seconds until the request ends with an error, if it gives none; None: never.
        reader: encodes the prompts; None: they are encoded here.
    """

    def __init__(
        self, body: CompletionBody | ChatBody, model: ServedModel, metrics: ServerMetrics, mailboxes: Mailboxes[Arrived], *,
        log_prompts: bool, default_timeout: float | None, reader: ReaderClient | None = None,
    ) -> None:  # fmt: skip
        self._body, self._model, self._log_prompts = body, model, log_prompts
        self._metrics, self._mailboxes = metrics, mailboxes
        self._timeout = body.timeout if body.timeout is not None else default_timeout
        self._is_chat = isinstance(body, ChatBody)
        self.id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created, self._started = int(time.time()), time.perf_counter()
        self._reader = reader
        self._reading: asyncio.Task[list[HostEncoding]] | None = None
        self._submissions: list[Submission] = []
        self._choices: dict[tuple[int, int], _Choice] = {}
        self._generations: dict[int, tuple[Generation, ...]] = {}
        self._sequences = 1  # responses to a prompt
        self._outcome = "cancelled"
        self._is_cancelled = False

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    async def prepare(self) -> None:
        """Have the prompts encoded by the reader, if there is one, once they and the options are found to be right.

        Raises:
            ApiError: one of them is refused, there is no room, or the reader fails.
        """
        if self._reader is None or not self._body.prompts:
            return
        rows = await asyncio.to_thread(self._tokenized)
        self._reading = asyncio.create_task(
            self._reader.encode(
                self._model,
                self._body.prompts,
                rows,
                self._metrics,
                truncate=self._body.truncate,
                timeout=self._timeout,
            )
        )
        try:
            await self._reading
        except ApiError as error:
            raise labelled(error, self._param, 0, 1) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # the client has gone
        if self._is_cancelled:
            raise api_error(RequestCancelledError("The request was cancelled.", remedy="submit it again"))

    def submit(self) -> None:
        """Tokenize and submit the prompts: all of them or none.

        Raises:
            ApiError: one of them is refused, or there is no room.
        """
        body, pair, timeout = self._body, self._model.pair, self._timeout
        given: Sequence[str | HostEncoding] = body.prompts or body.encodings
        if self._reading is not None:
            given = self._reading.result()
            if timeout is not None:
                timeout = max(timeout - (time.perf_counter() - self._started), 1e-3)
        self._require_few(len(given))
        try:
            self._check(pair.options(**self._options))
            for prompt in given:
                # The client may go while another thread submits its prompts.
                if self._is_cancelled:
                    return
                if body.encodings and isinstance(prompt, str):
                    prompt = read_encoding(prompt, pair)
                truncate = body.truncate and isinstance(prompt, str)
                submission = self._model.scheduler.submit(
                    prompt, head=pair.manifest.head, timeout=timeout, truncate=truncate, **self._options
                )
                self._submissions.append(submission)
            if self._is_cancelled:
                self.cancel()
        except Llm2SlmError as error:
            self.cancel()
            raise refused_prompt(error, self._param, len(self._submissions), len(given)) from None

    @property
    def _param(self) -> str:
        """The field of the prompts."""
        return "encoding" if self._body.encodings else "messages" if self._is_chat else "prompt"

    @property
    def _options(self) -> dict[str, Any]:
        """The generation options that the request gives."""
        return self._body.options(samples=self._model.pair.manifest.generation.do_sample)

    def _require_few(self, count: int) -> None:
        require_few("encodings" if self._body.encodings else "prompts", count, self._model.scheduler.max_waiting)

    def _tokenized(self) -> list[PromptIds]:
        """The prompts' ids, with all checks of `submit`.

        Raises:
            ApiError: as `submit`.
        """
        pair, rows = self._model.pair, list[PromptIds]()
        self._require_few(len(self._body.prompts))
        try:
            self._model.scheduler.check_room()
            self._check(pair.options(**self._options))
            for prompt in self._body.prompts:
                rows.append(pair.prepare(prompt, truncate=self._body.truncate, **self._options)[0])
        except Llm2SlmError as error:
            raise refused_prompt(error, self._param, len(rows), len(self._body.prompts)) from None
        return rows

    def _check(self, options: GenerationOptions) -> None:
        """Refuse what beams do not have: the best one is known only at the end.

        Raises:
            ApiError: a stream, or log-probabilities, are asked for.
        """
        self._sequences = options.num_return_sequences
        asked = {"stream": self._body.stream, "logprobs": self._body.wants_logprobs}
        problems = [
            f"{name}: not with num_beams, {options.num_beams}; set num_beams to 1"
            for name, is_asked in asked.items()
            if is_asked
        ]
        if options.num_beams > 1 and problems:
            raise refused_fields(problems, problems[0].partition(":")[0])

    def cancel(self) -> None:
        """End the request: its rows leave before the next decoder call."""
        self._is_cancelled = True
        if self._reading is not None and not self._reading.done():
            self._reading.cancel()
        for submission in self._submissions:
            submission.cancel()

    async def complete(self) -> BaseModel:
        """The complete body of the response.

        Raises:
            ApiError: a prompt's request failed.
        """
        async for _ in self._events():
            pass
        if self._is_chat:
            return Chat(
                id=self.id, created=self._created, model=self._model.name, usage=self._usage(),
                choices=[self._chat_choice(index, key, generation) for index, (key, generation) in enumerate(self._responses())],
            )  # fmt: skip
        return Completion(
            id=self.id, created=self._created, model=self._model.name, usage=self._usage(),
            choices=[
                CompletionChoice(
                    index=index, text=generation.text, finish_reason=generation.finish_reason,
                    logprobs=self._completion_logprobs(self._choices[key]) if self._body.wants_logprobs else None,
                    **_pair_fields(generation),
                )
                for index, (key, generation) in enumerate(self._responses())
            ],
        )  # fmt: skip

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The responses as server-sent events. An error after the first one is an event too."""
        usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        try:
            # They wait for the first event: a stream that has sent nothing can still be begun again elsewhere.
            chats = range(self._sequences) if self._is_chat else ()
            roles = [
                self._event(self._chat_chunk(index, Delta(role="assistant", content="")), usage) for index in chats
            ]
            async for arrived in self._events():
                if not arrived:
                    yield b": keep-alive\n\n"
                    continue
                # A token that releases no text has no chunk.
                chunks = [self._event(chunk, usage) for event in arrived for chunk in self._of_event(*event)]
                if roles or chunks:
                    yield b"".join(roles + chunks)
                    roles = []
            if usage:
                yield self._event(self._chunk_of([], usage=self._usage()), usage)
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            self._metrics.error(error.status)
            yield _sse(ErrorResponse.model_validate(error.body))

    async def _events(self) -> AsyncIterator[list[Arrived]]:
        """The events of all prompts, recorded: those that have arrived meanwhile. Empty: nothing has for a while.

        Raises:
            ApiError: a prompt's request failed.
        """
        mailbox = self._mailboxes.open()
        for prompt, submission in enumerate(self._submissions):
            submission.listen(self._listener(mailbox, prompt))
        while len(self._generations) < len(self._submissions):
            arrived = await mailbox.take(_KEEP_ALIVE)
            now, failure, complete = time.perf_counter(), None, list[Arrived]()
            for prompt, event in arrived:
                if isinstance(event, NewToken):
                    self._add_token(prompt, event, now)
                elif event.error is not None:
                    failure = event.error
                    break
                else:
                    self._add_responses(prompt, event, now)
                complete.append((prompt, event))
            if complete or not arrived:
                yield complete
            if failure is not None:
                self._outcome = "failed"
                raise api_error(failure)
        self._outcome = "finished"

    def _listener(self, mailbox: Mailbox[Arrived], prompt: int) -> Callable[[NewToken | Finished], None]:
        return lambda event: self._mailboxes.put(mailbox, (prompt, event))

    def _add_token(self, prompt: int, event: NewToken, now: float) -> None:
        choice = self._choices.setdefault((prompt, event.sequence), _Choice())
        choice.steps.append(event.step)
        if choice.last is None:
            self._metrics.first_token(self._model.name, now - self._started)
        else:
            self._metrics.token_gap(self._model.name, now - choice.last)
        choice.last = now

    def _add_responses(self, prompt: int, event: Finished, now: float) -> None:
        self._generations[prompt] = event.generations
        for generation in event.generations:
            self._choices.setdefault((prompt, generation.sequence), _Choice())
        self._metrics.finished(self._model.name, event.generations, now - self._started)

    def finish(self) -> None:
        """Cancel what is still running, and write the request's line to the log."""
        self.cancel()
        found = [generation for generations in self._generations.values() for generation in generations]
        facts: dict[str, Any] = {
            "id": self.id, "model": self._model.name, "user": self._body.user, "outcome": self._outcome,
            "prompts": len(self._submissions), "new_tokens": sum(generation.new_tokens for generation in found) or sum(len(c.steps) for c in self._choices.values()),
            "ms": round((time.perf_counter() - self._started) * 1e3, 1),
        }  # fmt: skip
        if self._log_prompts:
            facts |= {"prompt": self._body.prompts, "response": [generation.text for generation in found]}
        _log.info(" ".join(f"{name}={value!r}" for name, value in facts.items() if value is not None))

    def _responses(self) -> list[tuple[tuple[int, int], Generation]]:
        return [
            ((prompt, generation.sequence), generation)
            for prompt in sorted(self._generations)
            for generation in self._generations[prompt]
        ]

    def _usage(self) -> Usage:
        found = [generation for _, generation in self._responses()]
        prompt = sum(generation.prompt_tokens for generation in found if generation.sequence == 0)
        new = sum(generation.new_tokens for generation in found)
        return Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)

    def _chat_choice(self, index: int, key: tuple[int, int], generation: Generation) -> ChatChoice:
        logprobs = _chat_logprobs(self._choices[key].steps) if self._body.wants_logprobs else None
        return ChatChoice(
            index=index, message=ChatMessage(content=generation.text), finish_reason=generation.finish_reason,
            logprobs=logprobs, **_pair_fields(generation),
        )  # fmt: skip

    def _completion_logprobs(self, choice: _Choice, steps: Sequence[Step] | None = None) -> CompletionLogprobs:
        """Of a choice's steps, all of them by default. `choice.characters` is where they begin."""
        tokens = choice.steps if steps is None else steps
        offsets = []
        for step in tokens:
            offsets.append(choice.characters)
            choice.characters += len(step.text)
        return CompletionLogprobs(
            tokens=[step.text for step in tokens],
            token_logprobs=[step.logprob or 0.0 for step in tokens],
            text_offset=offsets,
        )

    def _of_event(self, prompt: int, event: NewToken | Finished) -> list[BaseModel]:
        """The chunks of an event."""
        sequences = self._sequences
        if isinstance(event, NewToken):
            index, step = prompt * sequences + event.sequence, event.step
            if not step.text and not self._body.wants_logprobs:
                return []
            if self._is_chat:
                logprobs = _chat_logprobs([step]) if self._body.wants_logprobs else None
                return [self._chat_chunk(index, Delta(content=step.text), logprobs=logprobs)]
            choice = self._choices[prompt, event.sequence]
            found = self._completion_logprobs(choice, [step]) if self._body.wants_logprobs else None
            return [self._chunk_of([CompletionChoice(index=index, text=step.text, logprobs=found, finish_reason=None)])]
        chunks: list[BaseModel] = []
        for generation in event.generations:
            index, reason = prompt * sequences + generation.sequence, generation.finish_reason
            more: dict[str, Any] = {"finish_reason": reason, **_pair_fields(generation)}
            if self._is_chat:
                chunks.append(self._chat_chunk(index, Delta(), **more))
            else:
                chunks.append(self._chunk_of([CompletionChoice(index=index, text="", **more)]))
        return chunks

    def _chat_chunk(self, index: int, delta: Delta, **more: Any) -> BaseModel:
        return self._chunk_of([ChatChunkChoice(index=index, delta=delta, **more)])

    def _chunk_of(self, choices: list[Any], usage: Usage | None = None) -> BaseModel:
        kind = ChatChunk if self._is_chat else Completion
        return kind(id=self.id, created=self._created, model=self._model.name, choices=choices, usage=usage)

    @staticmethod
    def _event(chunk: BaseModel, usage: bool) -> bytes:
        """A chunk as a server-sent event. With `usage` every chunk has the field, which is null until the last."""
        return _sse(chunk, None if usage else {"usage"})


def _pair_fields(generation: Generation) -> dict[str, Any]:
    return {
        "timings_ms": {stage: round(ms, 3) for stage, ms in generation.timings_ms.items()},
        "cached": generation.cached,
        "dropped_tokens": generation.dropped_tokens or None,
        "warnings": list(generation.warnings) or None,
    }


def _chat_logprobs(steps: Sequence[Step]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            TokenLogprob(token=step.text, logprob=step.logprob or 0.0, bytes=list(step.text.encode())) for step in steps
        ]
    )


def _sse(body: BaseModel, exclude: set[str] | None = None) -> bytes:
    text = body.model_dump_json(exclude=exclude)
    # Some clients end a line at these.
    for end in "\x85\u2028\u2029":
        text = text.replace(end, f"\\u{ord(end):04x}")
    return f"data: {text}\n\n".encode()
