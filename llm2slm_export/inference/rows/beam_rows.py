"""The beams of prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from llm2slm_export.inference.decode_core import Continuation
from llm2slm_export.inference.generation.beam_search import BeamSearch, Hypothesis
from llm2slm_export.inference.outputs import Generation
from llm2slm_export.inference.request import Request
from llm2slm_export.inference.rows.request_rows import RequestRows
from llm2slm_export.inference.runtime.backend import Logits


class BeamRows(RequestRows):
    """The beams of each prompt of a request."""

    def __init__(self, request: Request) -> None:
        super().__init__(request, len(request.prompts))
        self._stop = request.options.stop
        self._search = BeamSearch(
            request.options, special_ids=request.manifest.special_ids, num_tokens=request.num_tokens,
            prompts=request.prompts, stops=self._stop_check(),
        )  # fmt: skip
        # [rows]: the encoding's row of each beam.
        self._sources = np.arange(len(request.prompts))

    def advance(self, logits: Logits) -> Continuation | None:
        """Extend the beams, from logits [beams, 1, vocab_size].

        Raises:
            BundleError: the logits are not finite.
            UsageError: the options leave a beam without tokens.
        """
        self._new_tokens += 1
        self._request.check_finite(logits[:, 0], self._sources, new_token=self._new_tokens)
        found = self._search.advance(logits[:, 0])
        if found is None:
            return None
        self._sources = self._sources[found.rows]
        return Continuation(found.ids[:, None], found.rows)

    def responses(self, timings_ms: Mapping[str, float]) -> list[list[Generation]]:
        """The best responses to each prompt, best first."""
        return [
            [self._response(self._request.blank(row, timings_ms), found) for found in hypotheses]
            for row, hypotheses in enumerate(self._search.results())
        ]

    def _response(self, blank: Generation, found: Hypothesis) -> Generation:
        text = self._request.decode(found.token_ids)
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        return replace(
            blank,
            text=text[: min(ends, default=len(text))],
            token_ids=tuple(found.token_ids),
            finish_reason=found.finish_reason,
            new_tokens=len(found.token_ids),
            score=found.score,
            token_logprobs=tuple(found.logprobs) if self._request.options.output_scores else None,
        )

    def _stop_check(self) -> Callable[[Sequence[int]], bool] | None:
        """A check whether the text of ids contains a stop string; None without stop strings."""
        decode, stop = self._request.decode, self._stop
        return (lambda ids: any(string in decode(ids) for string in stop)) if stop else None
