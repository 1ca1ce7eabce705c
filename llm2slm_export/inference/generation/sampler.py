"""The choice of the next token, greedy or drawn, for rows that do not know of each other."""

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm2slm_export.bundle.manifest import SpecialIds
from llm2slm_export.inference.generation.logits_processors import Processors, log_softmax, softmax
from llm2slm_export.inference.generation.options import GenerationOptions
from llm2slm_export.inference.runtime.backend import Ids, Logits


class Sampler:
    """Chooses the next token of every row, call after call.

    Args:
        special_ids: `eos` and `decoder_start` count.
        num_tokens: ids from here on are never chosen: the tokenizer cannot produce them.
        rows: of each row, the index of its prompt among all prompts and the index of the sequence among those of its
            prompt. A row draws from a stream of its own, so borders and order of batches change nothing.

    Raises:
        UsageError: options that name ids from `num_tokens` on.
    """

    def __init__(
        self, options: GenerationOptions, *, special_ids: SpecialIds, num_tokens: int, rows: Sequence[tuple[int, int]]
    ) -> None:
        self._options = options
        self._num_tokens = num_tokens
        self._processors = Processors(options, special_ids=special_ids, num_tokens=num_tokens, rows=len(rows))
        entropy = secrets.randbits(64) if options.seed is None else options.seed
        self._generators = [np.random.default_rng([entropy, *row]) for row in rows] if options.do_sample else []
        self._logprobs: npt.NDArray[np.float32] | None = None

    def choose(self, logits: Logits) -> Ids:
        """The next id of each row, [rows], from logits [rows, vocab].

        Raises:
            UsageError: the options leave a row no token.
        """
        # Cutting them off equals transformers' suppressing (minus infinity) at any point before the softmax.
        scores = self._processors(logits[:, : self._num_tokens])
        ids = self._draw(softmax(scores)) if self._options.do_sample else scores.argmax(axis=1)
        if self._options.output_scores:
            self._logprobs = np.take_along_axis(log_softmax(scores), ids[:, None], axis=1)[:, 0]
        self._processors.append(ids)
        return ids

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is no more than the one with the highest logit."""
        return self._processors.idle and not self._options.output_scores

    def accept(self, ids: Ids) -> Ids:
        """Go on with ids [rows] that were chosen elsewhere, where `is_plain_greedy`; they are returned."""
        self._processors.append(ids)
        return ids

    def logprobs(self) -> npt.NDArray[np.float32]:
        """[rows] the log-probability of each id just chosen, under the processed scores. Needs `output_scores`.

        It is transformers' `compute_transition_scores(sequences, scores, normalize_logits=True)`.
        """
        assert self._logprobs is not None, "output_scores is off, or nothing has been chosen"
        return self._logprobs

    def keep(self, rows: Ids) -> None:
        """Go on with only these rows, indices into the present ones."""
        self._processors.keep(rows)
        self._generators = [self._generators[row] for row in rows] if self._generators else []

    def _draw(self, probabilities: Logits) -> Ids:
        ids = np.empty(len(probabilities), np.int64)
        for row, (of, generator) in enumerate(zip(probabilities, self._generators, strict=True)):
            possible = np.flatnonzero(of)
            cumulative = np.cumsum(of[possible], dtype=np.float64)
            # One uniform number a row and call: what a row draws depends on nothing else.
            place = np.searchsorted(cumulative / cumulative[-1], generator.random(), side="right")
            ids[row] = possible[place]
        return ids
