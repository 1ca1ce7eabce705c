"""The number of tokens to draft, from how many were accepted and from what calls of the decoder cost."""

from llm2slm_export.inference.generation.call_costs import CallCosts, DraftRecord

FIRST_DRAFT = 3  # before anything is known
MOST_ADAPTED = 16
_MEMORY = 0.9  # weight of the past in the moving averages of a row
_PRIOR = 4.0  # drafts that the averages of all rows count as in a new row
_GAIN = 1.05  # a draft must promise this much to be worth its risk


class DraftLength:
    """Chooses the number of tokens of a row's next draft, if the row is drafted at all.

    Args:
        costs: the costs of calls.
        record: the drafter's drafts.
        fixed: this many tokens always; None: adapted.
        least: the smallest number chosen.
    """

    def __init__(self, costs: CallCosts, record: DraftRecord, *, fixed: int | None, least: int = 0) -> None:
        self._costs, self._record, self._fixed, self._least = costs, record, fixed, least
        # A fixed number is what was asked for; where at least one token is always drafted, drafts decide the tokens.
        self._is_timed = fixed is None and least == 0
        self._may_draft = not self._is_timed or record.times.choose()
        self._has_drafted = False
        # A new row expects what earlier rows had, until it has its own tokens.
        weight = min(1.0, _PRIOR / record.drafted) if record.drafted else 0.0
        self._accepted, self._drafted = weight * record.accepted, weight * record.drafted

    def add(self, drafted: int, accepted: int) -> None:
        """Record that `accepted` of `drafted` tokens were accepted. The tokens behind a rejected one do not count."""
        if not drafted:
            return
        tried = min(drafted, accepted + 1)
        self._accepted = _MEMORY * self._accepted + accepted
        self._drafted = _MEMORY * self._drafted + tried
        self._record.add_drafts(tried, accepted)

    def finish(self, tokens: int, ms: float) -> None:
        """Record the response's tokens, and the milliseconds of its calls and drafts without the prompt pass."""
        if self._is_timed:
            self._record.times.add(drafted=self._has_drafted, tokens=tokens, ms=ms)

    def choose(self) -> int:
        """The number of tokens to draft next; 0: none."""
        if self._fixed is not None:
            return self._fixed
        plain = self._costs.plain_ms
        if plain is None and self._least == 0:
            return 0  # the first call shows what a plain one costs
        if not self._may_draft:
            return 0
        if best := max(self._least, self._best(plain) if self._record.is_due else 0):
            self._record.pay()
            self._has_drafted = True
            return best
        probed = self._record.probe()
        self._has_drafted |= probed
        return int(probed)

    def _best(self, plain: float | None) -> int:
        """The number of tokens with the most tokens per millisecond."""
        if self._drafted < _PRIOR / 2 or plain is None or self._record.token_ms is None:
            return FIRST_DRAFT
        share = min(self._accepted / self._drafted, 0.99)
        best, rate = 0, _GAIN / plain
        for count in range(1, MOST_ADAPTED + 1):
            call = self._costs.call_ms(count + 1)
            if call is None:
                return FIRST_DRAFT
            # The accepted tokens, and the one that the call itself makes.
            tokens = (1 - share ** (count + 1)) / (1 - share)
            if (found := tokens / (call + count * self._record.token_ms)) > rate:
                best, rate = count, found
        return best
