"""The sampler: the next token of each row, by greedy search or sampling. Rows are independent."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm2slm_export.bundle.manifest import SpecialIds
from llm2slm_export.inference.generation.draws import Draws, fresh_seed
from llm2slm_export.inference.generation.logits_processors import Processors, log_softmax, softmax
from llm2slm_export.inference.generation.options import GenerationOptions
from llm2slm_export.inference.runtime.backend import Ids, Logits


class Sampler:
    """Chooses the next token of every row, call after call.

    Args:
        special_ids: `eos` and `decoder_start` are used.
        num_tokens: number of ids of the SLM's tokenizer. Ids from here on are never chosen.
        rows: of each row, its prompt's index in the call and its index among the prompt's sequences. They are the
            key of the row's random draws, so samples do not depend on batches.

    Raises:
        UsageError: options have ids from `num_tokens` on.
    """

    def __init__(
        self, options: GenerationOptions, *, special_ids: SpecialIds, num_tokens: int, rows: Sequence[tuple[int, int]]
    ) -> None:
        self._options = options
        self._num_tokens = num_tokens
        self._processors = Processors(options, special_ids=special_ids, num_tokens=num_tokens, rows=len(rows))
        entropy = fresh_seed() if options.seed is None else options.seed
        self._draws = [Draws([entropy, *row]) for row in rows] if options.do_sample else []
        self._logprobs: npt.NDArray[np.float32] | None = None

    def choose(self, logits: Logits) -> Ids:
        """The next id of each row, [rows], from logits [rows, vocab_size].

        Raises:
            UsageError: the options leave a row without tokens.
        """
        scores = self.scores(logits)
        return self.accept(self.pick(scores), scores)

    def pick(self, scores: Logits) -> Ids:
        """The next id of each row, [rows], by processed scores [rows, num_tokens]. It is not appended."""
        if not self._options.do_sample:
            ids: Ids = scores.argmax(axis=1)
            return ids
        index = self._processors.generated.shape[1]
        weights = softmax(scores)
        return np.array([draw(of, draws[index]) for of, draws in zip(weights, self._draws, strict=True)], np.int64)

    def scores(self, logits: Logits) -> Logits:
        """The processed scores [rows, num_tokens] of the next token, from logits [rows, vocab_size].

        Raises:
            UsageError: the options leave a row without tokens.
        """
        # Before the softmax, slicing off ids is equivalent to transformers' setting them to minus infinity.
        return self._processors(logits[:, : self._num_tokens])

    def truncate(self, tokens: int) -> None:
        """Forget all ids but the first `tokens` of each row."""
        self._processors.truncate(tokens)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the one with the highest logit, without processing."""
        return self._processors.idle and not self._options.output_scores

    def accept(self, ids: Ids, scores: Logits | None = None) -> Ids:
        """Append ids [rows]. Returns them.

        Args:
            scores: [rows, num_tokens] the processed scores that they were chosen by, for `logprobs`; None: `logprobs` is not
                read.
        """
        if self._options.output_scores and scores is not None:
            self._logprobs = np.take_along_axis(log_softmax(scores), ids[:, None], axis=1)[:, 0]
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
        self._draws = [self._draws[row] for row in rows] if self._draws else []


def draw(weights: Logits, uniform: float) -> int:
    """The id that a uniform number in [0, 1) selects, by weights [num_tokens] that need not add up to 1."""
    possible = np.flatnonzero(weights)
    cumulative = np.cumsum(weights[possible], dtype=np.float64)
    return int(possible[np.searchsorted(cumulative / cumulative[-1], uniform, side="right")])
