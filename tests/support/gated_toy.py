"""A toy pair whose decoder calls can be held up."""

import threading
from typing import Any

from tests.support.toy_pair import Toy

PATIENCE = 60  # seconds, of a test that would wait for ever


class Gated(Toy):
    """A toy whose decoder calls wait for the gate."""

    def __init__(self, scripts: dict[int, list[int]]) -> None:
        super().__init__(scripts)
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()

    def step(self, state: Any, input_ids: Any) -> Any:
        self.reached.set()
        assert self.gate.wait(PATIENCE)
        return super().step(state, input_ids)
