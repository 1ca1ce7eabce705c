"""Checks that rows that join a state go on as they would alone, and that a state that rows join and leave does not grow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.independent_rows import assert_close

ROUNDS = 30


@dataclass
class Row:
    """A row of a state.

    Args:
        prompt: the number of its prompt.
        length: the tokens of its prompt.
        start: its cache positions after the prompt pass.
        ids: what it has been fed.
        logits: what it has answered: to the prompt, then to each id.
    """

    prompt: int
    length: int
    start: int
    ids: list[int]
    logits: list[np.ndarray]

    def copy(self) -> "Row":
        return Row(self.prompt, self.length, self.start, [*self.ids], [*self.logits])


class Running:
    """A state, and what each of its rows has been fed and has answered.

    Args:
        lengths: the lengths of the prompts of a new state.
        first: the number of the first one.
        width: the tokens to which they are padded; None: the longest.
    """

    def __init__(self, backend: Any, lengths: Sequence[int], *, first: int, width: int | None = None) -> None:
        self.backend = backend
        prompts = [(first + place, length) for place, length in enumerate(lengths)]
        self.state, logits = backend.prefill(_conditioning(backend, prompts, width))
        starts = backend.lengths(self.state)
        self.rows = [
            Row(prompt, length, int(start), [], [answer.copy()])
            for (prompt, length), start, answer in zip(prompts, starts, logits, strict=True)
        ]

    def step(self, calls: int = 1, *, together: int = 1) -> "Running":
        """Feed every row `together` ids in each of a number of calls."""
        for _ in range(calls):
            ids = [
                [(17 * row.prompt + 29 * (len(row.ids) + more) + 41 * place) % 250 + 3 for more in range(together)]
                for place, row in enumerate(self.rows)
            ]
            logits = self.backend.step(self.state, np.array(ids))
            for row, fed, answers in zip(self.rows, ids, logits, strict=True):
                row.ids += fed
                row.logits += list(answers.copy())
            self._check_lengths()
        return self

    def rewind(self, back: Sequence[int]) -> "Running":
        """Set every row back by a number of positions."""
        self.backend.rewind(self.state, self.backend.lengths(self.state) - np.array(back))
        for row, count in zip(self.rows, back, strict=True):
            kept = len(row.ids) - count
            del row.ids[kept:], row.logits[kept + 1 :]
        self._check_lengths()
        return self

    def select(self, rows: Sequence[int]) -> "Running":
        """Select rows. Those that leave are checked."""
        for place in set(range(len(self.rows))) - set(rows):
            self._check_row(self.rows[place])
        self.backend.select(self.state, np.array(rows))
        self.rows = [self.rows[row].copy() for row in rows]
        self._check_lengths()
        return self

    def join(self, other: "Running") -> "Running":
        """Append the rows of another one, which is empty afterwards."""
        self.backend.join(self.state, other.state)
        self.rows += other.rows
        other.rows = []
        del other.state
        self._check_lengths()
        return self

    def check(self) -> None:
        """Compare all logits of every row with those of the row alone."""
        for row in self.rows:
            self._check_row(row)

    def _check_row(self, row: Row) -> None:
        state, first = self.backend.prefill(_conditioning(self.backend, [(row.prompt, row.length)], None))
        alone = [first[0].copy(), *(self.backend.step(state, np.array([[fed]]))[0, 0].copy() for fed in row.ids)]
        assert len(alone) == len(row.logits)
        for found, expected in zip(row.logits, alone, strict=True):
            assert_close(found, expected)

    def _check_lengths(self) -> None:
        lengths = self.backend.lengths(self.state).tolist()
        assert lengths == [row.start + len(row.ids) for row in self.rows]


def check_a_state_with_a_wider_context_joins(backend: Any) -> None:
    """The state's prompts are padded to less than the other's, which has been set back."""
    running = Running(backend, [5, 9, 2], first=0).step(4)
    other = Running(backend, [3, 14], first=10, width=20).step(3).rewind([2, 0])
    running.join(other).step(2).step(2, together=2).step().check()


def check_a_state_with_a_narrower_context_joins(backend: Any) -> None:
    """The state's prompts are padded to more than the other's; the state has been set back."""
    running = Running(backend, [3, 14], first=10, width=20).step(3).rewind([0, 2])
    other = Running(backend, [5, 2, 4], first=0).step(2)
    running.join(other).step(3).rewind([1, 0, 3, 0, 2]).step(2).check()


def check_a_longer_state_joins(backend: Any) -> None:
    """Every row that joins has been running for longer."""
    other = Running(backend, [4, 6], first=3).step(10)
    Running(backend, [3], first=0).join(other).step(3).check()


def check_a_shorter_state_joins(backend: Any) -> None:
    """Every row that joins is new."""
    running = Running(backend, [4, 6], first=3).step(10)
    running.join(Running(backend, [3], first=0)).step(3).check()


def check_rows_join_after_others_left_and_repeated(backend: Any) -> None:
    """Joins between selections: rows leave, repeat and change places, on both sides, and a joined state joins another."""
    running = Running(backend, [5, 9, 2], first=0).step(2).select([2, 0, 0]).step()
    other = Running(backend, [7, 1, 12], first=5).step().select([2, 1])
    running.join(other).step(2).check()
    running.select([4, 0, 3]).step()  # the row that repeated, and the first of each side
    running.join(Running(backend, [6, 8], first=20).step(5).select([1, 1])).step()
    running.select([3, 1, 1, 4]).step()
    third = Running(backend, [11], first=30).join(Running(backend, [2], first=40).step(3))
    running.join(third).select([5, 4, 3, 2, 1, 0]).step(2).check()


def check_rows_set_back_to_nothing_join(backend: Any) -> None:
    """The caches of both states are empty: all that the rows have is the conditioning of an encoder-decoder SLM."""
    prompts, ids = [(0, 3), (1, 5), (4, 8)], np.array([[7], [8], [9]])
    states = [backend.prefill(_conditioning(backend, some, None))[0] for some in (prompts[:2], prompts[2:])]
    backend.step(states[0], ids[:2])
    for state in states:
        backend.rewind(state, 0 * backend.lengths(state))
    backend.join(*states)
    logits = backend.step(states[0], ids)
    for prompt, fed, found in zip(prompts, ids, logits.copy(), strict=True):
        alone, _ = backend.prefill(_conditioning(backend, [prompt], None))
        backend.rewind(alone, np.zeros(1, np.int64))
        assert_close(found, backend.step(alone, fed[None])[0])


def check_contexts_of_different_buckets(backend: Any) -> None:
    """Contexts that need more room than the state has, and rows of few positions among those of many."""
    # On engines: three of four slots, and the row that joins needs a wider one.
    running = Running(backend, [3, 60, 5], first=0).step(2)
    running.join(Running(backend, [70], first=5).step()).step()
    running.join(Running(backend, [2, 130], first=8)).step(2).check()
    running.select([0, 3, 1]).join(Running(backend, [66], first=12)).step(2).check()


JOINING_ROWS: list[Callable[[Any], None]] = [
    check_a_state_with_a_wider_context_joins, check_a_state_with_a_narrower_context_joins, check_a_longer_state_joins,
    check_a_shorter_state_joins, check_rows_join_after_others_left_and_repeated, check_rows_set_back_to_nothing_join,
]  # fmt: skip


def check_rows_come_and_go(
    backend: Any, *, most: int = 8, rounds: int = ROUNDS, after: Callable[[Running], None] = lambda _: None
) -> None:
    """Every round rows join, all rows run, and some leave: the oldest, or those that have been fed enough.

    Args:
        most: the rows of the largest state.
        after: is called with what is running after each round.
    """
    running = Running(backend, [4, 7], first=0)
    for number in range(rounds):
        lengths = [(3 * number) % 13 + 1, (5 * number) % 11 + 1][: number % 2 + 1]
        wide = 16 if number % 3 else None
        other = Running(backend, lengths, first=2 * number + 2, width=wide).step(number % 3)
        leave = max(0, len(running.rows) + len(lengths) - most)
        going = [place for place, row in enumerate(running.rows) if len(row.ids) < 12][leave:]
        if going and len(going) < len(running.rows):
            running.select(going)
        elif not going:
            running = Running(backend, [2], first=number)
        running.join(other).step(1 + number % 2)
        if number % 4 == 3:  # a row repeats in the place of the first
            running.select([len(running.rows) - 1, *range(1, len(running.rows))])
        after(running)
    running.check()


def _conditioning(backend: Any, prompts: Sequence[tuple[int, int]], width: int | None) -> Any:
    """The conditioning of prompts, (number, length) each, padded to `width` tokens (None: to the longest)."""
    ids = np.zeros((len(prompts), width or max(length for _, length in prompts)), np.int64)
    for row, (number, length) in enumerate(prompts):
        ids[row, :length] = (np.arange(length) * 7 + 31 * number) % 250 + 3
    mask = (ids > 0).astype(np.int64)
    return backend.project(backend.encode(ids, mask), ids, mask)
