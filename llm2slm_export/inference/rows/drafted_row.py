"""A row whose tokens are drafted, and verified several in one decoder call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np

from llm2slm_export.inference.decode_core import Continuation
from llm2slm_export.inference.generation.draft_length import DraftLength
from llm2slm_export.inference.generation.drafting import Drafter, DraftToken, as_row, verified
from llm2slm_export.inference.generation.draws import Draws
from llm2slm_export.inference.generation.sampler import Sampler
from llm2slm_export.inference.outputs import Generation, Step
from llm2slm_export.inference.request import Request
from llm2slm_export.inference.rows.request_rows import RequestRows
from llm2slm_export.inference.rows.sampled_rows import ResponseText
from llm2slm_export.inference.runtime.backend import Logits

ACCEPT, REDRAW, DRAFT = 1, 2, 3  # what a row's draws are for, besides plain sampling
_NEVER = 2.0  # a confidence that no draft has


class DraftSource:
    """One drafter of a row.

    Args:
        make: makes the drafter, at the first draft.
        length: chooses the number of tokens of a draft.
    """

    def __init__(self, make: Callable[[], Drafter], length: DraftLength) -> None:
        self._make, self.length = make, length
        self._drafter: Drafter | None = None

    def drafts(self, ids: Sequence[int], most: int) -> list[DraftToken]:
        """At most `most` drafts of the tokens after `ids`, the response so far."""
        if self._drafter is None:
            self._drafter = self._make()
        return self._drafter.draft(ids, most)


class DraftedRow(RequestRows):
    """The response to one prompt of a request, which feeds drafts.

    Without `defer`, greedy search and drafts that were not drawn give the tokens that they give without drafts. Drawn drafts
    give tokens with the distribution that they have without drafts, and a seed gives the same tokens for every length of the
    drafts.

    Args:
        request: the request, with a seed if it samples; `backend` and `manifest` are the verifier's.
        row: the row of the request's encoding.
        sources: the drafters, at least one. Each block is the first one's that proposes anything.
        defer: drafts with at least this confidence are accepted without the verifier; None: none are.

    Attributes:
        last: the steps of the last call.
    """

    def __init__(
        self,
        request: Request,
        row: int,
        sources: Sequence[DraftSource],
        *,
        defer: float | None = None,
    ) -> None:
        options, key = request.options, [request.options.seed or 0, request.prompts[row], 0]
        super().__init__(request, 1)
        self._row, self._sources = row, sources
        self._source = sources[0]  # the block's
        self._confident = _NEVER if defer is None or defer >= 1 else float(defer)
        self._defers = defer is not None
        self._sampler = Sampler(
            options, special_ids=request.manifest.special_ids, num_tokens=request.num_tokens,
            rows=[(request.prompts[row], 0)],
        )  # fmt: skip
        self._accepts, self._redraws = Draws([*key, ACCEPT]), Draws([*key, REDRAW])
        self._text = ResponseText(request)
        self._ids: list[int] = []  # the response
        self._unfed = 0  # the response's last ids that the verifier has not been fed
        self._block: list[DraftToken] = []  # drafts that are not decided
        self._drafted = self._accepted = 0
        self._ms = 0.0  # of decoder calls and drafts, after the prompt pass
        self.last: list[Step] = []

    @property
    def room(self) -> int:
        """The number of tokens that the row may still be fed: the last new token never is."""
        return self._unfed + self._draft_room

    def advance(self, logits: Logits) -> Continuation | None:
        """Decide the drafts that were fed and the token after them, and draft the next ones.

        Args:
            logits: [1, tokens, vocab_size] of the first ids of the last continuation; [1, 0, vocab_size] if it had none.

        Raises:
            BundleError: the logits are not finite.
            UsageError: the options leave the row without tokens.
        """
        started = perf_counter()
        following = self._advanced(logits)
        self._ms += (perf_counter() - started) * 1e3
        if following is None:
            for source in self._sources:
                source.length.finish(len(self._ids), self._ms)
        return following

    def add_call(self, ms: float) -> None:
        """Record the time of a decoder call."""
        self._ms += ms

    def _advanced(self, logits: Logits) -> Continuation | None:
        self.last, fed = [], logits.shape[1]
        if self._ids and fed < self._unfed:
            self._unfed -= fed
            return self._feed(rejected=0) if fed else self._draft(rejected=0)
        deciding = logits[0, max(self._unfed - 1, 0) :]
        block, verifiable, accepted = self._block, len(deciding) - 1, 0
        for at, row in enumerate(deciding):
            draft = block[at] if at < len(block) else self._next_draft()
            token_id, finished = self._decide(row[None], draft)
            if at == verifiable or draft is None or draft.token_id != token_id:
                break
            accepted += 1
            if finished:
                break
        self._drafted += verifiable
        self._accepted += accepted
        self._source.length.add(verifiable, accepted)
        self._unfed = 1
        return None if finished else self._draft(rejected=verifiable - accepted)

    def responses(self, timings_ms: Mapping[str, float]) -> list[list[Generation]]:
        """The response so far, the only one to the only prompt."""
        generation = self._text.response(self._request.blank(self._row, timings_ms))
        return [[replace(generation, drafted_tokens=self._drafted, accepted_tokens=self._accepted)]]

    @property
    def _draft_room(self) -> int:
        """The number of tokens that may be fed behind the response so far."""
        return max(self._request.options.max_new_tokens - len(self._ids) - 1, 0)

    def _next_block(self) -> list[DraftToken]:
        """Drafts of the tokens after the response so far; none if no drafter proposes any, or if they do not pay."""
        for source in self._sources:
            # A draft of the last new token is not fed, but may be accepted without the verifier.
            most = min(source.length.choose(), self._draft_room)
            if self._defers:
                most = max(most, 1)
            if most and (block := source.drafts(self._ids, most)):
                self._source = source
                return block
        return []

    def _next_draft(self) -> DraftToken | None:
        """A draft of the next token alone, where the choice depends on it; None: it does not, or there is none."""
        if not self._defers and not self._request.options.do_sample:
            return None
        return next(iter(self._source.drafts(self._ids, 1)), None)

    def _decide(self, logits: Logits, draft: DraftToken | None) -> tuple[int, bool]:
        """The next token, from the verifier's logits [1, vocab_size] and a draft; and whether the response is finished."""
        index = len(self._ids)
        self._request.check_finite(logits, np.array([self._row]), new_token=index + 1)
        scores = self._sampler.scores(logits)
        if draft is not None and draft.confidence >= self._confident:
            token_id = draft.token_id
        elif draft is not None and draft.distribution is not None:
            token_id = verified(scores[0], draft, accept=self._accepts[index], redraw=self._redraws[index])
        else:
            token_id = int(self._sampler.pick(scores)[0])
        self._sampler.accept(np.array([token_id]), scores)
        logprob = float(self._sampler.logprobs()[0]) if self._request.options.output_scores else None
        return token_id, self._emit(token_id, logprob)

    def _emit(self, token_id: int, logprob: float | None = None) -> bool:
        """Append a token to the response. Returns whether it is finished."""
        self._ids.append(token_id)
        step = self._text.push(token_id, logprob, last=len(self._ids) == self._request.options.max_new_tokens)
        self.last.append(step)
        return step.finish_reason is not None

    def _draft(self, *, rejected: int) -> Continuation | None:
        """Draft the next block."""
        block, confident = self._next_block(), 0
        for draft in block:
            if draft.confidence < self._confident:
                break
            confident += 1
            self._unfed += 1
            self._sampler.accept(np.array([draft.token_id]))
            if self._emit(draft.token_id):
                return None
        self._block = block[confident:]
        if confident and not self._block:
            # The verifier is not needed yet.
            return Continuation(as_row([]), rejected=rejected)
        return self._feed(rejected=rejected)

    def _feed(self, *, rejected: int) -> Continuation:
        """Feed the response's ids that were not fed, and the block."""
        eos: Sequence[int] = self._request.manifest.special_ids.eos
        drafts = [draft.token_id for draft in self._block[: self._draft_room]]
        # The token after an EOS is not needed.
        if drafts and drafts[-1] in eos:
            drafts.pop()
        return Continuation(as_row([*self._ids[len(self._ids) - self._unfed :], *drafts]), rejected=rejected)
