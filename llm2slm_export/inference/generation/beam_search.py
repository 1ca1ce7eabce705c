"""Beam search: transformers' `_beam_search`, one step per call. Prompts are independent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llm2slm_export.bundle.manifest import SpecialIds
from llm2slm_export.inference.generation.draws import fresh_seed
from llm2slm_export.inference.generation.logits_processors import Mask, Processors, highest, log_softmax, softmax
from llm2slm_export.inference.generation.options import FinishReason, GenerationOptions
from llm2slm_export.inference.runtime.backend import Ids, Logits

# transformers' score of excluded candidates. It is added rather than assigned, which preserves their order.
_EXCLUDED = np.float32(-1e9)


@dataclass(frozen=True, eq=False)
class Advance:
    """The decoder's next call.

    Args:
        rows: [rows] for each row of the call, the row of the last logits whose decoder state it continues.
        ids: [rows] the token fed to each row.
    """

    rows: Ids
    ids: Ids


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence.

    Args:
        token_ids: the tokens without the decoder start token, including the EOS or the token that completed a stop string.
        finish_reason: `stop` (EOS or stop string) or `length` (`max_new_tokens`).
        score: transformers' `sequences_scores`.
        logprobs: log-probability of each token, transformers' `compute_transition_scores(sequences, scores, beam_indices)`.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    score: float
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class _Candidates:
    """Beams extended by one token. There are more candidates than beams, because some may be finished.

    Args:
        rows: [prompts, candidates] the row of the logits that each continues.
        ids: [prompts, candidates] the last token.
        totals: [prompts, candidates] the sum of the tokens' log-probabilities.
        logprobs: [prompts, candidates] the last token's log-probability.
        stopped: [prompts, candidates] whether an EOS or a stop string ends it.
    """

    rows: Ids
    ids: Ids
    totals: Logits
    logprobs: Logits
    stopped: Mask


class BeamSearch:
    """Extends `num_beams` sequences per prompt, and keeps the best finished ones.

    Args:
        special_ids: `eos` and `decoder_start` are used.
        num_tokens: number of ids of the SLM's tokenizer. Ids from here on are never chosen.
        prompts: each prompt's index in the call. It seeds the prompt's own random generator, so samples do not depend on
            batches.
        stops: whether the text of token ids (without the decoder start token) contains a stop string.

    Raises:
        UsageError: options have ids from `num_tokens` on.
    """

    def __init__(
        self,
        options: GenerationOptions,
        *,
        special_ids: SpecialIds,
        num_tokens: int,
        prompts: Sequence[int],
        stops: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self._options, self._num_tokens, self._eos, self._stops = options, num_tokens, special_ids.eos, stops
        self._processors = Processors(options, special_ids=special_ids, num_tokens=num_tokens, rows=len(prompts))
        entropy = fresh_seed() if options.seed is None else options.seed
        self._generators = [np.random.default_rng([entropy, prompt]) for prompt in prompts] if options.do_sample else []
        beams = options.num_beams
        # Enough candidates that `num_beams` remain unfinished even if every beam's EOS ids are among the best.
        self._count = min(max(2, 1 + len(special_ids.eos)) * beams, beams * num_tokens)
        # Indices into `prompts` of the unfinished ones. Rows, and the arrays below, [open, beams], are in this order.
        self._open = np.arange(len(prompts))
        # All beams start equal. Without excluding all but the first, the first step would find each candidate `beams` times.
        self._totals = np.full((len(prompts), beams), _EXCLUDED, np.float32)
        self._totals[:, 0] = 0
        self._logprobs = np.zeros((len(prompts), 0), np.float32)  # [rows, tokens]
        self._scores = np.full((len(prompts), beams), _EXCLUDED, np.float32)
        self._complete = np.zeros((len(prompts), beams), bool)
        self._hypotheses: list[list[Hypothesis | None]] = [[None] * beams for _ in prompts]

    def advance(self, logits: Logits) -> Advance | None:
        """The next decoder call, without rows of finished prompts; None when every prompt is finished.

        Args:
            logits: [rows, vocab_size] of the last returned rows; in the first call [prompts, vocab_size].

        Raises:
            UsageError: the options leave a row without tokens.
        """
        length = self._processors.generated.shape[1] + 1
        candidates = self._candidates(logits)
        last = length == self._options.max_new_tokens
        finished = candidates.stopped | last
        running = _exclude(candidates.totals, finished)
        places = highest(running, self._options.num_beams)
        self._finish(candidates, finished, length=length)
        totals = np.take_along_axis(running, places, axis=1)
        going = self._can_improve(totals[:, :1], length=length) & ~finished.all(axis=1)
        if self._options.early_stopping is True:
            going &= ~self._complete.all(axis=1)
        return self._continue(candidates, places, totals, going=going)

    def results(self) -> list[list[Hypothesis]]:
        """The `num_return_sequences` best hypotheses of each prompt, best first.

        If the options left fewer sequences, the others are empty and score -1e9.
        """
        none = Hypothesis(token_ids=(), finish_reason="length", score=float(_EXCLUDED), logprobs=())
        count = self._options.num_return_sequences
        return [[hypothesis or none for hypothesis in best[:count]] for best in self._hypotheses]

    def _candidates(self, logits: Logits) -> _Candidates:
        prompts = len(self._open)
        # transformers suppresses ids without a token after the softmax, so the softmax is over all ids.
        scores = self._processors(log_softmax(logits)[:, : self._num_tokens])
        # [prompts, beams, num_tokens]; in the first call all beams of a prompt share its row.
        totals = scores.reshape(prompts, -1, self._num_tokens) + self._totals[:, :, None]
        totals = totals.reshape(prompts, -1)
        columns = self._draw(totals) if self._options.do_sample else highest(totals, self._count)
        beams, ids = np.divmod(columns, self._num_tokens)
        rows = np.arange(len(scores)).reshape(prompts, -1)
        rows = np.take_along_axis(np.broadcast_to(rows, self._totals.shape), beams, axis=1)
        return _Candidates(
            rows=rows,
            ids=ids,
            totals=np.take_along_axis(totals, columns, axis=1),
            logprobs=scores[rows, ids],
            stopped=self._stopped(rows, ids),
        )

    def _draw(self, totals: Logits) -> Ids:
        """Columns [open, candidates] of totals [open, beams · num_tokens], sampled without replacement, highest first.

        A prompt continues with the best of its samples, as in transformers since 5.24.
        """
        columns = np.empty((len(totals), self._count), np.int64)
        for row, (place, probabilities) in enumerate(zip(self._open, softmax(totals), strict=True)):
            possible = np.flatnonzero(probabilities)
            # The order of exponential waiting times at these rates is that of sampling without replacement.
            waits = self._generators[place].standard_exponential(len(possible)) / probabilities[possible]
            order = highest(-waits[None], min(self._count, len(possible)))[0]
            drawn = possible[order]
            # If too few are possible, the rest are excluded by their score.
            impossible = np.flatnonzero(probabilities == 0)[: self._count - len(drawn)]
            columns[row] = np.concatenate([drawn, impossible])
        order = highest(np.take_along_axis(totals, columns, axis=1), self._count)
        return np.take_along_axis(columns, order, axis=1)

    def _stopped(self, rows: Ids, ids: Ids) -> Mask:
        stopped = np.isin(ids, self._eos)
        if self._stops is not None:
            generated = self._processors.generated
            for at in zip(*np.nonzero(~stopped), strict=True):
                stopped[at] = self._stops([*generated[rows[at]].tolist(), int(ids[at])])
        return stopped

    def _finish(self, candidates: _Candidates, finished: Mask, *, length: int) -> None:
        """Keep the best of the finished hypotheses and of the candidates that finish now."""
        beams = self._options.num_beams
        # Candidates after the first `beams` only serve to continue.
        finishing = finished & (np.arange(self._count) < beams)
        scores = _exclude(candidates.totals / self._weight(length), ~finishing)
        # New ones first, because the first of equal scores is taken. Unfinished ones score worst on both sides.
        scores = np.concatenate([scores, self._scores], axis=1)
        best = highest(scores, beams)
        for row, place in enumerate(self._open):
            before = self._hypotheses[place]
            self._hypotheses[place] = [
                before[at - self._count]
                if at >= self._count
                else self._hypothesis(candidates, (row, at), scores[row, at])
                if finishing[row, at]
                else None
                for at in best[row]
            ]
        self._scores = np.take_along_axis(scores, best, axis=1)
        self._complete = np.take_along_axis(np.concatenate([finishing, self._complete], axis=1), best, axis=1)

    def _hypothesis(self, candidates: _Candidates, at: tuple[int, int], score: np.float32) -> Hypothesis:
        row = candidates.rows[at]
        return Hypothesis(
            token_ids=(*self._processors.generated[row].tolist(), int(candidates.ids[at])),
            finish_reason="stop" if candidates.stopped[at] else "length",
            score=float(score),
            logprobs=(*self._logprobs[row].tolist(), float(candidates.logprobs[at])),
        )

    def _can_improve(self, best: Logits, *, length: int) -> Mask:
        """Whether a beam can still beat the finished hypotheses, [open], given the best totals `best` [open, 1].

        transformers' heuristic: with `early_stopping="never"` it assumes the length that maximizes the score.
        """
        options = self._options
        patient = options.early_stopping == "never" and options.length_penalty > 0
        possible = best / self._weight(options.max_new_tokens if patient else length)
        worst = np.where(self._complete, self._scores.min(axis=1, keepdims=True), _EXCLUDED)
        improvable: Mask = np.greater(possible, worst).any(axis=1)
        return improvable

    def _weight(self, length: int) -> np.float32:
        return np.float32(float(length) ** self._options.length_penalty)

    def _continue(self, candidates: _Candidates, places: Ids, totals: Logits, *, going: Mask) -> Advance | None:
        """Continue the candidates at `places` [open, beams] of the prompts selected by the mask `going` [open]."""
        prompts = np.flatnonzero(going)[:, None]
        places = places[going]
        rows, ids = candidates.rows[prompts, places].ravel(), candidates.ids[prompts, places].ravel()
        logprobs = candidates.logprobs[prompts, places].reshape(-1, 1)
        self._processors.keep(rows)
        self._processors.append(ids)
        self._logprobs = np.concatenate([self._logprobs[rows], logprobs], axis=1)
        self._open, self._totals = self._open[going], totals[going]
        self._scores, self._complete = self._scores[going], self._complete[going]
        return Advance(rows=rows, ids=ids) if going.any() else None


def _exclude(scores: Logits, mask: Mask) -> Logits:
    return scores + np.where(mask, _EXCLUDED, np.float32(0))
