"""Rows whose next token is chosen one by one, by greedy search or sampling."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from llm2slm_export.inference.decode_core import Continuation
from llm2slm_export.inference.generation.detokenizer import Detokenizer
from llm2slm_export.inference.generation.options import FinishReason
from llm2slm_export.inference.generation.sampler import Sampler
from llm2slm_export.inference.outputs import Generation, Step
from llm2slm_export.inference.request import Request
from llm2slm_export.inference.rows.request_rows import RequestRows
from llm2slm_export.inference.runtime.backend import Ids, Logits


class SampledRows(RequestRows):
    """The `num_return_sequences` responses to each prompt of a request.

    Attributes:
        last: the steps of the last call, one for each row that was running.
        last_rows: [rows] the rows of these steps: `num_return_sequences` for each prompt, in order.
    """

    def __init__(self, request: Request) -> None:
        options = request.options
        super().__init__(request, len(request.prompts))
        self._count = options.num_return_sequences
        rows = [(prompt, sequence) for prompt in request.prompts for sequence in range(self._count)]
        self._sampler = Sampler(
            options, special_ids=request.manifest.special_ids, num_tokens=request.num_tokens, rows=rows
        )
        self._texts = [ResponseText(request) for _ in rows]
        self._running = np.arange(len(rows))
        self.last: Sequence[Step] = ()
        self.last_rows = self._running

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next tokens are those with the highest logit, without processing."""
        return self._sampler.is_plain_greedy

    def advance(self, logits: Logits) -> Continuation | None:
        """Choose the next token of each row from logits [rows, 1, vocab_size].

        Raises:
            BundleError: the logits are not finite.
            UsageError: the options leave a row without tokens.
        """
        logits, copies = logits[:, 0], None
        if self._new_tokens == 0 and self._count > 1:
            copies = np.repeat(np.arange(len(logits)), self._count)
            logits = logits[copies]
        self._check_finite(logits)
        return self._advanced(self._sampler.choose(logits), copies)

    def advance_greedy(self, ids: Ids, logits: Logits) -> Continuation | None:
        """Append ids [rows], those with the highest logit, and check these logits [rows].

        Raises:
            BundleError: the logits are not finite.
        """
        self._check_finite(logits[:, None])
        return self._advanced(self._sampler.accept(ids), None)

    def responses(self, timings_ms: Mapping[str, float]) -> list[list[Generation]]:
        """The responses so far, a list per prompt."""
        request, count = self._request, self._count
        return [
            [self._texts[row * count + sequence].response(request.blank(row, timings_ms)) for sequence in range(count)]
            for row in range(len(request.prompts))
        ]

    def _check_finite(self, logits: Logits) -> None:
        self._request.check_finite(logits, self._running // self._count, new_token=self._new_tokens + 1)

    def _advanced(self, ids: Ids, copies: Ids | None) -> Continuation | None:
        """Append the chosen ids [rows], and keep the unfinished rows.

        Args:
            copies: [rows] the prompt of each row, in the first call with several rows per prompt.
        """
        options = self._request.options
        self._new_tokens += 1
        logprobs = self._sampler.logprobs().tolist() if options.output_scores else [None] * len(ids)
        last = self._new_tokens == options.max_new_tokens
        self.last_rows = self._running
        self.last = [
            self._texts[row].push(token_id, logprob, last=last)
            for row, token_id, logprob in zip(self._running.tolist(), ids.tolist(), logprobs, strict=True)
        ]
        going = [at for at, step in enumerate(self.last) if step.finish_reason is None]
        if not going:
            return None
        if len(going) == len(ids):
            return Continuation(ids[:, None], copies)
        kept = np.array(going)
        self._sampler.keep(kept)
        self._running = self._running[kept]
        return Continuation(ids[kept][:, None], kept if copies is None else copies[kept])


class ResponseText:
    """One response, token by token.

    Args:
        request: the request that it answers.
    """

    def __init__(self, request: Request) -> None:
        self._eos = request.manifest.special_ids.eos
        self._detokenizer = Detokenizer(request.decode, request.options.stop)
        self._steps: list[Step] = []

    def push(self, token_id: int, logprob: float | None, *, last: bool) -> Step:
        """Append a token. `last`: there is no room for another."""
        piece = self._detokenizer.push(token_id)
        reason: FinishReason | None = "length" if last else None
        if token_id in self._eos:
            reason = "stop"
        if reason and not self._detokenizer.stopped:
            piece += self._detokenizer.finish()
        step = Step(token_id, piece, "stop" if self._detokenizer.stopped else reason, logprob)
        self._steps.append(step)
        return step

    def response(self, blank: Generation) -> Generation:
        """The response so far, in an empty one."""
        steps: Sequence[Step] = self._steps
        logprobs = tuple(step.logprob for step in steps if step.logprob is not None)
        return replace(
            blank,
            text="".join(step.text for step in steps),
            token_ids=tuple(step.token_id for step in steps),
            finish_reason=(steps[-1].finish_reason if steps else None) or "length",
            new_tokens=len(steps),
            token_logprobs=logprobs or None,
        )
