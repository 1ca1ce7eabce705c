"""Drafted rows of a batch: by prompt lookup, or with the pair as the drafter for another head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.inference.generation.call_costs import CallCosts, DraftRecord
from llm2slm_export.inference.generation.draft_length import DraftLength
from llm2slm_export.inference.generation.drafting import Drafter, DraftOptions
from llm2slm_export.inference.head_drafter import UNLIKELY
from llm2slm_export.inference.request import Request
from llm2slm_export.inference.rows.drafted_row import DraftedRow, DraftSource
from llm2slm_export.inference.runtime.backend import Backend, Hidden, Ids
from llm2slm_export.inference.runtime.delegating_backend import DelegatingBackend

MOST_ROWS = 2  # with more, a call of several tokens costs as much as several calls (docs/performance.md)


@dataclass(frozen=True)
class Drafting:
    """How the rows of a batch are drafted.

    Args:
        options: the options.
        costs: what calls of this verifier and this drafter cost.
        lookup: makes the prompt lookup of a request's row; None: there is none.
        head: makes the head that drafts a request's row, with at least a confidence; None: there is none.
    """

    options: DraftOptions
    costs: CallCosts
    lookup: Callable[[Request, int], Drafter] | None = None
    head: Callable[[Request, int, float], Drafter] | None = None

    def rows(self, request: Request) -> list[DraftedRow]:
        """The drafted rows of a request, one per prompt."""
        defer = self.options.defer
        return [
            DraftedRow(request, row, self._sources(request, row), defer=defer) for row in range(len(request.prompts))
        ]

    def _sources(self, request: Request, row: int) -> list[DraftSource]:
        """The drafters of a row, prompt lookup first: it costs nothing."""
        options, sources = self.options, list[DraftSource]()
        if self.lookup is not None:
            sources.append(DraftSource(partial(self.lookup, request, row), self._length(self.costs.lookup)))
        if self.head is not None:
            # A number of tokens that is asked for is drafted, however unlikely they are.
            least_confidence = UNLIKELY if options.num_draft_tokens is None else 0.0
            # Where drafts decide the tokens, every token is drafted: tokens do not depend on the time of calls.
            decides = request.options.do_sample or options.defer is not None
            length = self._length(self.costs.head, least=int(decides))
            sources.append(DraftSource(partial(self.head, request, row, least_confidence), length))
        return sources

    def _length(self, record: DraftRecord, *, least: int = 0) -> DraftLength:
        return DraftLength(self.costs, record, fixed=self.options.num_draft_tokens, least=least)

    def off(self, request: Request) -> str | None:
        """The reason why a request is not drafted; None: it is.

        With `defer`, and where drafts are drawn, the response depends on the drafts, so they are made in any batch.
        """
        rows, options = len(request.prompts), self.options
        if rows <= MOST_ROWS or options.defer is not None or (options.verifier and request.options.do_sample):
            return None
        return f"nothing is drafted: the batch has {rows} rows, and drafts are faster for at most {MOST_ROWS}"


class EncodedOnce(DelegatingBackend):
    """A backend that shares the last encoded batch with the backend of another head.

    Args:
        inner: runs the calls.
        other: the backend whose encoded batch is used; None: this one's own.
    """

    def __init__(self, inner: Backend, other: "EncodedOnce | None" = None) -> None:
        super().__init__(inner)
        self._other = other
        self._encoded: tuple[Ids, Ids, Hidden] | None = None

    def encode(self, input_ids: Ids, attention_mask: Ids) -> Hidden:
        """Hidden states [batch, prompt, encoder_hidden_size], encoded once for equal ids and masks."""
        if self._other is not None:
            return self._other.encode(input_ids, attention_mask)
        last = self._encoded
        if last is None or not (_equal(last[0], input_ids) and _equal(last[1], attention_mask)):
            self._encoded = last = (input_ids, attention_mask, self.inner.encode(input_ids, attention_mask))
        return last[2]

    def head(self, bundle: Bundle) -> Backend:
        """A backend for another head, which encodes by itself."""
        return self.inner.head(bundle)


def _equal(a: Ids, b: Ids) -> bool:
    return a.shape == b.shape and bool((a == b).all())
