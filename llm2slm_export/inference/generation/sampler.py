"""The sampler: the next token of each row, by greedy search or sampling. Rows are independent."""

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
        special_ids: `eos` and `decoder_start` are used.
        num_tokens: number of ids of the SLM's tokenizer. Ids from here on are never chosen.
        rows: of each row, its prompt's index in the call and its index among the prompt's sequences. They seed the row's
            own random generator, so samples do not depend on batches.

    Raises:
        UsageError: options have ids from `num_tokens` on.
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
        """The next id of each row, [rows], from logits [rows, vocab_size].

        Raises:
            UsageError: the options leave a row without tokens.
        """
        # Before the softmax, slicing off ids is equivalent to transformers' setting them to minus infinity.
        scores = self._processors(logits[:, : self._num_tokens])
        ids = self._draw(softmax(scores)) if self._options.do_sample else scores.argmax(axis=1)
        if self._options.output_scores:
            self._logprobs = np.take_along_axis(log_softmax(scores), ids[:, None], axis=1)[:, 0]
        self._processors.append(ids)
        return ids

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the one with the highest logit, without processing."""
        return self._processors.idle and not self._options.output_scores

    def accept(self, ids: Ids) -> Ids:
        """Append ids [rows] that the backend chose (`is_plain_greedy`). Returns them."""
        self._processors.append(ids)
        return ids

    def logprobs(self) -> npt.NDArray[np.float32]:
        """The log-probability [rows] of each id of the last `choose`, under the processed scores. Needs `output_scores`.

        Equal to transformers' `compute_transition_scores(sequences, scores, normalize_logits=True)`.
        """
        assert self._logprobs is not None, "output_scores is off, or nothing has been chosen"
        return self._logprobs

    def keep(self, rows: Ids) -> None:
        """Keep only these rows, given as indices of the current ones."""
        self._processors.keep(rows)
        self._generators = [self._generators[row] for row in rows] if self._generators else []

    def _draw(self, probabilities: Logits) -> Ids:
        ids = np.empty(len(probabilities), np.int64)
        for row, (of, generator) in enumerate(zip(probabilities, self._generators, strict=True)):
            possible = np.flatnonzero(of)
            cumulative = np.cumsum(of[possible], dtype=np.float64)
            # One uniform number per row and call, so a row's samples do not depend on other rows.
            place = np.searchsorted(cumulative / cumulative[-1], generator.random(), side="right")
            ids[row] = possible[place]
        return ids
