"""What responses took with drafts and without, and by that whether the next one is drafted.

Only whole responses show what drafts cost: a drafter's start, and the decoder's slower calls after the drafter's.
"""

_TRIED = 3  # responses of each kind before one is preferred
_MEMORY = 0.7  # weight of the past in a kind's sums
_PROBE_AFTER, _RAREST_PROBE = 8, 256  # responses after which one of the slower kind is tried again


class ResponseTimes:
    """The milliseconds per token of drafted responses, and of the others. Shared by the rows of a pair."""

    def __init__(self) -> None:
        self._ms, self._tokens, self._count = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}, {True: 0, False: 0}
        self._is_faster = True  # whether drafted responses are
        self._since, self._probe_after = 0, _PROBE_AFTER

    def add(self, *, drafted: bool, tokens: int, ms: float) -> None:
        """Record a response."""
        self._ms[drafted] = _MEMORY * self._ms[drafted] + ms
        self._tokens[drafted] = _MEMORY * self._tokens[drafted] + tokens
        self._count[drafted] += 1

    def choose(self) -> bool:
        """Whether to draft the next response: if that is faster, and now and then if it is not, ever more rarely."""
        if min(self._count.values()) < _TRIED:
            return self._count[True] <= self._count[False]
        is_faster = self._ms[True] * self._tokens[False] < self._ms[False] * self._tokens[True]
        if is_faster != self._is_faster:
            self._is_faster, self._since, self._probe_after = is_faster, 0, _PROBE_AFTER
        self._since += 1
        if self._since <= self._probe_after:
            return is_faster
        self._since, self._probe_after = 0, min(2 * self._probe_after, _RAREST_PROBE)
        return not is_faster
