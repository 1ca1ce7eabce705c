"""Rows of several requests in one decoder: each gets the tokens that it gets alone, whenever others join and leave."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm2slm_export
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.decode_core import Continuation, DecodeCore
from llm2slm_export.inference.orchestrator import Orchestrator
from llm2slm_export.inference.request import Request
from llm2slm_export.inference.rows.beam_rows import BeamRows
from llm2slm_export.inference.rows.sampled_rows import SampledRows
from tests.support.mixed_requests import mixed_requests
from tests.support.toy_pair import make_pair, toy_of


def group_of(pair: Orchestrator, prompt: str, **options: Any) -> SampledRows | BeamRows:
    """The rows of a request of one prompt."""
    resolved = pair.options(**options)
    request = Request(
        pair.encode([prompt]), resolved, [0], pair._running(), pair.manifest, pair._slm_tokenizer,
        num_tokens=pair._num_tokens,
    )  # fmt: skip
    return BeamRows(request) if resolved.num_beams > 1 else SampledRows(request)


def admit(core: DecodeCore, *groups: SampledRows | BeamRows) -> None:
    for group in groups:
        core.admit(group._request.encoding.conditioning, [group])


def ids_of_group(group: SampledRows | BeamRows) -> list[tuple[int, ...]]:
    assert group.error is None
    return [generation.token_ids for row in group.responses({}) for generation in row]


@pytest.mark.parametrize("slm", ["t5", pytest.param("llama", marks=pytest.mark.slow)])
def test_requests_that_join_and_leave_get_the_ids_they_get_alone(
    slm: str, bundles: Callable[..., tuple[Path, Path]]
) -> None:
    requests, chance = mixed_requests(64), random.Random(1)
    with llm2slm_export.load(bundles(slm)[1], threads=1) as pair:
        alone = [[g.token_ids for g in pair.generate([prompt], **options)] for prompt, options in requests]
        groups = [group_of(pair, prompt, **options) for prompt, options in requests]
        core, waiting, most = DecodeCore(pair._running()), list(groups), 0
        while waiting or core.groups:
            for _ in range(chance.choice([0, 0, 1, 3])):
                if waiting:
                    admit(core, waiting.pop(0))
            most = max(most, len(core.groups))
            if core.groups:
                core.step()
        found = [ids_of_group(group) for group in groups]
    assert most > 8
    assert found == alone
    assert len({len(ids) for row in alone for ids in row}) > 8


def test_a_released_group_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "alphabetical", "b": "bet", "c": "consonant"})
    groups = [group_of(pair, prompt, max_new_tokens=12) for prompt in "abc"]
    core = DecodeCore(pair._running())
    admit(core, *groups)
    core.step()
    core.release(groups[0])
    assert core.groups == (groups[1], groups[2])
    assert core.rows == 2
    while core.groups:
        core.step()
    texts = [group.responses({})[0][0].text for group in groups]
    assert texts == ["al", "betttttttttt", "consonantttt"]
    assert toy_of(pair).calls.count("join") == 2
    # The last group leaves nothing behind: the next one starts a state of its own.
    admit(core, again := group_of(pair, "a", max_new_tokens=3))
    core.release(again)
    assert (core.groups, core.rows) == ((), 0)
    assert toy_of(pair).calls.count("join") == 2


def test_an_error_of_one_group_ends_that_group_alone(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "alphabet", "b": "bet"})
    excluded = tuple((token_id,) for token_id in range(pair._num_tokens))
    good, bad = (
        group_of(pair, prompt, max_new_tokens=6, **options)
        for prompt, options in (("a", {}), ("b", {"bad_words_ids": excluded, "min_new_tokens": 4}))
    )
    core = DecodeCore(pair._running())
    admit(core, good, bad)
    while core.groups:
        core.step()
    assert isinstance(bad.error, UsageError)
    assert "exclude every token" in str(bad.error)
    assert good.responses({})[0][0].text == "alphab"


class Drafts:
    """A row that feeds several ids at a time, of which it rejects some."""

    num_prompts, is_plain_greedy, room = 1, False, 99

    def __init__(self, plan: Sequence[tuple[int, int]]) -> None:
        self.plan, self.seen = list(plan), list[list[int]]()  # (ids to feed, of which are rejected)
        self.rejected = 0

    def add_call(self, ms: float) -> None:
        assert ms >= 0

    def advance(self, logits: np.ndarray) -> Continuation | None:
        self.seen.append(logits[0].argmax(axis=1).tolist())
        if not self.plan:
            return None
        feed, rejected = self.plan.pop(0)
        before, self.rejected = self.rejected, rejected
        return Continuation(np.full((1, feed), 7), rejected=before)


def test_rows_that_feed_several_ids_share_calls_with_rows_that_feed_one(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "abcdefghij", "k": "klmnopqrst"})
    plain, drafts = group_of(pair, "k", max_new_tokens=10), Drafts([(3, 1), (4, 3), (1, 0), (2, 2), (1, 0)])
    core = DecodeCore(pair._running())
    core.admit(pair.encode(["a"]).conditioning, [drafts])
    admit(core, plain)
    while core.groups:
        core.step()
    script = [pair._slm_tokenizer.encode("abcdefghij", add_special_tokens=False).ids[at:] for at in (0, 1, 3, 4, 5, 5)]
    assert drafts.seen == [ids[:count] for ids, count in zip(script, (1, 3, 4, 1, 2, 1), strict=True)]
    assert plain.responses({})[0][0].text == "klmnopqrst"


def test_a_row_without_room_is_never_fed_padding(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, {"a": "abcdefghij", "k": "klmnopqrst"})
    plain, drafts = group_of(pair, "k", max_new_tokens=3), Drafts([(4, 0), (4, 0)])
    core, fed = DecodeCore(pair._running()), []
    toy = toy_of(pair)
    step = toy.step
    toy.step = lambda state, ids: fed.append(ids.shape) or step(state, ids)  # type: ignore[method-assign]
    core.admit(pair.encode(["a"]).conditioning, [drafts])
    admit(core, plain)
    while core.groups:
        core.step()
    # With 3 new tokens, 2 may be fed after the first: 2 ids, then 1.
    assert fed == [(2, 2), (2, 1)]
    assert [len(ids) for ids in drafts.seen] == [1, 2, 1]
