"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable

from tests.support.gated_toy import PATIENCE


def until(condition: Callable[[], object], patience: float = PATIENCE, *, pause: float = 0.005) -> None:
    """Wait until a condition is true, asked every `pause` seconds, and fail after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause)
