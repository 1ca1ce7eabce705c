"""A pair's head as the drafter for another head: the SLM drafts, the LLM verifies."""

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from llm2slm_export.inference.generation.call_costs import DraftRecord
from llm2slm_export.inference.generation.drafting import DraftToken, as_row, common_prefix
from llm2slm_export.inference.generation.draws import Draws
from llm2slm_export.inference.generation.logits_processors import softmax
from llm2slm_export.inference.generation.sampler import Sampler, draw
from llm2slm_export.inference.request import Request
from llm2slm_export.inference.rows.drafted_row import DRAFT
from llm2slm_export.inference.runtime.backend import Conditioning

UNLIKELY = 0.4  # a draft with less confidence is the last of its block, as in transformers' assisted generation


class HeadDrafter:
    """Drafts one response with a head of its own.

    Args:
        request: the request; `backend` and `manifest` are the drafting head's.
        row: the index of the prompt among the request's.
        conditioning: the head's conditioning of this prompt alone.
        record: records what drafts cost.
        least_confidence: a draft with less confidence is the last of its block.
    """

    def __init__(
        self, request: Request, row: int, conditioning: Conditioning, record: DraftRecord, *, least_confidence: float
    ) -> None:
        options, manifest = request.options, request.manifest
        self._request, self._record, self._least_confidence = request, record, least_confidence
        rows = [(request.prompts[row], 0)]
        self._sampler = Sampler(options, special_ids=manifest.special_ids, num_tokens=request.num_tokens, rows=rows)
        self._draws = Draws([options.seed or 0, request.prompts[row], 0, DRAFT])
        self._state, logits = request.backend.prefill(conditioning)
        self._logits = logits[0].copy()  # [vocab_size], of the token after the fed ones
        self._start = int(request.backend.lengths(self._state)[0])
        self._fed: list[int] = []
        self._chosen: list[int] = []  # the ids that the sampler has
        limits = request.backend.limits
        bounds = [manifest.max_total_tokens, None if limits is None else limits.capacity]
        # In an encoder-decoder SLM the start token takes the last new token's position.
        rooms = [bound - self._start for bound in bounds if bound is not None]
        self._most = min([request.options.max_new_tokens, *rooms])

    def draft(self, ids: Sequence[int], most: int) -> list[DraftToken]:
        """At most `most` tokens after `ids`, each the head's own choice after those before it."""
        most = min(most, self._most - len(ids))
        if most <= 0:
            return []
        started = perf_counter()
        self._catch_up(ids)
        drafts: list[DraftToken] = []
        while True:
            drafts.append(self._choose(len(ids) + len(drafts)))
            last = drafts[-1]
            if (
                len(drafts) == most
                or last.token_id in self._request.manifest.special_ids.eos
                or last.confidence < self._least_confidence
            ):
                break
            self._feed([last.token_id])
        self._record.add_draft(len(drafts), (perf_counter() - started) * 1e3)
        return drafts

    def _catch_up(self, ids: Sequence[int]) -> None:
        """Bring the state to `ids`, whose last token it may not have been fed."""
        same = common_prefix(self._fed, ids)
        if same == len(ids) < len(self._fed):
            same -= 1  # the logits of the last id were overwritten
        if same < len(self._fed):
            self._request.backend.rewind(self._state, np.array([self._start + same]))
            del self._fed[same:]
        kept = common_prefix(self._chosen, ids)
        self._sampler.truncate(kept)
        del self._chosen[kept:]
        for token_id in ids[kept:]:
            self._append(token_id)
        if same < len(ids):
            self._feed(ids[same:])

    def _feed(self, ids: Sequence[int]) -> None:
        self._logits = self._request.backend.step(self._state, as_row(ids))[0, -1].copy()
        self._fed += ids

    def _choose(self, index: int) -> DraftToken:
        """The head's choice of the token with this index in the response."""
        scores = self._sampler.scores(self._logits[None])
        distribution = softmax(scores)[0] if self._request.options.do_sample else None
        token_id = int(scores[0].argmax()) if distribution is None else draw(distribution, self._draws[index])
        self._append(token_id)
        known = self._logits[: self._request.num_tokens].astype(np.float64)
        shares = np.exp(known - known.max())
        return DraftToken(token_id, distribution, float(shares[token_id] / shares.sum()))

    def _append(self, token_id: int) -> None:
        self._sampler.accept(np.array([token_id]))
        self._chosen.append(token_id)
