"""Requests of many callers that decode together.

One thread owns the pair. Between two decoder calls it drops the rows of finished, cancelled and overdue requests, and encodes
waiting prompts, whose rows join the others. At fp32 a request gets the tokens that it gets alone (docs/pairs.md).
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from llm2slm_export.errors import (
    ClosedError,
    DeadlineError,
    Llm2SlmError,
    QueueFullError,
    RequestCancelledError,
    UsageError,
)
from llm2slm_export.inference.batching import LONGEST_PER_SHORTEST
from llm2slm_export.inference.decode_core import DecodeCore
from llm2slm_export.inference.encodings.encoding import Encoding, join_rows, prompt_mask
from llm2slm_export.inference.encodings.host_encoding import HostEncoding
from llm2slm_export.inference.generation.options import GenerationOptions, is_number, is_whole
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.request_limits import rows_per_prompt
from llm2slm_export.inference.rows.beam_rows import BeamRows
from llm2slm_export.inference.rows.request_rows import RequestRows
from llm2slm_export.inference.rows.sampled_rows import SampledRows
from llm2slm_export.inference.runtime.backend import Conditioning, context_mask
from llm2slm_export.inference.submission import Event, Finished, NewToken, Submission
from llm2slm_export.inference.tokenization import PromptIds

Outcome = Literal["stop", "length", "encoded", "cancelled", "deadline", "failed"]
_Kind = Literal["prompt", "encoding", "encode"]
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class SchedulerStats:
    """A snapshot of a scheduler.

    Args:
        waiting, running: number of requests.
        rows: number of running decoder rows.
        submitted: number of requests that were accepted since the start. Each is waiting, running, or has one outcome.
        outcomes: number of finished requests by outcome. A request with several responses counts as `length` if one of them
            ended there. `encoded`: it asked for the prompt's encoding alone.
        prompt_tokens, new_tokens: number of tokens that were encoded, not counting those of cached prompts, and that were
            generated.
        calls: number of decoder calls after the prompt passes.
    """

    waiting: int
    running: int
    rows: int
    submitted: int
    outcomes: Mapping[Outcome, int]
    prompt_tokens: int
    new_tokens: int
    calls: int


class _Lane:
    """A head and the rows that run on it."""

    def __init__(self, pair: Orchestrator) -> None:
        self.pair, self.loop = pair, pair.decode_loop()
        self.core = DecodeCore(pair.backend)


@dataclass(eq=False)
class _Entry:
    """A request on its way."""

    submission: Submission
    lane: _Lane
    prompt: PromptIds | Encoding | HostEncoding
    options: GenerationOptions | None  # None: only the prompt's encoding is wanted
    timeout: float | None  # in seconds
    submitted: float = field(default_factory=perf_counter)
    group: RequestRows | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return 0 if self.options is None else rows_per_prompt(self.options)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt.ids) if isinstance(self.prompt, PromptIds) else self.prompt.prompt_tokens[0]

    @property
    def kind(self) -> _Kind:
        """Those of one kind are admitted together."""
        if self.options is None:
            return "encode"
        return "prompt" if isinstance(self.prompt, PromptIds) else "encoding"


class Scheduler:
    """Runs the requests of many callers on one pair. A context manager; thread-safe.

    The pair, and its heads, must not be used otherwise while the scheduler runs, except `encoding_from_bytes`. Requests are
    admitted in the order of their submission, together with younger ones of similar length.

    Args:
        pair: the loaded pair. It is not closed.
        max_rows: maximum running decoder rows, over all heads. A request has one, or `num_beams` or
            `num_return_sequences` of them.
        max_waiting: maximum waiting requests.
        max_prefill_tokens: maximum prompt tokens, with padding, that are encoded between two decoder calls. A longer prompt is
            encoded alone. While prompts are encoded, running responses pause.

    Raises:
        UsageError: an argument is not a positive whole number.
    """

    def __init__(
        self, pair: Orchestrator, *, max_rows: int = 16, max_waiting: int = 64, max_prefill_tokens: int = 2048
    ) -> None:
        for name, value in (
            ("max_rows", max_rows), ("max_waiting", max_waiting), ("max_prefill_tokens", max_prefill_tokens),
        ):  # fmt: skip
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} is {value!r}.", remedy="give a whole number, at least 1")
        limits = pair.backend.limits
        self._pair, self._max_waiting, self._max_prefill = pair, max_waiting, max_prefill_tokens
        self._max_rows = max_rows if limits is None else min(max_rows, limits.batch)
        self._lanes: dict[str, _Lane] = {}
        self._waiting: deque[_Entry] = deque()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running: list[_Entry] = []
        self._outcomes: Counter[Outcome] = Counter()
        self._submitted = self._prompt_tokens = self._new_tokens = self._calls = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="llm2slm-scheduler", daemon=True)
        self._thread.start()

    @property
    def max_waiting(self) -> int:
        """Maximum waiting requests."""
        return self._max_waiting

    @property
    def is_closed(self) -> bool:
        """Whether new requests are refused: after `close`, and if the scheduler's thread has failed."""
        return self._closing

    @property
    def stats(self) -> SchedulerStats:
        """The present state and the counts since the start."""
        with self._changed:
            return SchedulerStats(
                waiting=len(self._waiting), running=len(self._running), rows=self._rows, submitted=self._submitted,
                outcomes=dict(self._outcomes), prompt_tokens=self._prompt_tokens, new_tokens=self._new_tokens,
                calls=self._calls,
            )  # fmt: skip

    def submit(
        self,
        prompt: str | Encoding | HostEncoding,
        *,
        head: str | None = None,
        timeout: float | None = None,
        truncate: bool = False,
        split_special_tokens: bool = False,
        **options: Any,
    ) -> Submission:
        """Add a request. It is tokenized and checked before this returns.

        Args:
            prompt: the prompt, or the encoding of one prompt, which this pair or another process made. The rows of an encoding
                join the others as a prompt's do.
            head: name of the head; None: the pair's own.
            timeout: seconds after which the request ends with a `DeadlineError` and what was generated; None: never.
            truncate, split_special_tokens, options: as `Orchestrator.generate`, except those of `DraftOptions`.

        Raises:
            QueueFullError: `max_waiting` requests are waiting.
            ClosedError: the scheduler has been closed.
            UsageError: invalid options, or more rows than `max_rows`.
            PromptError: as `Orchestrator.generate`.
            EncodingError: it is an encoding of another pair.
        """
        lane = self._lane_with_room(head, timeout)
        read: PromptIds | Encoding | HostEncoding
        if isinstance(prompt, Encoding | HostEncoding):
            if truncate or split_special_tokens:
                raise UsageError(
                    "truncate and split_special_tokens are for a prompt, not for its encoding.", remedy="leave them out"
                )
            read, resolved = prompt, lane.pair.prepare_from(prompt, **options)
        else:
            read, resolved = lane.pair.prepare(
                prompt, truncate=truncate, split_special_tokens=split_special_tokens, **options
            )
        entry = _Entry(Submission(), lane, read, resolved, timeout)
        if entry.rows > self._max_rows:
            raise UsageError(
                f"The request has {entry.rows} rows; the scheduler runs at most {self._max_rows}.",
                f"num_beams: {resolved.num_beams}, num_return_sequences: {resolved.num_return_sequences}",
                remedy="lower num_beams or num_return_sequences, or raise the scheduler's max_rows",
            )
        self._add(entry)
        return entry.submission

    def encode(
        self,
        prompt: str,
        *,
        head: str | None = None,
        timeout: float | None = None,
        truncate: bool = False,
        max_prompt_tokens: int | None = None,
        split_special_tokens: bool = False,
    ) -> Future[HostEncoding]:
        """Add a request for the encoding of a prompt. Waiting prompts of similar length are encoded together.

        Args:
            head, timeout, truncate, split_special_tokens: as `submit`.
            max_prompt_tokens: maximum tokens of a truncated prompt; None: the pair's.

        Returns:
            the encoding, whose `timings_ms` have `queue` too, or the request's error. Cancelling it before the prompt is
            encoded is possible.

        Raises:
            QueueFullError, ClosedError, UsageError, PromptError: as `submit`.
        """
        lane = self._lane_with_room(head, timeout)
        if max_prompt_tokens is not None and not is_whole(max_prompt_tokens, 1):
            raise UsageError(f"max_prompt_tokens is {max_prompt_tokens!r}.", remedy="give a whole number, at least 1")
        (ids,) = lane.pair.tokenize(
            [prompt], truncate=truncate, max_prompt_tokens=max_prompt_tokens, split_special_tokens=split_special_tokens
        )
        entry, future = _Entry(Submission(), lane, ids, None, timeout), Future[HostEncoding]()

        def settle(event: Event) -> None:
            if not future.set_running_or_notify_cancel():
                return
            assert isinstance(event, Finished), "there are no rows"
            if event.encoding is None:
                future.set_exception(event.error)
            else:
                future.set_result(event.encoding)

        def cancel(found: Future[HostEncoding]) -> None:
            if found.cancelled():
                entry.submission.cancel()

        entry.submission.listen(settle)
        future.add_done_callback(cancel)
        self._add(entry)
        return future

    def run(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Run a function on the scheduler's thread, between two decoder calls. It may use the pair; responses pause meanwhile.

        Returns:
            its result, or the error that it raised. Cancelling it before it runs is possible.

        Raises:
            QueueFullError: `max_waiting` functions are waiting.
            ClosedError: the scheduler has been closed.
        """
        future = Future[_Result]()
        with self._changed:
            self._require_open()
            if len(self._jobs) >= self._max_waiting:
                raise QueueFullError(
                    f"{len(self._jobs)} functions are waiting, as many as the scheduler holds.",
                    remedy="run it again later, or raise max_waiting",
                )
            self._jobs.append((future, function))
            self._changed.notify()
        return future

    def close(self, *, drain: float = 0.0) -> None:
        """Refuse new requests, wait up to `drain` seconds for the others, cancel what is left, and end the thread.

        Closing twice is harmless.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(drain)
        while self._thread.is_alive():
            with self._changed:
                for entry in (*self._waiting, *self._running):
                    entry.submission.cancel()
                for future, _ in self._jobs:
                    future.cancel()
            self._thread.join(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _rows(self) -> int:
        return sum(entry.rows for entry in self._running)

    def _require_open(self) -> None:
        if self._closing:
            raise ClosedError("The scheduler has been closed.", remedy="make a new Scheduler")

    def _require_room(self) -> None:
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting, as many as the scheduler holds.",
                f"running: {len(self._running)} requests with {self._rows} rows, at most {self._max_rows}",
                remedy="submit the request again later, or raise max_waiting",
            )

    def check_room(self) -> None:
        """Check that a request would be accepted now.

        Raises:
            QueueFullError: `max_waiting` requests are waiting.
            ClosedError: the scheduler has been closed.
        """
        with self._changed:
            self._require_open()
            self._require_room()

    def _add(self, entry: _Entry) -> None:
        with self._changed:
            self._require_open()
            self._require_room()
            self._submitted += 1
            self._waiting.append(entry)
            self._changed.notify()

    def _lane_with_room(self, head: str | None, timeout: float | None) -> _Lane:
        """The lane of a new request. A full queue is refused before the prompt is tokenized, which takes longer."""
        if timeout is not None and not (is_number(timeout, 0, float("inf")) and timeout > 0):
            raise UsageError(f"timeout is {timeout!r}.", remedy="give a number of seconds above 0")
        lane = self._lane(head)
        self.check_room()
        return lane

    def _lane(self, head: str | None) -> _Lane:
        pair = self._pair if head is None else self._pair.head(head)
        name = pair.manifest.head
        with self._changed:
            self._require_open()
            if name not in self._lanes:
                self._lanes[name] = _Lane(pair)
            return self._lanes[name]

    def _run(self) -> None:
        """The scheduler's thread. Should it fail, nobody waits for it: all requests end."""
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001 - the callers have it
            _log.exception("The scheduler of %r failed.", self._pair.manifest.name)
            failure = Llm2SlmError(
                f"The scheduler failed: {type(error).__name__}.", str(error), remedy="make a new Scheduler, and report this error"
            )  # fmt: skip
            with self._changed:
                self._closing = True
                left = (*self._waiting, *self._running)
                self._outcomes["failed"] += len(left)
                self._waiting.clear()
                self._running.clear()
                jobs = tuple(self._jobs)
                self._jobs.clear()
            for future, _ in jobs:
                if future.set_running_or_notify_cancel():
                    future.set_exception(failure)
            for entry in left:
                entry.submission.put(Finished((), failure))

    def _serve(self) -> None:
        """Run requests until the scheduler is closed and none is left."""
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._jobs or self._closing):
                    self._changed.wait()
                if not (self._waiting or self._running or self._jobs):
                    return
                lanes = tuple(self._lanes.values())
            self._drop()
            self._run_job()
            self._admit()
            for lane in lanes:
                if lane.core.groups:
                    self._step(lane)

    def _drop(self) -> None:
        """End cancelled and overdue requests."""
        now = perf_counter()
        with self._changed:
            entries = (*self._waiting, *self._running)
        for entry in entries:
            if entry.submission.is_cancelled:
                self._end(
                    entry, "cancelled", RequestCancelledError("The request was cancelled.", remedy="submit it again")
                )
            elif entry.timeout is not None and now >= entry.submitted + entry.timeout:
                self._end(
                    entry, "deadline",
                    DeadlineError(
                        "The request was not finished in time.",
                        f"timeout: {entry.timeout} s",
                        f"time before its prompt was encoded: {entry.timings_ms.get('queue', self._waited_ms(entry)):.0f} ms",
                        remedy="raise timeout, or lower max_new_tokens",
                    ),
                )  # fmt: skip

    def _run_job(self) -> None:
        """Run the oldest function of `run`."""
        with self._changed:
            if not self._jobs:
                return
            future, function = self._jobs.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - the caller has it
            future.set_exception(error)

    def _admit(self) -> None:
        """Encode waiting prompts, and let their rows join."""
        batch = self._next_batch()
        if not batch:
            return
        lane = batch[0].lane
        if batch[0].kind == "encoding":
            batch = [entry for entry in batch if self._move_to_device(entry)]
        try:
            if not batch:
                return
            if batch[0].kind == "encode":
                encoded = self._encode(lane, batch)
            else:
                conditioning = self._conditioning(lane, batch)
                started = perf_counter()
                lane.core.admit(conditioning, [entry.group for entry in batch if entry.group is not None])
                prefill_ms = (perf_counter() - started) * 1e3
        except Exception as error:  # noqa: BLE001 - the callers have it, and the thread serves the others
            self._fail(lane, batch, error)
            return
        if batch[0].kind == "encode":
            for entry, encoding in zip(batch, encoded, strict=True):
                timings = {**entry.timings_ms, **encoding.timings_ms}
                self._end(entry, "encoded", None, encoding=replace(encoding, timings_ms=timings))
            return
        for entry in batch:
            entry.timings_ms |= {"prefill": prefill_ms, "decode": 0.0}
        self._deliver(lane, batch)

    def _encode(self, lane: _Lane, batch: Sequence[_Entry]) -> list[HostEncoding]:
        """The encodings of prompts, one each."""
        encoding = self._read(lane, batch)
        return lane.pair.host_encoding(encoding).rows(lane.pair.manifest.shape)

    def _conditioning(self, lane: _Lane, batch: Sequence[_Entry]) -> Conditioning:
        """The conditioning of requests, each of which gets its rows."""
        if batch[0].kind == "prompt":
            encoding = self._read(lane, batch)
            for row, entry in enumerate(batch):
                self._give_rows(entry, encoding, row)
            return encoding.conditioning
        encodings = [entry.prompt for entry in batch if isinstance(entry.prompt, Encoding)]
        for entry, encoding in zip(batch, encodings, strict=True):
            self._give_rows(entry, encoding, 0)
        if len(batch) == 1:
            return encodings[0].conditioning
        backend, shape, tokens = lane.pair.backend, lane.pair.manifest.shape, [entry.prompt_tokens for entry in batch]
        arrays = join_rows([backend.arrays(encoding.conditioning) for encoding in encodings], shape, tokens)
        return backend.conditioning(arrays, context_mask(shape, prompt_mask(tokens)))

    def _move_to_device(self, entry: _Entry) -> bool:
        """Move a request's encoding to the device. One that cannot be used there ends its own request."""
        assert not isinstance(entry.prompt, PromptIds), "the request has an encoding"
        try:
            entry.prompt = entry.lane.pair.device_encoding(entry.prompt)
        except Llm2SlmError as error:
            self._end(entry, "failed", error)
            return False
        return True

    def _read(self, lane: _Lane, batch: Sequence[_Entry]) -> Encoding:
        """Encode prompts, except those that the pair's cache has."""
        prompts = [entry.prompt for entry in batch if isinstance(entry.prompt, PromptIds)]
        encoding = lane.pair.prompt_encoder().read(prompts)
        cached = encoding.cached or (False,) * len(prompts)
        self._prompt_tokens += sum(len(prompt.ids) for prompt, known in zip(prompts, cached, strict=True) if not known)
        return encoding

    @staticmethod
    def _give_rows(entry: _Entry, encoding: Encoding, row: int) -> None:
        """Make a request's rows, of a row of an encoding."""
        assert entry.options is not None, "the request is for responses"
        request = replace(entry.lane.loop.request(encoding, entry.options, [0]), first_row=row)
        entry.group = BeamRows(request) if entry.options.num_beams > 1 else SampledRows(request)
        # An encoding may have a time in the queue of its own.
        entry.timings_ms |= {stage: ms for stage, ms in encoding.timings_ms.items() if stage not in entry.timings_ms}

    def _next_batch(self) -> list[_Entry]:
        """The oldest waiting request and younger ones of its head, its kind and similar length, as far as there is room."""
        with self._changed:
            room = self._max_rows - self._rows
            if not self._waiting or self._waiting[0].rows > room:
                return []
            oldest = self._waiting[0]
            batch: list[_Entry] = []
            longest, shortest = 0, oldest.prompt_tokens
            for entry in self._waiting:
                tokens = entry.prompt_tokens
                wide, narrow = max(longest, tokens), min(shortest, tokens)
                fits = (
                    entry.lane is oldest.lane
                    and entry.kind == oldest.kind
                    and entry.rows <= room
                    and wide <= LONGEST_PER_SHORTEST * narrow
                    and (not batch or wide * (len(batch) + 1) <= self._max_prefill)
                )
                if fits:
                    batch.append(entry)
                    room, longest, shortest = room - entry.rows, wide, narrow
            for entry in batch:
                self._waiting.remove(entry)
                entry.timings_ms["queue"] = self._waited_ms(entry)
            self._running += batch
        return batch

    def _step(self, lane: _Lane) -> None:
        """One decoder call for all rows of a head."""
        entries = self._of(lane)
        started = perf_counter()
        try:
            lane.core.step()
        except Exception as error:  # noqa: BLE001 - the callers have it, and the thread serves the others
            self._fail(lane, entries, error)
            return
        taken = (perf_counter() - started) * 1e3
        self._calls += 1
        for entry in entries:
            entry.timings_ms["decode"] += taken
        self._deliver(lane, entries)

    def _deliver(self, lane: _Lane, entries: Sequence[_Entry]) -> None:
        """Give new tokens and complete responses to the callers."""
        going = set(map(id, lane.core.groups))
        for entry in entries:
            group = entry.group
            assert group is not None, "the request has been admitted"
            if isinstance(group, SampledRows) and group.error is None:
                self._new_tokens += len(group.last)
                for row, step in zip(group.last_rows.tolist(), group.last, strict=True):
                    entry.submission.put(NewToken(row, step))
            if group.error is not None:
                self._end(entry, "failed", group.error)
            elif id(group) not in going:
                self._end(entry, None, None)

    def _fail(self, lane: _Lane, entries: Sequence[_Entry], error: Exception) -> None:
        """End requests with the error of a call. If it lost the rows of others, these end too."""
        reported = self._reported(lane, error)
        ended = set(map(id, entries))
        for entry in entries:
            self._end(entry, "failed", reported, release=False)
        lost = [entry for entry in self._of(lane) if id(entry) not in ended]
        kept = set(map(id, lane.core.groups))
        for entry in lost:
            if id(entry.group) not in kept:
                self._end(entry, "failed", reported, release=False)
        if any(id(entry.group) in kept for entry in entries):
            # A call for all rows failed: its state is unknown.
            lane.core = DecodeCore(lane.pair.backend)

    @staticmethod
    def _reported(lane: _Lane, error: Exception) -> Llm2SlmError:
        """The error that callers receive."""
        if isinstance(error, Llm2SlmError):
            return error
        _log.exception("A call of %r failed.", lane.pair.manifest.name, exc_info=error)
        return Llm2SlmError(
            f"The request failed: {type(error).__name__}.", *([str(error)] if str(error) else []),
            remedy="submit fewer or shorter requests at once" if isinstance(error, MemoryError) else "report this error",
        )  # fmt: skip

    def _of(self, lane: _Lane) -> list[_Entry]:
        return [entry for entry in self._running if entry.lane is lane]

    def _end(
        self, entry: _Entry, outcome: Outcome | None, error: Llm2SlmError | None, *, release: bool = True,
        encoding: HostEncoding | None = None,
    ) -> None:  # fmt: skip
        """End a request. `outcome` None: that of its complete responses. `encoding`: the one that was wanted."""
        if entry not in self._running and entry not in self._waiting:
            return  # it ended with another one, whose rows could not be released
        lane, group = entry.lane, entry.group
        if release and group is not None and any(group is other for other in lane.core.groups):
            try:
                lane.core.release(group)
            except Exception as failure:  # noqa: BLE001 - as in `_step`
                # The other rows may have been moved in part.
                lane.core, reported = DecodeCore(lane.pair.backend), self._reported(lane, failure)
                for other in self._of(lane):
                    if other is not entry:
                        self._end(other, "failed", reported, release=False)
        timings = {**entry.timings_ms, "total": sum(entry.timings_ms.values())}
        found: list[Generation] = []
        # Unfinished beams are no responses.
        if group is not None and (error is None or isinstance(group, SampledRows)):
            try:
                (responses,) = group.responses(timings)
                found = [replace(response, sequence=number) for number, response in enumerate(responses)]
            except Llm2SlmError as failure:
                # The tokenizer fails on the text of a beam.
                outcome, error = "failed", failure
        if outcome is None:
            outcome = "length" if any(response.finish_reason == "length" for response in found) else "stop"
        if isinstance(group, BeamRows) and error is None:
            self._new_tokens += sum(response.new_tokens for response in found)
        with self._changed:
            self._outcomes[outcome] += 1
            if entry in self._running:
                self._running.remove(entry)
            if entry in self._waiting:
                self._waiting.remove(entry)
        entry.submission.put(Finished(tuple(found), error, encoding))

    @staticmethod
    def _waited_ms(entry: _Entry) -> float:
        return (perf_counter() - entry.submitted) * 1e3
