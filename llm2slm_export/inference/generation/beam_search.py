"""Beam search: transformers' `_beam_search`, one step per call, for prompts that do not know of each other."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llm2slm_export.bundle.manifest import SpecialIds
from llm2slm_export.inference.generation.logits_processors import Mask, Processors, highest, log_softmax, softmax
from llm2slm_export.inference.generation.options import FinishReason, GenerationOptions
from llm2slm_export.inference.runtime.backend import Ids, Logits

# transformers' score of what is no candidate. It is added, not assigned: what was better before stays better.
_OUT = np.float32(-1e9)


@dataclass(frozen=True, eq=False)
class Advance:
    """What the decoder runs next.

    Args:
        rows: [next rows] indices into the rows of the logits just given: whose decoder state each next row continues.
        ids: [next rows] the token each next row is fed.
    """

    rows: Ids
    ids: Ids


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence.

    Args:
        token_ids: without the decoder start token, up to and with the EOS or the token that completed a stop string.
        finish_reason: `stop` (EOS or stop string) or `length` (`max_new_tokens`).
        score: transformers' `sequences_scores`.
        logprobs: per token, transformers' `compute_transition_scores(sequences, scores, beam_indices)`.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    score: float
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class _Candidates:
    """Beams with one more token, per prompt: more of them than there are beams, since some may be finished.

    Args:
        rows: [prompts, candidates] the rows of the logits that they continue.
        ids: [prompts, candidates] their last tokens.
        totals: [prompts, candidates] the sums of their log-probabilities.
        logprobs: [prompts, candidates] the last tokens' part of that.
        stopped: [prompts, candidates] whether an EOS or a stop string ends them.
    """

    rows: Ids
    ids: Ids
    totals: Logits
    logprobs: Logits
    stopped: Mask


class BeamSearch:
    """Grows `num_beams` sequences of every prompt at once, and keeps the best that finished.

    Args:
        special_ids: `eos` and `decoder_start` count.
        num_tokens: ids from here on are never chosen: the tokenizer cannot produce them.
        prompts: the index of each prompt among all prompts. A prompt draws from a stream of its own, so borders and
            order of batches change nothing.
        stops: whether the text of token ids (without the decoder start token) has a stop string in it.

    Raises:
        UsageError: options that name ids from `num_tokens` on.
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
        entropy = secrets.randbits(64) if options.seed is None else options.seed
        self._generators = [np.random.default_rng([entropy, prompt]) for prompt in prompts] if options.do_sample else []
        beams = options.num_beams
        # So many that `num_beams` remain unfinished even if every beam's EOS ids are among the best.
        self._count = min(max(2, 1 + len(special_ids.eos)) * beams, beams * num_tokens)
        # Places in `prompts` of those that go on; the order of rows and of the arrays below, which are [open, beams].
        self._open = np.arange(len(prompts))
        # All beams begin alike; those after the first are out, or the first step would find everything `beams` times.
        self._totals = np.full((len(prompts), beams), _OUT, np.float32)
        self._totals[:, 0] = 0
        self._logprobs = np.zeros((len(prompts), 0), np.float32)  # [rows, tokens]
        self._scores = np.full((len(prompts), beams), _OUT, np.float32)
        self._complete = np.zeros((len(prompts), beams), bool)
        self._hypotheses: list[list[Hypothesis | None]] = [[None] * beams for _ in prompts]

    def advance(self, logits: Logits) -> Advance | None:
        """The next step, or None when every prompt is finished. Finished prompts have no rows in it.

        Args:
            logits: [rows, vocab] of the rows last returned; in the first call [prompts, vocab], a row per prompt.

        Raises:
            UsageError: the options leave a row no token.
        """
        length = self._processors.chosen.shape[1] + 1
        candidates = self._candidates(logits)
        last = length == self._options.max_new_tokens
        finished = candidates.stopped | last
        running = _out_where(candidates.totals, finished)
        places = highest(running, self._options.num_beams)
        self._finish(candidates, finished, length=length)
        totals = np.take_along_axis(running, places, axis=1)
        going = self._improvable(totals[:, :1], length=length) & ~finished.all(axis=1)
        if self._options.early_stopping is True:
            going &= ~self._complete.all(axis=1)
        return self._go_on(candidates, places, totals, going=going)

    def results(self) -> list[list[Hypothesis]]:
        """Per prompt `num_return_sequences` hypotheses, best first.

        Where fewer finished, because options left no more sequences, the others are empty and score -1e9.
        """
        none = Hypothesis(token_ids=(), finish_reason="length", score=float(_OUT), logprobs=())
        count = self._options.num_return_sequences
        return [[hypothesis or none for hypothesis in best[:count]] for best in self._hypotheses]

    def _candidates(self, logits: Logits) -> _Candidates:
        prompts = len(self._open)
        # transformers suppresses ids of no token after the softmax over all of them, so it counts them in it.
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
        """Columns [open, candidates] of totals [open, beams · num_tokens], drawn without replacement, the highest first.

        So a prompt goes on with the best of what it drew, as in transformers since 5.24.
        """
        columns = np.empty((len(totals), self._count), np.int64)
        for row, (place, probabilities) in enumerate(zip(self._open, softmax(totals), strict=True)):
            possible = np.flatnonzero(probabilities)
            # Waits at these rates end in the order of draws without replacement.
            waits = self._generators[place].standard_exponential(len(possible)) / probabilities[possible]
            order = highest(-waits[None], min(self._count, len(possible)))[0]
            drawn = possible[order]
            # Where too few are possible, the rest is out anyway.
            impossible = np.flatnonzero(probabilities == 0)[: self._count - len(drawn)]
            columns[row] = np.concatenate([drawn, impossible])
        order = highest(np.take_along_axis(totals, columns, axis=1), self._count)
        return np.take_along_axis(columns, order, axis=1)

    def _stopped(self, rows: Ids, ids: Ids) -> Mask:
        stopped = np.isin(ids, self._eos)
        if self._stops is not None:
            chosen = self._processors.chosen
            for at in zip(*np.nonzero(~stopped), strict=True):
                stopped[at] = self._stops([*chosen[rows[at]].tolist(), int(ids[at])])
        return stopped

    def _finish(self, candidates: _Candidates, finished: Mask, *, length: int) -> None:
        """Keep the best of what finished before and of the candidates that finish now."""
        beams = self._options.num_beams
        # A candidate behind `beams` others is there to go on with only.
        finishing = finished & (np.arange(self._count) < beams)
        scores = _out_where(candidates.totals / self._weight(length), ~finishing)
        # The new ones first: of equals the first is taken, and what has not finished, on either side, scores the worst.
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
            token_ids=(*self._processors.chosen[row].tolist(), int(candidates.ids[at])),
            finish_reason="stop" if candidates.stopped[at] else "length",
            score=float(score),
            logprobs=(*self._logprobs[row].tolist(), float(candidates.logprobs[at])),
        )

    def _improvable(self, best: Logits, *, length: int) -> Mask:
        """[open] whether beams of which the best totals are `best` [open, 1] may still come before what finished.

        transformers' heuristic: for `early_stopping="never"` it takes the length that makes most of the total.
        """
        options = self._options
        patient = options.early_stopping == "never" and options.length_penalty > 0
        possible = best / self._weight(options.max_new_tokens if patient else length)
        worst = np.where(self._complete, self._scores.min(axis=1, keepdims=True), _OUT)
        improvable: Mask = np.greater(possible, worst).any(axis=1)
        return improvable

    def _weight(self, length: int) -> np.float32:
        return np.float32(float(length) ** self._options.length_penalty)

    def _go_on(self, candidates: _Candidates, places: Ids, totals: Logits, *, going: Mask) -> Advance | None:
        """Continue the candidates at `places` [open, beams] of the prompts that are `going` [open]."""
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


def _out_where(scores: Logits, mask: Mask) -> Logits:
    return scores + np.where(mask, _OUT, np.float32(0))
