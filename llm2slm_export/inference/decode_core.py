"""Rows of several requests that decode together: they share decoder calls, and join and leave between two of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np

from llm2slm_export.errors import Llm2SlmError
from llm2slm_export.inference.generation.call_costs import CallCosts
from llm2slm_export.inference.runtime.backend import Backend, Conditioning, DecoderState, Ids, Logits


@dataclass(frozen=True, eq=False)
class Continuation:
    """A group's part of the next decoder call.

    Args:
        ids: [rows, tokens] the ids to feed. With 0 tokens no call is needed before the next `advance`.
        rows: [rows] for each row of the call, the row of the last logits that it continues. Rows may repeat; the others are
            released. None: all rows go on, in their order.
        rejected: number of positions at the end of the last call that the rows forget before this call.
    """

    ids: Ids
    rows: Ids | None = None
    rejected: int = 0


class RowGroup(Protocol):
    """Rows that advance together: the responses to one or several prompts with the same options.

    Options, processors, random draws and texts belong to the group, so they do not depend on the other groups.
    """

    @property
    def num_prompts(self) -> int:
        """The number of prompts: of the group's rows in the first logits."""
        ...

    @property
    def room(self) -> int:
        """The number of tokens that each row may still be fed: beyond them there may be no position."""
        ...

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the group only needs the highest logit of each row of the next call."""
        ...

    def advance(self, logits: Logits) -> Continuation | None:
        """Choose the next tokens.

        Args:
            logits: [rows, tokens, vocab_size] of the first ids of the last continuation, all of them unless another group
                has less room; at first [prompts, 1, vocab_size]. They are valid during this call.

        Returns:
            What to call the decoder on next; None if the group is finished.
        """
        ...

    def advance_greedy(self, ids: Ids, logits: Logits) -> Continuation | None:
        """As `advance`, if `is_plain_greedy`: the ids [rows] with the highest logit, and these logits [rows]."""
        ...

    def add_call(self, ms: float) -> None:
        """Record the milliseconds of the decoder call whose logits come next."""
        ...

    def fail(self, error: Llm2SlmError) -> None:
        """End the group with an error of its own `advance`. The other groups go on."""
        ...


@dataclass
class _Member:
    """A group, its number of rows in the state, and its part of the next call."""

    group: RowGroup
    rows: int
    continuation: Continuation


class DecodeCore:
    """Runs the decoder for groups of rows.

    Every group gets the tokens that it gets alone, at fp32: rows are independent (`contract.decoder_spec`).

    Args:
        backend: runs the decoder graph.
        costs: records what calls cost; None: nothing does.
    """

    def __init__(self, backend: Backend, costs: CallCosts | None = None) -> None:
        self._backend, self._costs = backend, costs
        self._state: DecoderState | None = None
        self._members: list[_Member] = []

    @property
    def rows(self) -> int:
        """The number of running rows."""
        return sum(member.rows for member in self._members)

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        """The unfinished groups."""
        return tuple(member.group for member in self._members)

    def admit(self, conditioning: Conditioning, groups: Sequence[RowGroup]) -> None:
        """Run the prompt pass of new groups, and let them choose their first tokens.

        If rows cannot join the others for lack of memory, all rows are released.

        Args:
            conditioning: of the groups' prompts, in order.
        """
        state, logits = self._backend.prefill(conditioning)
        positions = logits[:, None]
        ends = np.cumsum([group.num_prompts for group in groups])
        advanced = [
            (group, group.num_prompts, self._advance(group, positions[end - group.num_prompts : end]), 0)
            for group, end in zip(groups, ends.tolist(), strict=True)
        ]
        members = self._moved(state, advanced)
        if not members:
            return
        if self._state is None:
            self._state = state
        else:
            try:
                self._backend.join(self._state, state)
            except BaseException:
                # Some of the state's tensors may have the new rows.
                self._state, self._members = None, []
                raise
        self._members += members

    def step(self) -> None:
        """Run one decoder call for all rows, and let every group choose its next tokens."""
        assert self._state is not None, "there are no rows"
        room = min(member.group.room for member in self._members)
        calls = [member.continuation.ids[:, :room] for member in self._members]
        fed = _stacked(calls)
        tokens = fed.shape[1]
        best, logits, started = None, np.zeros((len(fed), 0, 0), np.float32), perf_counter()
        if tokens == 1 and all(member.group.is_plain_greedy for member in self._members):
            best = self._backend.step_argmax(self._state, fed)
        if best is not None:
            logits = best[1]
        elif tokens:
            logits = self._backend.step(self._state, fed)
        call_ms = (perf_counter() - started) * 1e3
        if tokens and self._costs is not None:
            self._costs.add_call(tokens, call_ms)
        advanced, start = [], 0
        for member, ids in zip(self._members, calls, strict=True):
            rows = slice(start, start + member.rows)
            start = rows.stop
            member.group.add_call(call_ms)
            if best is None:
                following = self._advance(member.group, logits[rows, : ids.shape[1]])
            else:
                following = self._advance(member.group, logits[rows], best[0][rows])
            advanced.append((member.group, member.rows, following, tokens - ids.shape[1]))
        self._members = self._moved(self._state, advanced)
        if not self._members:
            self._state = None

    def release(self, group: RowGroup) -> None:
        """Drop an unfinished group's rows."""
        advanced = [
            (
                member.group,
                member.rows,
                None if member.group is group else Continuation(member.continuation.ids),
                0,
            )
            for member in self._members
        ]
        self._members = self._moved(self._state, advanced)
        if not self._members:
            self._state = None

    def _advance(self, group: RowGroup, logits: Logits, best: Ids | None = None) -> Continuation | None:
        try:
            return group.advance(logits) if best is None else group.advance_greedy(best, logits)
        except Llm2SlmError as error:
            group.fail(error)
            return None

    def _moved(
        self, state: DecoderState, advanced: Sequence[tuple[RowGroup, int, Continuation | None, int]]
    ) -> list[_Member]:
        """Forget the positions that groups reject, select the rows that go on, and return their groups.

        Args:
            advanced: each group, its rows in the state, its continuation, and its positions of padding in the last call.
        """
        running, selected, start, unchanged = [], [], 0, True
        for group, rows, following, padding in advanced:
            if following is not None:
                running.append((start, rows, group, following, following.rejected + padding))
                selected.append(np.arange(start, start + rows) if following.rows is None else start + following.rows)
            unchanged &= following is not None and following.rows is None
            start += rows
        if not running:
            return []
        if any(forgotten for *_, forgotten in running):
            lengths = self._backend.lengths(state)
            for start, rows, _, _, forgotten in running:
                lengths[start : start + rows] -= forgotten
            self._backend.rewind(state, lengths)
        if not unchanged:
            self._backend.select(state, np.concatenate(selected))
        return [_Member(group, len(following.ids), following) for _, _, group, following, _ in running]


def _stacked(calls: Sequence[Ids]) -> Ids:
    """The ids of several groups as one call, [rows, tokens]. Groups with fewer tokens than others are padded on the right.

    The padding is forgotten after the call.
    """
    if len(calls) == 1:
        return calls[0]
    tokens = max(ids.shape[1] for ids in calls)
    if all(ids.shape[1] == tokens for ids in calls):
        return np.concatenate(calls)
    fed, start = np.zeros((sum(map(len, calls)), tokens), np.int64), 0
    for ids in calls:
        fed[start : start + len(ids), : ids.shape[1]] = ids
        start += len(ids)
    return fed
