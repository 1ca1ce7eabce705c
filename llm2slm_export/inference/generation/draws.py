"""Uniform random numbers of a response, by token index: a token's draw does not depend on how the tokens before it were made."""

import secrets
from collections.abc import Sequence

import numpy as np


class Draws:
    """The uniform numbers in [0, 1) of one row.

    Number `index` is that of numpy's `default_rng(key)` after `index` draws.

    Args:
        key: the seed, and what tells the row's numbers from those of other rows and purposes.
    """

    def __init__(self, key: Sequence[int]) -> None:
        self._generator = np.random.default_rng(list(key))
        self._drawn: list[float] = []

    def __getitem__(self, index: int) -> float:
        while index >= len(self._drawn):
            self._drawn.append(float(self._generator.random()))
        return self._drawn[index]


def fresh_seed() -> int:
    """A random seed, for calls without one."""
    return secrets.randbits(64)
