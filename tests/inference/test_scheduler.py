"""Requests of many callers in one decoder: each gets what it gets alone, and none waits for another's end."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import llm2slm_export
from llm2slm_export.errors import (
    BundleError,
    ClosedError,
    DeadlineError,
    DeviceError,
    EncodingError,
    Llm2SlmError,
    PromptError,
    QueueFullError,
    RequestCancelledError,
    UsageError,
)
from llm2slm_export.inference.encodings.cache import EncodingCache
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.rows.beam_rows import BeamRows
from llm2slm_export.inference.scheduler import Scheduler
from llm2slm_export.inference.submission import Finished, NewToken, Submission
from tests.support.gated_toy import PATIENCE, Gated
from tests.support.mixed_requests import mixed_requests
from tests.support.tiers import tiered
from tests.support.toy_pair import ALPHABET, ids_of, make_pair, toy_of

SCRIPTS = {letter: letter + "bcdefghijklmnopqrstuvwxyz" for letter in "abcdefgh"}


@pytest.fixture
def pair(tmp_path: Path) -> Orchestrator:
    return make_pair(tmp_path, SCRIPTS, toy=Gated)


def gated(pair: Orchestrator) -> Gated:
    toy = toy_of(pair)
    assert isinstance(toy, Gated)
    return toy


def close_gate(pair: Orchestrator, submit: Callable[[], Submission]) -> Submission:
    """Submit a request and return when it waits inside a decoder call."""
    toy = gated(pair)
    toy.gate.clear()
    toy.reached.clear()
    submission = submit()
    assert toy.reached.wait(PATIENCE)
    return submission


def bare(generation: Generation) -> tuple[Any, ...]:
    """What is the same in any batch."""
    g = generation
    return g.text, g.token_ids, g.finish_reason, g.prompt_tokens, g.sequence


def scores(generations: Sequence[Generation]) -> list[float]:
    """The log-probabilities and scores, which are nearly the same in any batch."""
    found = [logprob for g in generations for logprob in g.token_logprobs or ()]
    return [*found, *(g.score for g in generations if g.score is not None)]


def settled(scheduler: Scheduler) -> None:
    """Every request is waiting, running or has an outcome, and in the end it has an outcome."""
    deadline = time.monotonic() + PATIENCE
    while (stats := scheduler.stats).waiting or stats.running:
        assert stats.submitted == stats.waiting + stats.running + sum(stats.outcomes.values())
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert stats.submitted == sum(stats.outcomes.values())
    assert stats.rows == 0


@pytest.mark.parametrize(
    ("slm", "count"),
    tiered([("t5", 60), ("t5", 500), ("llama", 60), ("llama", 500)], fast=[("t5", 60)], slow=[("llama", 60)]),
)
def test_requests_at_random_times_get_what_they_get_alone(
    slm: str, count: int, bundles: Callable[..., tuple[Path, Path]]
) -> None:
    requests, chance = mixed_requests(count), random.Random(2)
    with llm2slm_export.load(bundles(slm)[1], threads=1) as pair:
        expected = [pair.generate([prompt], **options) for prompt, options in requests]
        with Scheduler(pair, max_rows=12, max_waiting=count, max_prefill_tokens=40) as scheduler:
            submissions = []
            for prompt, options in requests:
                submissions.append(scheduler.submit(prompt, **options))
                time.sleep(chance.choice([0, 0, 0.002, 0.01]))
            found, streamed = [], []
            for submission in submissions:
                *tokens, last = submission
                assert isinstance(last, Finished)
                assert last.error is None
                found.append(last.generations)
                streamed.append(tokens)
            stats = scheduler.stats
    alone = [list(map(bare, generations)) for generations in expected]
    assert [list(map(bare, generations)) for generations in found] == alone
    for generations, others in zip(found, expected, strict=True):
        np.testing.assert_allclose(scores(generations), scores(others), atol=1e-3)
    for (_, options), tokens, generations in zip(requests, streamed, alone, strict=True):
        if "num_beams" in options:
            assert tokens == []
            continue
        for text, ids, *_, sequence in generations:
            own = [event.step for event in tokens if isinstance(event, NewToken) and event.sequence == sequence]
            assert "".join(step.text for step in own) == text
            assert tuple(step.token_id for step in own) == ids
            assert [step.finish_reason is not None for step in own] == [False] * (len(ids) - 1) + [True]
    assert stats.submitted == sum(stats.outcomes.values()) == count
    assert stats.new_tokens == sum(len(ids) for generations in alone for _, ids, *_ in generations)
    assert stats.calls < sum(len(generations[0][1]) for generations in alone) / 2  # they did run together


def test_a_cancelled_request_leaves_the_others_as_they_are(pair: Orchestrator) -> None:
    alone = {letter: pair.generate([letter], max_new_tokens=20)[0].text for letter in SCRIPTS}
    with Scheduler(pair) as scheduler:
        first = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=20))
        others = {letter: scheduler.submit(letter, max_new_tokens=20) for letter in "bcdefgh"}
        first.cancel()
        gated(pair).gate.set()
        for letter, submission in others.items():
            assert submission.result()[0].text == alone[letter]
        with pytest.raises(RequestCancelledError):
            first.result()
        settled(scheduler)
        assert scheduler.stats.outcomes == {"cancelled": 1, "length": 7}
        # One that waits is cancelled too, before it is encoded.
        encoded = gated(pair).calls.count("encode")
        running = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=5))
        scheduler.submit("b").cancel()
        gated(pair).gate.set()
        running.result()
        settled(scheduler)
        assert gated(pair).calls.count("encode") == encoded + 1


def test_leaving_the_loop_cancels(pair: Orchestrator) -> None:
    with Scheduler(pair) as scheduler:
        for event in scheduler.submit("a", max_new_tokens=32):
            assert isinstance(event, NewToken)
            break
        settled(scheduler)

        async def consume() -> list[str]:
            submission, texts = scheduler.submit("b", max_new_tokens=32), []
            async for event in submission:
                assert isinstance(event, NewToken)
                texts.append(event.step.text)
                if len(texts) == 3:
                    break
            return texts

        assert asyncio.run(consume()) == ["b", "b", "c"]
        settled(scheduler)

        async def abandoned() -> None:
            close_gate(pair, lambda: scheduler.submit("c", max_new_tokens=32))
            task = asyncio.create_task(scheduler.submit("d", max_new_tokens=32).result_async())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gated(pair).gate.set()

        asyncio.run(abandoned())
        settled(scheduler)
        assert scheduler.stats.outcomes["cancelled"] >= 1


def test_many_asynchronous_callers_share_calls(pair: Orchestrator) -> None:
    async def run() -> list[str]:
        held = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=12))
        asked = [scheduler.submit(letter, max_new_tokens=12).result_async() for letter in "bcdefgh"]
        waiting = asyncio.gather(held.result_async(), *asked)
        gated(pair).gate.set()
        return [generations[0].text for generations in await waiting]

    with Scheduler(pair) as scheduler:
        assert asyncio.run(run()) == [SCRIPTS[letter][:12] for letter in "abcdefgh"]
        assert scheduler.stats.calls <= 24


def test_an_overdue_request_ends_with_what_it_has(pair: Orchestrator) -> None:
    with Scheduler(pair) as scheduler:
        slow = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=20, timeout=0.2))
        waiting, patient = scheduler.submit("b", timeout=0.1), scheduler.submit("c", max_new_tokens=4)
        time.sleep(0.3)
        gated(pair).gate.set()
        *_, last = slow
        assert isinstance(last, Finished)
        assert isinstance(last.error, DeadlineError)
        assert last.generations[0].text == "ab"
        *tokens, last = waiting
        assert isinstance(last, Finished)
        assert (tokens, last.generations) == ([], ())
        assert isinstance(last.error, DeadlineError)
        assert patient.result()[0].text == "cbcd"
        settled(scheduler)
        assert scheduler.stats.outcomes == {"deadline": 2, "length": 1}


def test_a_full_queue_refuses_at_once(pair: Orchestrator) -> None:
    with Scheduler(pair, max_rows=1, max_waiting=2) as scheduler:
        running = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=3))
        waiting = [scheduler.submit(letter, max_new_tokens=3) for letter in "bc"]
        started = time.monotonic()
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            scheduler.submit("d")
        assert time.monotonic() - started < 0.05
        assert scheduler.stats.submitted == 3
        gated(pair).gate.set()
        assert [s.result()[0].text for s in (running, *waiting)] == ["abc", "bbc", "cbc"]


@pytest.mark.parametrize(
    ("options", "error", "fact"),
    [
        ({"prompt": ""}, PromptError, "empty"),
        ({"prompt": "abcdefghijklmnopq"}, PromptError, "tokens"),
        ({"temperature": -1}, UsageError, "temperature"),
        ({"num_beams": 9}, UsageError, "The request has 9 rows; the scheduler runs at most 8."),
        ({"drafter": "ngram"}, UsageError, "cannot be drafted"),
        ({"timeout": 0}, UsageError, "timeout is 0."),
        ({"timeout": "1"}, UsageError, "timeout is '1'."),
        ({"timeout": float("nan")}, UsageError, "timeout is nan."),
        ({"head": "x"}, UsageError, "no head 'x'"),
    ],
)
def test_what_cannot_run_is_refused_before_it_waits(
    pair: Orchestrator, options: dict[str, Any], error: type[Exception], fact: str
) -> None:
    with Scheduler(pair, max_rows=8) as scheduler:
        with pytest.raises(error, match=fact):
            scheduler.submit(**{"prompt": "a", **options})
        assert scheduler.stats.submitted == 0


@pytest.mark.parametrize("name", ["max_rows", "max_waiting", "max_prefill_tokens"])
def test_limits_are_positive_whole_numbers(pair: Orchestrator, name: str) -> None:
    for value in (0, -1, 1.5, True, None):
        with pytest.raises(UsageError, match=name):
            Scheduler(pair, **{name: value})


def test_prompts_are_encoded_together_and_within_bounds(pair: Orchestrator) -> None:
    """Prompts wait while a call runs: then those of similar length are encoded together, the oldest first."""
    toy = gated(pair)
    with Scheduler(pair, max_prefill_tokens=12) as scheduler:
        first = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=20))
        toy.read.clear()
        prompts = ["bbbb", "a", "cccc", "dddddddd", "eeee", "ffff", "gggg"]
        submissions = [scheduler.submit(prompt, max_new_tokens=2) for prompt in prompts]
        toy.gate.set()
        for submission in (first, *submissions):
            submission.result()
    # A prompt's ids end with </s>: 5, 2, 5, 9, 5, 5, 5 tokens; at most 12 with padding, unless one alone is longer.
    lengths = [[len(ids) for ids in batch] for batch in toy.read]
    assert lengths == [[5, 5], [2], [9], [5, 5], [5]]


def test_the_oldest_request_is_not_passed_by_smaller_ones(pair: Orchestrator) -> None:
    """One with many rows waits for them; those behind it do not take them first."""
    with Scheduler(pair, max_rows=4) as scheduler:
        running = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=6))
        wide = scheduler.submit("b", num_return_sequences=4, do_sample=True, top_k=1, seed=0, max_new_tokens=2)
        small = [scheduler.submit("c", max_new_tokens=20) for _ in range(5)]
        gated(pair).gate.set()
        assert [g.text for g in wide.result()] == ["bb"] * 4
        assert running.result()[0].text == "abcdef"
        assert all(s.result()[0].finish_reason == "length" for s in small)


class Broken(Gated):
    """A toy with one call that fails."""

    broken: str | None = None
    error: Exception = DeviceError("The device is gone.", remedy="plug it in")

    def _call(self, name: str) -> None:
        if self.broken == name:
            self.broken = None
            raise self.error

    def encode(self, input_ids: Any, attention_mask: Any) -> Any:
        self._call("encode")
        return super().encode(input_ids, attention_mask)

    def prefill(self, conditioning: Any) -> Any:
        self._call("prefill")
        return super().prefill(conditioning)

    def step(self, state: Any, input_ids: Any) -> Any:
        logits = super().step(state, input_ids)
        self._call("step")
        return logits

    def join(self, state: Any, other: Any) -> None:
        self._call("join")
        super().join(state, other)


@pytest.mark.parametrize("error", [Broken.error, MemoryError(), ValueError("odd")])
@pytest.mark.parametrize(("broken", "harmed"), [("encode", "b"), ("prefill", "b"), ("join", "ab"), ("step", "a")])
def test_a_failing_call_ends_its_own_requests_alone(
    tmp_path: Path, broken: str, harmed: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    pair = make_pair(tmp_path, SCRIPTS, toy=Broken)
    toy = toy_of(pair)
    assert isinstance(toy, Broken)
    toy.error = error
    with Scheduler(pair) as scheduler:
        submissions = {"a": close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=9))}
        submissions["b"] = scheduler.submit("b", max_new_tokens=9)
        toy.broken = broken
        toy.gate.set()
        for letter, submission in submissions.items():
            if letter in harmed:
                with pytest.raises(Llm2SlmError) as found:
                    submission.result()
                assert str(found.value).startswith(
                    "The device is gone." if error is Broken.error else f"The request failed: {type(error).__name__}"
                )
            else:
                assert submission.result()[0].text == SCRIPTS[letter][:9]
        settled(scheduler)
        assert scheduler.stats.outcomes["failed"] == len(harmed)
        assert scheduler.submit("c", max_new_tokens=4).result()[0].text == "cbcd"
    assert bool(caplog.records) == (error is not Broken.error)


def test_logits_that_are_not_finite_end_their_own_request(tmp_path: Path) -> None:
    class Overflowing(Gated):
        def _logits(self, state: Any, tokens: int) -> Any:
            logits = super()._logits(state, tokens)
            logits[(state["keys"] == ALPHABET["b"]) & (state["lengths"] == 4)] = np.nan
            return logits

    pair = make_pair(tmp_path, SCRIPTS, toy=Overflowing)
    with Scheduler(pair) as scheduler:
        first = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=9))
        bad, good = (scheduler.submit(letter, max_new_tokens=9) for letter in "bc")
        gated(pair).gate.set()
        assert [s.result()[0].text for s in (first, good)] == [SCRIPTS[letter][:9] for letter in "ac"]
        *_, last = bad
        assert isinstance(last, Finished)
        assert isinstance(last.error, BundleError)
        assert last.generations[0].text == "bbc"


def test_beams_that_cannot_be_decoded_end_their_own_request(
    pair: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = BundleError("The tokenizer fails.", remedy="build it again")
    monkeypatch.setattr(BeamRows, "responses", Mock(side_effect=error))
    with Scheduler(pair) as scheduler:
        with pytest.raises(BundleError, match="The tokenizer fails"):
            scheduler.submit("a", num_beams=2, max_new_tokens=3).result()
        assert scheduler.submit("b", max_new_tokens=3).result()[0].text == "bbc"
        settled(scheduler)
        assert scheduler.stats.outcomes == {"failed": 1, "length": 1}


def test_rows_that_cannot_be_released_end_all_rows_beside_them(pair: Orchestrator) -> None:
    toy = gated(pair)
    step, select = toy.step, toy.select
    with Scheduler(pair) as scheduler:
        first = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=20))
        second = scheduler.submit("b", max_new_tokens=20)

        def cancelling(state: Any, input_ids: Any) -> Any:
            if len(input_ids) == 2:
                first.cancel()
                toy.select = Mock(side_effect=MemoryError)  # type: ignore[method-assign]
            return step(state, input_ids)

        toy.step = cancelling  # type: ignore[method-assign]
        toy.gate.set()
        with pytest.raises(RequestCancelledError):
            first.result()
        with pytest.raises(Llm2SlmError, match="MemoryError"):
            second.result()
        toy.step, toy.select = step, select  # type: ignore[method-assign]
        assert scheduler.submit("c", max_new_tokens=4).result()[0].text == "cbcd"
        settled(scheduler)
        assert scheduler.stats.outcomes == {"cancelled": 1, "failed": 1, "length": 1}


def test_nobody_waits_for_a_scheduler_that_has_failed(
    pair: Orchestrator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler(pair)
    running = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=20))
    waiting = scheduler.submit("b", max_new_tokens=20)

    monkeypatch.setattr(Scheduler, "_drop", Mock(side_effect=ValueError("odd")))
    gated(pair).gate.set()
    for submission in (running, waiting):
        with pytest.raises(Llm2SlmError, match="The scheduler failed: ValueError"):
            submission.result()
    with pytest.raises(UsageError, match="has been closed"):
        scheduler.submit("c")
    scheduler.close()
    assert scheduler.stats.outcomes == {"failed": 2}
    assert caplog.records


def test_closing_drains_or_cancels(pair: Orchestrator) -> None:
    scheduler = Scheduler(pair)
    running = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=8))
    waiting = scheduler.submit("b", max_new_tokens=8)
    closing = threading.Thread(target=scheduler.close, kwargs={"drain": PATIENCE})
    closing.start()
    while not scheduler._closing:
        time.sleep(0.001)
    with pytest.raises(UsageError, match="has been closed"):
        scheduler.submit("c")
    gated(pair).gate.set()
    assert [s.result()[0].text for s in (running, waiting)] == ["abcdefgh", "bbcdefgh"]
    closing.join(PATIENCE)
    assert not scheduler._thread.is_alive()
    scheduler.close()

    scheduler = Scheduler(pair)
    running = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=8))
    waiting = scheduler.submit("b", max_new_tokens=8)
    threading.Timer(0.3, gated(pair).gate.set).start()
    scheduler.close(drain=0.05)
    for submission in (running, waiting):
        with pytest.raises(RequestCancelledError):
            submission.result()
    settled(scheduler)
    assert pair.generate(["c"], max_new_tokens=3)[0].text == "cbc"  # the pair is not closed


def test_times_are_those_of_the_request(pair: Orchestrator) -> None:
    with Scheduler(pair, max_rows=1) as scheduler:
        running = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=3))
        waiting = scheduler.submit("b", max_new_tokens=3)
        time.sleep(0.1)
        gated(pair).gate.set()
        first, second = running.result()[0].timings_ms, waiting.result()[0].timings_ms
    assert {"queue", "tokenize", "encode", "project", "prefill", "decode", "total"} == first.keys() == second.keys()
    assert first["queue"] < 90 < second["queue"]
    assert first["decode"] > 90 > second["decode"]
    assert second["total"] == pytest.approx(sum(ms for name, ms in second.items() if name != "total"))


def test_a_function_runs_between_two_decoder_calls(pair: Orchestrator) -> None:
    with Scheduler(pair, max_waiting=2) as scheduler:
        submission = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=5))
        first = scheduler.run(lambda: threading.current_thread().name)
        failing = scheduler.run(lambda: 1 / 0)
        with pytest.raises(QueueFullError, match="2 functions are waiting"):
            scheduler.run(int)
        assert not first.done()
        gated(pair).gate.set()
        assert first.result(PATIENCE) == "llm2slm-scheduler"
        with pytest.raises(ZeroDivisionError):
            failing.result(PATIENCE)
        assert submission.result()[0].text == "abcde"
        waiting = close_gate(pair, lambda: scheduler.submit("a"))
        cancelled = scheduler.run(int)
        assert cancelled.cancel()
        gated(pair).gate.set()
        waiting.cancel()
    with pytest.raises(ClosedError):
        scheduler.run(int)


@pytest.mark.parametrize(("slm", "count"), tiered([("t5", 24), ("llama", 24)], fast=[("t5", 24)], slow=[("llama", 24)]))
def test_encodings_join_as_prompts_do(slm: str, count: int, bundles: Callable[..., tuple[Path, Path]]) -> None:
    requests = mixed_requests(count)
    directory = bundles(slm)[1]
    with (
        llm2slm_export.load(directory, threads=1) as pair,
        llm2slm_export.load(directory, threads=1, part="writer") as writer,
    ):
        expected = [list(map(bare, pair.generate([prompt], **options))) for prompt, options in requests]
        encodings = [pair.encode([prompt]) for prompt, _ in requests]
        sent = [writer.encoding_from_bytes(pair.encoding_to_bytes(encoding)) for encoding in encodings]
        with Scheduler(pair, max_rows=12, max_waiting=3 * count) as scheduler:
            given = [
                given
                for number, (prompt, _) in enumerate(requests)
                for given in (prompt, encodings[number], sent[number])
            ]
            submissions = [scheduler.submit(one, **requests[number // 3][1]) for number, one in enumerate(given)]
            found = [list(map(bare, submission.result())) for submission in submissions]
            assert found == [generations for generations in expected for _ in range(3)]
        # An encoding is not changed by rows that join its own, and a writer needs nothing else.
        with Scheduler(writer, max_rows=12, max_waiting=count) as scheduler:
            submissions = [
                scheduler.submit(encoding, **options) for encoding, (_, options) in zip(sent, requests, strict=True)
            ]
            assert [list(map(bare, submission.result())) for submission in submissions] == expected
            assert scheduler.stats.prompt_tokens == 0


def test_encodings_are_asked_for_and_used_in_the_queue(pair: Orchestrator) -> None:
    toy = gated(pair)
    with Scheduler(pair) as scheduler:
        held = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=3))
        toy.read.clear()
        futures = {letter: scheduler.encode(letter, timeout=PATIENCE) for letter in "bcd"}
        assert futures.pop("c").cancel()
        late = scheduler.encode("e", timeout=0.001)
        time.sleep(0.01)
        toy.gate.set()
        held.result()
        encodings = {letter: future.result(PATIENCE) for letter, future in futures.items()}
        assert len(toy.read) == 1  # both in one call
        assert encodings["b"].timings_ms.keys() == {"queue", "tokenize", "encode", "project"}
        with pytest.raises(DeadlineError):
            late.result(PATIENCE)
        submissions = {letter: scheduler.submit(encoding) for letter, encoding in encodings.items()}
        for letter, submission in submissions.items():
            (generation,) = submission.result()
            assert generation.text == pair.generate([letter])[0].text
            assert generation.timings_ms["encode"] == encodings[letter].timings_ms["encode"]
            assert generation.timings_ms["queue"] != encodings[letter].timings_ms["queue"]
        settled(scheduler)
        assert scheduler.stats.outcomes == {"length": 3, "encoded": 2, "cancelled": 1, "deadline": 1}


def test_an_encoding_that_cannot_be_used_is_refused_or_ends_its_own_request(
    pair: Orchestrator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    other = make_pair(tmp_path / "other", SCRIPTS, prompt_template="{prompt} ")
    with Scheduler(pair) as scheduler:
        for encoding, options, error, fact in (
            (other.encode(["a"]), {}, EncodingError, "belongs to another pair"),
            (pair.encode(["a", "b"]), {}, UsageError, "has 2 prompts"),
            (pair.encode(["a"]), {"truncate": True}, UsageError, "not for its encoding"),
            (pair.encode(["a"]), {"drafter": "ngram"}, UsageError, "cannot be drafted"),
            (pair.encode(["a"]), {"temperature": -1}, UsageError, "temperature"),
        ):
            with pytest.raises(error, match=fact):
                scheduler.submit(encoding, **options)
        with pytest.raises(PromptError):
            scheduler.encode("")
        assert scheduler.stats.submitted == 0
        held = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=3))
        good, bad = (pair.encoding_from_bytes(pair.encoding_to_bytes(pair.encode([letter]))) for letter in "bc")
        submissions = [scheduler.submit(encoding, max_new_tokens=3) for encoding in (good, bad, good)]
        device_encoding = pair.device_encoding

        def overflowing(encoding: Any) -> Any:
            if encoding is bad:
                raise EncodingError("It overflows.", remedy="use another")
            return device_encoding(encoding)

        monkeypatch.setattr(pair, "device_encoding", overflowing)
        gated(pair).gate.set()
        assert held.result()[0].text == "abc"
        assert [submissions[at].result()[0].text for at in (0, 2)] == ["bbc", "bbc"]
        with pytest.raises(EncodingError, match="It overflows"):
            submissions[1].result()


def test_cached_prompts_are_not_encoded_again_alone_or_beside_new_ones(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, SCRIPTS, toy=Gated, cache=EncodingCache())
    toy = gated(pair)
    with Scheduler(pair) as scheduler:
        assert scheduler.submit("bbb", max_new_tokens=3).result()[0].cached is False
        assert scheduler.encode("cc").result().cached == (False,)
        held = close_gate(pair, lambda: scheduler.submit("a", max_new_tokens=3))
        toy.read.clear()
        submissions = [scheduler.submit(prompt, max_new_tokens=3) for prompt in ("cc", "dddd", "bbb", "dddd", "eee")]
        toy.gate.set()
        held.result()
        found = [submission.result()[0] for submission in submissions]
        assert [(g.text, g.cached) for g in found] == [
            ("cbc", True), ("dbc", False), ("bbc", True), ("dbc", False), ("ebc", False),
        ]  # fmt: skip
        assert toy.read == [[ids_of("dddd</s>"), ids_of("eee</s>")]]
        assert "cache" in found[0].timings_ms
        encoded = scheduler.stats.prompt_tokens
        assert [scheduler.submit(prompt, max_new_tokens=2).result()[0].cached for prompt in ("bbb", "eee")] == [
            True
        ] * 2
        assert scheduler.encode("dddd").result().cached == (True,)
        assert scheduler.stats.prompt_tokens == encoded
        assert len(toy.read) == 1
