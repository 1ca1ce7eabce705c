"""Drafting changes nothing but the time: greedy and seeded tokens are those without drafts, draws have their distribution."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm2slm_export
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.drafting import Drafting
from llm2slm_export.inference.generation.call_costs import CallCosts, DraftRecord
from llm2slm_export.inference.generation.draft_length import DraftLength
from llm2slm_export.inference.generation.drafting import DraftOptions, DraftToken, NgramDrafter, verified
from llm2slm_export.inference.generation.logits_processors import softmax
from llm2slm_export.inference.generation.response_times import ResponseTimes
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.outputs import Generation
from tests.support.chi_square import p_value
from tests.support.tiers import tiered
from tests.support.toy_pair import ids_of, make_pair, toy_of

PROMPTS = ["the cat sat", "my father made me a delicious lunch today", "garden", "on a mat and on a mat"]


@pytest.fixture(scope="module", params=["t5", pytest.param("llama", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, bundles: Callable[..., tuple[Path, Path]]) -> Iterator[Orchestrator]:
    with llm2slm_export.load(bundles(request.param)[1], threads=1) as pair:
        yield pair


class Scripted:
    """Drafts the next tokens of a script, changed in one way."""

    def __init__(self, script: Sequence[int], change: Callable[[list[int]], list[int]]) -> None:
        self.script, self.change, self.asked = list(script), change, list[int]()

    def draft(self, ids: Sequence[int], most: int) -> list[DraftToken]:
        self.asked.append(most)
        tokens = self.change(self.script[len(ids) : len(ids) + most])
        return [DraftToken(token_id) for token_id in tokens[:most]]


CHANGES: dict[str, Callable[[list[int]], list[int]]] = {
    "always right": lambda tokens: tokens,
    "always wrong": lambda tokens: [token_id + 1 for token_id in tokens],
    "wrong at the second": lambda tokens: [token_id + (at == 1) for at, token_id in enumerate(tokens)],
    "end early": lambda tokens: [*tokens[:2], 1, 1],
    "nothing": lambda _: [],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 20},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "processors": {"max_new_tokens": 20, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 5},
    "seeded": {"max_new_tokens": 20, "do_sample": True, "seed": 3, "temperature": 0.7},
    "scores": {"max_new_tokens": 12, "output_scores": True},
}


def drafted(
    pair: Orchestrator, prompt: str, drafter: Any, *, num_draft_tokens: int | None, **options: Any
) -> Generation:
    given = DraftOptions(drafter="ngram", num_draft_tokens=num_draft_tokens)
    drafting = Drafting(given, CallCosts(), lambda *_: drafter)
    ((generation,),) = pair.decode_loop().write(
        pair.encode([prompt]), pair.options(**options), prompts=[0], drafting=drafting
    )
    return generation


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_are_those_without_drafts(
    pair: Orchestrator, options: dict[str, Any], change: Callable[[list[int]], list[int]]
) -> None:
    for number, prompt in enumerate(PROMPTS):
        (expected,) = pair.generate([prompt], **options)
        drafter = Scripted(expected.token_ids, change)
        found = drafted(pair, prompt, drafter, num_draft_tokens=(1, 3, 8, None)[number], **options)
        assert found.token_ids == expected.token_ids
        assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
        if options.get("output_scores"):
            np.testing.assert_allclose(found.token_logprobs, expected.token_logprobs, atol=1e-4)
        assert 0 <= found.accepted_tokens <= found.drafted_tokens
        if change is CHANGES["always wrong"]:
            assert found.accepted_tokens == 0


def test_right_drafts_save_calls_and_wrong_ones_cost_none(tmp_path: Path) -> None:
    script = "abcdefghijklmnop"
    pair = make_pair(tmp_path, {"a": script})
    for change, calls in (("always right", 4), ("always wrong", 15), ("nothing", 15)):
        toy_of(pair).fed.clear()
        found = drafted(
            pair, "a", Scripted(ids_of(script), CHANGES[change]), num_draft_tokens=3, max_new_tokens=len(script)
        )
        assert found.text == script
        assert len(toy_of(pair).fed) == calls


def test_a_draft_never_goes_beyond_the_last_new_token(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "abcdefghijklmnop"})
    shapes: list[int] = []
    toy = toy_of(pair)
    step = toy.step
    toy.step = lambda state, ids: shapes.append(ids.shape[1]) or step(state, ids)  # type: ignore[method-assign]
    for most in range(1, 9):
        shapes.clear()
        drafter = Scripted(ids_of("abcdefghijklmnop"), CHANGES["always right"])
        assert drafted(pair, "a", drafter, num_draft_tokens=3, max_new_tokens=most).text == "abcdefgh"[:most]
        assert sum(shapes) == most - 1  # every token is fed once, and the last is not


def test_a_stop_string_inside_a_draft_ends_the_response(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "abcdefghijklmnop"})
    drafter = Scripted(ids_of("abcdefghijklmnop"), CHANGES["always right"])
    found = drafted(pair, "a", drafter, num_draft_tokens=6, max_new_tokens=16, stop="de")
    (expected,) = pair.generate(["a"], max_new_tokens=16, stop="de")
    assert (found.text, found.token_ids, found.finish_reason) == ("abc", expected.token_ids, "stop")


def test_prompt_lookup_proposes_what_followed_the_latest_longest_match() -> None:
    drafter = NgramDrafter([5, 6, 7, 8, 9, 6, 7, 10])
    draft = lambda ids, most: [token.token_id for token in drafter.draft(ids, most)]  # noqa: E731
    assert draft([6, 7], 3) == [10, 6, 7]  # the latest match, which goes on into the response
    assert draft([1, 5, 6, 7], 2) == [8, 9]  # three tokens before two
    assert draft([1, 2], 3) == []
    assert draft([2, 3, 2], 3) == [3, 2]  # one token, in the response itself
    assert draft([9], 1) == [6]
    assert NgramDrafter([]).draft([4], 3) == []
    assert NgramDrafter([]).draft([], 3) == []


@pytest.mark.parametrize("options", [OPTIONS["greedy"], OPTIONS["processors"], OPTIONS["seeded"]])
def test_ngram_is_plain_decoding(pair: Orchestrator, options: dict[str, Any]) -> None:
    expected = [g.token_ids for g in pair.generate(PROMPTS, batch_size=1, **options)]
    for size in (1, 2, 4):
        found = pair.generate(PROMPTS, batch_size=size, drafter="ngram", **options)
        assert [g.token_ids for g in found] == expected
        assert not any(g.warnings for g in found) or size == 4
    three = pair.generate(PROMPTS[:1] * 3, batch_size=3, drafter="ngram", **options)
    assert all("nothing is drafted: the batch has 3 rows" in g.warnings[0] for g in three)
    streamed = list(pair.stream(PROMPTS[1], drafter="ngram", **options))
    if not options.get("do_sample"):  # the prompt's index is part of the key of draws
        assert tuple(step.token_id for step in streamed) == expected[1]
    assert streamed[-1].generation is not None
    assert "".join(step.text for step in streamed) == streamed[-1].generation.text


DRAWS = 20_000


@pytest.mark.parametrize("case", tiered(["apart", "equal", "narrow", "wide"], fast=["apart", "equal"]))
def test_verified_tokens_follow_the_verifiers_distribution(case: str) -> None:
    chance = np.random.default_rng(4)
    scores = chance.normal(0, 1.5, 12).astype(np.float32)
    other = {"apart": chance.normal(0, 1.5, 12), "equal": scores, "narrow": scores * 6, "wide": scores / 6}[case]
    drafting = softmax(other.astype(np.float32)[None])[0]
    if case == "narrow":
        scores[3] = -np.inf  # a processor excluded it
    expected = softmax(scores[None].astype(np.float64))[0]
    drafts = chance.choice(12, size=DRAWS, p=drafting.astype(np.float64) / drafting.sum(dtype=np.float64))
    uniform = chance.random((DRAWS, 2))
    found = [
        verified(scores, DraftToken(int(draft), drafting, 0.5), accept=a, redraw=b)
        for draft, (a, b) in zip(drafts, uniform, strict=True)
    ]
    counts = np.bincount(found, minlength=12)
    assert counts[expected == 0].sum() == 0
    assert p_value(counts, expected * DRAWS) > 1e-4
    # As many drafts are accepted as can be: one minus the distance of the distributions.
    share = float(np.mean(np.array(found) == drafts))
    assert share >= float(np.minimum(expected, drafting).sum()) - 0.015


def test_the_length_of_a_draft_follows_acceptance_and_cost() -> None:
    def settled(share: float, *, plain: float, call: Callable[[int], float], draft: float) -> int:
        costs = CallCosts(plain_ms=plain, head=DraftRecord(token_ms=draft))
        for tokens in (2, 4, 8, 16):
            costs.drafted_ms[tokens] = call(tokens)
        length, chance = DraftLength(costs, costs.head, fixed=None), np.random.default_rng(0)
        chosen = []
        for _ in range(300):
            count = length.choose()
            wrong = np.flatnonzero(chance.random(count) > share)
            if count:
                length.add(count, int(wrong[0]) if len(wrong) else count)
            chosen.append(count)
        return int(np.median(chosen[100:]))

    cheap = lambda tokens: 10 + 0.3 * tokens  # noqa: E731
    dear = lambda tokens: 9.0 * tokens  # noqa: E731
    assert settled(0.95, plain=10, call=cheap, draft=0.5) >= 6
    assert 1 <= settled(0.5, plain=10, call=cheap, draft=0.5) <= 4
    assert settled(0.05, plain=10, call=cheap, draft=0.5) == 0
    assert settled(0.6, plain=10, call=dear, draft=0.5) == 0
    assert DraftLength(CallCosts(), DraftRecord(), fixed=5).choose() == 5
    costs = CallCosts(10, {2: 20, 8: 80}, head=DraftRecord(5, accepted=1, drafted=20))
    chosen = np.array([DraftLength(costs, costs.head, fixed=None).choose() for _ in range(2000)])
    # Where drafts do not pay, they are tried ever more rarely.
    assert np.flatnonzero(chosen).tolist() == [31, 95, 223, 479, 991]
    assert chosen.max() == 1
    assert DraftLength(CallCosts(), DraftRecord(), fixed=None).choose() == 0  # a plain call first
    assert DraftLength(CallCosts(), DraftRecord(), fixed=None, least=1).choose() >= 1


def responses(times: ResponseTimes, count: int, *, drafted: float, plain: float, noise: float = 0.1) -> list[bool]:
    """Which of so many responses are drafted, if a token takes so many milliseconds with drafts and without."""
    chance, chosen = np.random.default_rng(1), []
    for _ in range(count):
        chosen.append(drafts := times.choose())
        tokens = int(chance.integers(5, 15))
        ms = tokens * (drafted if drafts else plain) * chance.uniform(1 - noise, 1 + noise)
        times.add(drafted=drafts, tokens=tokens, ms=ms)
    return chosen


def test_responses_are_drafted_where_that_is_faster() -> None:
    chosen = responses(ResponseTimes(), 300, drafted=6, plain=10)
    assert chosen[:6] == [True, False] * 3
    assert sum(chosen) > 285
    # A slower drafter is tried ever more rarely: less than 5 % is lost to it.
    assert 4 <= sum(responses(ResponseTimes(), 300, drafted=15, plain=10)) <= 9
    # What was slower may become faster.
    times = ResponseTimes()
    responses(times, 100, drafted=15, plain=10)
    assert sum(responses(times, 600, drafted=6, plain=10)) > 350


def test_a_row_is_not_drafted_where_responses_are_faster_without() -> None:
    cheap = CallCosts(10, {2: 10.5, 4: 11, 16: 30}, head=DraftRecord(1, accepted=19, drafted=20))
    responses(cheap.head.times, 6, drafted=15, plain=10)
    for row in (DraftLength(cheap, cheap.head, fixed=None) for _ in range(8)):
        assert [row.choose() for _ in range(50)] == [0] * 50
        row.finish(10, 100)
    assert DraftLength(cheap, cheap.head, fixed=None).choose() > 0  # a probe
    # Drafts that decide the tokens do not depend on times, and a fixed number is what was asked for.
    assert DraftLength(cheap, cheap.head, fixed=None, least=1).choose() > 0
    assert DraftLength(cheap, cheap.head, fixed=4).choose() == 4


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "beams": ({"drafter": "ngram", "num_beams": 3}, ["num_beams: 3"]),
    "sequences": (
        {"drafter": "ngram", "num_return_sequences": 2, "do_sample": True}, ["num_return_sequences: 2"],
    ),
    "drafter": ({"drafter": "oracle"}, ["drafter: must be one of ngram, got 'oracle'"]),
    "both drafters sampled": ({"drafter": "ngram", "verifier": "llm", "do_sample": True}, ["llm"]),
    "both drafters deferred": ({"drafter": "ngram", "verifier": "llm", "defer": 0.5}, ["drafter and defer: prompt lookup has no"]),
    "defer": ({"verifier": "llm", "defer": 1.5}, ["defer: must be a number from 0 to 1, got 1.5"]),
    "defer alone": ({"defer": 0.5}, ["defer: has no effect without verifier"]),
    "tokens": (
        {"drafter": "ngram", "num_draft_tokens": 0, "defer": -1},
        ["num_draft_tokens: must be a whole number from 1 to 64, got 0", "defer: must be a number from 0 to 1", "without verifier"],
    ),
    "scores": ({"verifier": "llm", "defer": 0.5, "output_scores": True}, ["llm"]),
    "huge": ({"verifier": "llm", "defer": 10**400}, ["defer: must be a number from 0 to 1"]),
    "no name": ({"verifier": []}, ["verifier: must be the name of a head, got []"]),
    "misspelt": ({"verifer": "llm"}, ["verifer: did you mean verifier?"]),
    "batch": ({"drafter": "ngram", "batch_size": "2"}, ["batch_size is '2'."]),
    "tokens alone": ({"num_draft_tokens": 3}, ["num_draft_tokens: has no effect"]),
    "no head": ({"verifier": "llm"}, ["llm"]),
    "itself": ({"verifier": "main"}, ["cannot verify its own drafts"]),
}  # fmt: skip


@pytest.mark.parametrize(("options", "facts"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_drafted_is_refused(tmp_path: Path, options: dict[str, Any], facts: list[str]) -> None:
    pair = make_pair(tmp_path, {"a": "abc"})
    for call in (pair.generate, pair.generate_batches):
        with pytest.raises(UsageError) as error:
            call(["a"], **{"batch_size": 1, **options})
        for fact in facts:
            assert fact in str(error.value)
    assert toy_of(pair).calls == []


def test_numbers_may_be_numpys() -> None:
    options = DraftOptions(verifier="llm", defer=np.float32(0.5), num_draft_tokens=np.int64(3))  # type: ignore[arg-type]
    assert options.is_given
