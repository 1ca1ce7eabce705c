"""The number of tokens to draft, from how many were accepted and from what calls of the decoder cost."""

from dataclasses import dataclass, field

FIRST_DRAFT = 3  # before anything is known
MOST_ADAPTED = 16
_MEMORY, _LONG_MEMORY = 0.9, 0.98  # weight of the past in the moving averages of a row, and of all rows
_PRIOR = 4.0  # drafts that the averages of all rows count as in a new row
_PROBE_EVERY = 32  # calls after which one token is drafted again, where drafts do not pay
_GAIN = 1.05  # a draft must promise this much to be worth its risk


@dataclass
class CallCosts:
    """Milliseconds of decoder calls, as moving averages. Shared by the rows of a pair.

    Attributes:
        plain_ms: of a call of one token; None: not measured.
        drafted_ms: of a call of several tokens, by their number.
        draft_token_ms: of drafting one token.
        accepted, drafted: decayed sums of accepted and of tried drafts of all rows.
        without: calls of all rows since the last draft, where drafts do not pay.
    """

    plain_ms: float | None = None
    drafted_ms: dict[int, float] = field(default_factory=dict)
    draft_token_ms: float | None = None
    accepted: float = 0.0
    drafted: float = 0.0
    without: int = 0

    def add_drafts(self, drafted: int, accepted: int) -> None:
        """Record how many drafts a call accepted, of those that it tried."""
        self.accepted = _LONG_MEMORY * self.accepted + accepted
        self.drafted = _LONG_MEMORY * self.drafted + drafted

    def add_call(self, tokens: int, ms: float) -> None:
        """Record a decoder call."""
        if tokens == 1:
            self.plain_ms = _averaged(self.plain_ms, ms)
        else:
            self.drafted_ms[tokens] = _averaged(self.drafted_ms.get(tokens), ms)

    def add_draft(self, tokens: int, ms: float) -> None:
        """Record the drafting of tokens."""
        self.draft_token_ms = _averaged(self.draft_token_ms, ms / tokens)

    def call_ms(self, tokens: int) -> float | None:
        """The expected milliseconds of a call; None: no call of several tokens has been measured."""
        if tokens == 1:
            return self.plain_ms
        if not self.drafted_ms:
            return None
        if tokens in self.drafted_ms:
            return self.drafted_ms[tokens]
        # A line through the two nearest measured numbers of tokens, one token counting as measured.
        known = self.drafted_ms | ({1: self.plain_ms} if self.plain_ms is not None else {})
        near = sorted(sorted(known, key=lambda count: abs(count - tokens))[:2])
        if len(near) == 1:
            return known[near[0]]
        (a, b) = near
        slope = max(0.0, (known[b] - known[a]) / (b - a))
        return max(known[a] + slope * (tokens - a), min(known.values()))


def _averaged(before: float | None, value: float) -> float:
    return value if before is None else _MEMORY * before + (1 - _MEMORY) * value


class DraftLength:
    """Chooses the number of tokens of a row's next draft.

    Args:
        costs: the costs of calls.
        fixed: this many tokens always; None: adapted.
        least: the smallest number chosen.
    """

    def __init__(self, costs: CallCosts, *, fixed: int | None, least: int = 0) -> None:
        self._costs, self._fixed, self._least = costs, fixed, least
        # A new row expects what earlier rows had, until it has its own tokens.
        weight = min(1.0, _PRIOR / costs.drafted) if costs.drafted else 0.0
        self._accepted, self._drafted = weight * costs.accepted, weight * costs.drafted

    def add(self, drafted: int, accepted: int) -> None:
        """Record that `accepted` of `drafted` tokens were accepted. The tokens behind a rejected one do not count."""
        if not drafted:
            return
        tried = min(drafted, accepted + 1)
        self._accepted = _MEMORY * self._accepted + accepted
        self._drafted = _MEMORY * self._drafted + tried
        self._costs.add_drafts(tried, accepted)

    def choose(self) -> int:
        """The number of tokens to draft next; 0: none."""
        if self._fixed is not None:
            return self._fixed
        plain = self._costs.plain_ms
        if plain is None and self._least == 0:
            return 0  # the first call shows what a plain one costs
        best = max(self._least, self._best(plain))
        if not best:
            self._costs.without += 1
            best = self._costs.without // _PROBE_EVERY
        if best:
            self._costs.without = 0
        return best

    def _best(self, plain: float | None) -> int:
        """The number of tokens with the most tokens per millisecond."""
        if self._drafted < _PRIOR / 2 or plain is None or self._costs.draft_token_ms is None:
            return FIRST_DRAFT
        share = min(self._accepted / self._drafted, 0.99)
        best, rate = 0, _GAIN / plain
        for count in range(1, MOST_ADAPTED + 1):
            call = self._costs.call_ms(count + 1)
            if call is None:
                return FIRST_DRAFT
            # The accepted tokens, and the one that the call itself makes.
            tokens = (1 - share ** (count + 1)) / (1 - share)
            if (found := tokens / (call + count * self._costs.draft_token_ms)) > rate:
                best, rate = count, found
        return best
