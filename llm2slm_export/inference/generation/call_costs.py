"""What decoder calls cost, and how many drafts they accepted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from llm2slm_export.inference.generation.options import is_number
from llm2slm_export.inference.generation.response_times import ResponseTimes

_MEMORY, _LONG_MEMORY = 0.9, 0.98  # weight of the past in the averages of times, and of acceptance
_PROBE_AFTER, _RAREST_PROBE = 32, 2048  # calls after which one token is drafted again, where drafts do not pay
_CHECK_EVERY = 8  # calls after which it is computed again whether drafts pay, where they do not
_KEYS = {"plain_ms", "drafted_ms", "draft_token_ms"}


@dataclass
class DraftRecord:
    """What drafting one token costs, and how many drafts were accepted. Shared by the rows of a pair.

    Attributes:
        token_ms: milliseconds of drafting one token, as a moving average; None: not measured.
        accepted, drafted: decayed sums of accepted and of tried drafts of all rows.
        without: calls of all rows since the last draft, where drafts do not pay.
        probe_after: the number of such calls after which one token is drafted again.
        times: what responses took with drafts and without.
    """

    token_ms: float | None = None
    accepted: float = 0.0
    drafted: float = 0.0
    without: int = 0
    probe_after: int = _PROBE_AFTER
    times: ResponseTimes = field(default_factory=ResponseTimes)

    def add_draft(self, tokens: int, ms: float) -> None:
        """Record the drafting of tokens."""
        self.token_ms = _averaged(self.token_ms, ms / tokens)

    def add_drafts(self, drafted: int, accepted: int) -> None:
        """Record how many drafts a call accepted, of those that it tried."""
        self.accepted = _LONG_MEMORY * self.accepted + accepted
        self.drafted = _LONG_MEMORY * self.drafted + drafted

    @property
    def is_due(self) -> bool:
        """Whether it is to be computed for this call if drafts pay."""
        return self.without % _CHECK_EVERY == 0

    def pay(self) -> None:
        """Record that drafts pay."""
        self.without, self.probe_after = 0, _PROBE_AFTER

    def probe(self) -> bool:
        """Record a call for which drafts do not pay. Returns whether a token is to be drafted all the same, ever more rarely."""
        self.without += 1
        if self.without < self.probe_after:
            return False
        self.without, self.probe_after = 0, min(2 * self.probe_after, _RAREST_PROBE)
        return True


@dataclass
class CallCosts:
    """Milliseconds of decoder calls, as moving averages. Shared by the rows of a pair.

    Attributes:
        plain_ms: of a call of one token; None: not measured.
        drafted_ms: of a call of several tokens, by their number.
        calls: number of decoder calls recorded.
        head, lookup: the drafts of a head, and of prompt lookup, which cost nothing.
    """

    plain_ms: float | None = None
    drafted_ms: dict[int, float] = field(default_factory=dict)
    calls: int = 0
    head: DraftRecord = field(default_factory=DraftRecord)
    lookup: DraftRecord = field(default_factory=lambda: DraftRecord(token_ms=0.0))

    def add_call(self, tokens: int, ms: float) -> None:
        """Record a decoder call."""
        self.calls += 1
        if tokens == 1:
            self.plain_ms = _averaged(self.plain_ms, ms)
        else:
            self.drafted_ms[tokens] = _averaged(self.drafted_ms.get(tokens), ms)

    def call_ms(self, tokens: int) -> float | None:
        """The expected milliseconds of a call; None: no call of several tokens has been measured."""
        if tokens == 1:
            return self.plain_ms
        if not self.drafted_ms:
            return None
        if tokens in self.drafted_ms:
            return self.drafted_ms[tokens]
        # A line through the two nearest measured numbers of tokens, one token counting as measured. Sorting would take a
        # tenth of a millisecond per token: this is asked for every length of the next draft.
        known = self.drafted_ms | ({1: self.plain_ms} if self.plain_ms is not None else {})
        nearest = second = 0
        distance = further = float("inf")
        for count in known:
            if (away := abs(count - tokens)) < distance:
                nearest, second, distance, further = count, nearest, away, distance
            elif away < further:
                second, further = count, away
        if len(known) == 1:
            return known[nearest]
        a, b = sorted((nearest, second))
        slope = max(0.0, (known[b] - known[a]) / (b - a))
        return max(known[a] + slope * (tokens - a), min(known.values()))

    def to_json(self) -> dict[str, Any]:
        """The times, for a file."""
        drafted = {str(tokens): round(ms, 4) for tokens, ms in sorted(self.drafted_ms.items())}
        return {"plain_ms": self.plain_ms, "drafted_ms": drafted, "draft_token_ms": self.head.token_ms}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Costs with times from `to_json`."""
        drafted = {int(tokens): ms for tokens, ms in value["drafted_ms"].items()}
        return cls(plain_ms=value["plain_ms"], drafted_ms=drafted, head=DraftRecord(token_ms=value["draft_token_ms"]))

    @staticmethod
    def is_json(value: object) -> bool:
        """Whether a value is one of `to_json`."""
        return (
            isinstance(value, dict)
            and value.keys() == _KEYS
            and isinstance(value["drafted_ms"], dict)
            and all(tokens.isdecimal() and len(tokens) < 4 for tokens in value["drafted_ms"])
            and all(is_number(ms, 0, 1e6) for ms in (value["plain_ms"], *value["drafted_ms"].values()))
            and (value["draft_token_ms"] is None or is_number(value["draft_token_ms"], 0, 1e6))
        )


def _averaged(before: float | None, value: float) -> float:
    return value if before is None else _MEMORY * before + (1 - _MEMORY) * value
