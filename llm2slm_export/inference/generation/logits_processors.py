"""transformers' logits processors and warpers in NumPy, in transformers' order.

The functions `keep_…` are warpers: only sampling uses them. Rows are independent of each other.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from llm2slm_export.bundle.manifest import SpecialIds
from llm2slm_export.errors import UsageError
from llm2slm_export.inference.generation.options import GenerationOptions
from llm2slm_export.inference.runtime.backend import Ids, Logits

Mask = npt.NDArray[np.bool_]

_MINUS_INFINITY = np.float32(-np.inf)
_BLOCK = 64


class Processors:
    """The processors and warpers that generation options enable, and the ids generated so far.

    Args:
        special_ids: `eos` and `decoder_start` are used.
        num_tokens: number of ids that have scores.
        rows: initial number of sequences.

    Raises:
        UsageError: options have ids from `num_tokens` on.
    """

    def __init__(self, options: GenerationOptions, *, special_ids: SpecialIds, num_tokens: int, rows: int) -> None:
        options.check_ids(num_tokens)
        start = special_ids.decoder_start
        # transformers' input_ids begin with the decoder start token; penalties and bad words include it, and lengths count
        # it. A decoder-only SLM, whose prompt is embeddings, has none.
        self._ids = np.full((rows, 0 if start is None else 1), start or 0, np.int64)
        self._start = self._ids.shape[1]
        self._options = options
        self._eos = [token_id for token_id in special_ids.eos if token_id < num_tokens]
        self._words = BadWords(options.bad_words_ids, eos=special_ids.eos)
        # Beam search needs a token besides every EOS to continue.
        self._least = max(2, len(special_ids.eos) + 1) if options.num_beams > 1 else 1

    @property
    def generated(self) -> Ids:
        """The ids [rows, tokens] generated so far, without the decoder start token."""
        return self._ids[:, self._start :]

    def __call__(self, scores: Logits) -> Logits:
        """Process the scores [rows, num_tokens] of the next token.

        Raises:
            UsageError: the options leave a row without tokens.
        """
        options, generated, unprocessed = self._options, self._ids.shape[1] - self._start, scores
        for process in self._active():
            scores = process(scores)
        if scores is not unprocessed and np.isneginf(scores.max(axis=1)).any():
            raise UsageError(
                f"The generation options exclude every token after {generated} tokens.",
                f"bad_words_ids: {len(options.bad_words_ids)} of them",
                f"no_repeat_ngram_size: {options.no_repeat_ngram_size}",
                remedy="exclude fewer tokens",
            )
        return warp(scores, options, least=self._least) if options.do_sample else scores

    @property
    def idle(self) -> bool:
        """Whether no processor or warper changes the scores of the next token."""
        return not self._options.do_sample and not self._active()

    def _active(self) -> list[Callable[[Logits], Logits]]:
        """The processors of the next token, in transformers' order."""
        options, ids, generated = self._options, self._ids, self._ids.shape[1] - self._start
        active: list[Callable[[Logits], Logits]] = []
        if options.repetition_penalty != 1.0:
            active.append(lambda scores: penalise_seen(scores, ids, penalty=options.repetition_penalty))
        if options.no_repeat_ngram_size:
            active.append(lambda scores: forbid_repeats(scores, ids, size=options.no_repeat_ngram_size))
        if options.bad_words_ids:
            active.append(lambda scores: self._words(scores, ids))
        if generated < options.min_new_tokens:
            active.append(lambda scores: forbid(scores, self._eos))
        # Like transformers, this forces the second token if there is no decoder start token.
        if (first := options.forced_bos_token_id) is not None and ids.shape[1] == 1:
            active.append(lambda scores: force(scores, first))
        if (last := options.forced_eos_token_id) is not None and generated == options.max_new_tokens - 1:
            active.append(lambda scores: force(scores, last))
        return active

    def append(self, ids: Ids) -> None:
        """Append the next token of each row, `ids` [rows]."""
        self._ids = np.concatenate([self._ids, ids[:, None]], axis=1)

    def truncate(self, tokens: int) -> None:
        """Forget all generated ids but the first `tokens` of each row."""
        self._ids = self._ids[:, : self._start + tokens]

    def keep(self, rows: Ids) -> None:
        """Select rows, given as indices of the current ones. Rows may repeat."""
        self._ids = self._ids[rows]


class BadWords:
    """The processor of `bad_words_ids`: sequences of ids that are never generated.

    Args:
        words: the sequences.
        eos: end-of-sequence ids. A sequence of only one of them is ignored, as in transformers.
    """

    def __init__(self, words: Sequence[tuple[int, ...]], *, eos: Sequence[int]) -> None:
        words = sorted((word for word in words if word not in [(token_id,) for token_id in eos]), key=len)
        # Grouped by length, to compare all words of a length at once.
        self._groups = [np.array(list(group), np.int64) for _, group in groupby(words, key=len)]

    def __call__(self, scores: Logits, ids: Ids) -> Logits:
        """Set scores [rows, num_tokens] of ids that would complete a word after `ids` [rows, length] to minus infinity."""
        fitting = [group for group in self._groups if group.shape[1] - 1 <= ids.shape[1]]
        if not fitting:
            return scores
        forbidden = scores.copy()
        for group in fitting:
            beginning, last = group[:, :-1], group[:, -1]
            end = ids[:, ids.shape[1] - beginning.shape[1] :]
            rows, words = np.nonzero((end[:, None] == beginning).all(axis=2))
            forbidden[rows, last[words]] = _MINUS_INFINITY
        return forbidden


def penalise_seen(scores: Logits, ids: Ids, *, penalty: float) -> Logits:
    """`repetition_penalty`: lower the scores [rows, num_tokens] of ids that occur in `ids` [rows, length]."""
    rows, places = np.nonzero(ids < scores.shape[1])
    seen = ids[rows, places]
    found, factor = scores[rows, seen], np.float32(penalty)
    penalised = scores.copy()
    penalised[rows, seen] = np.where(found < 0, found * factor, found / factor)
    return penalised


def forbid_repeats(scores: Logits, ids: Ids, *, size: int) -> Logits:
    """`no_repeat_ngram_size`: set scores [rows, num_tokens] that would repeat an n-gram of `ids` [rows, length] to minus
    infinity."""
    length = ids.shape[1]
    if length < size:
        return scores
    windows = np.lib.stride_tricks.sliding_window_view(ids, size, axis=1)  # [batch, windows, size]
    end = ids[:, None, length + 1 - size :]
    last = windows[..., -1]
    rows, places = np.nonzero((windows[..., :-1] == end).all(axis=2) & (last < scores.shape[1]))
    forbidden = scores.copy()
    forbidden[rows, last[rows, places]] = _MINUS_INFINITY
    return forbidden


def forbid(scores: Logits, ids: Sequence[int]) -> Logits:
    """Set the scores [rows, num_tokens] of `ids` to minus infinity."""
    forbidden = scores.copy()
    forbidden[:, list(ids)] = _MINUS_INFINITY
    return forbidden


def force(scores: Logits, token_id: int) -> Logits:
    """Scores [rows, num_tokens] that are zero for `token_id` and minus infinity for all other ids."""
    forced = np.full_like(scores, _MINUS_INFINITY)
    forced[:, token_id] = 0
    return forced


def warp(scores: Logits, options: GenerationOptions, *, least: int = 1) -> Logits:
    """Apply the warpers to scores [rows, num_tokens]. At least `least` ids per row are kept."""
    if options.temperature != 1.0:
        scores = scores / np.float32(options.temperature)
    if options.top_k:
        scores = keep_top_k(scores, options.top_k, least=least)
    if options.top_p < 1.0:
        scores = keep_top_p(scores, options.top_p, least=least)
    if options.min_p:
        scores = keep_min_p(scores, options.min_p, least=least)
    if options.typical_p < 1.0:
        scores = keep_typical_p(scores, options.typical_p, least=least)
    return scores


def keep_top_k(scores: Logits, top_k: int, *, least: int = 1) -> Logits:
    """Set scores [rows, num_tokens] below the row's k-th highest to minus infinity."""
    threshold = _nth_highest(scores, min(max(top_k, least), scores.shape[1]))
    return np.where(scores < threshold, _MINUS_INFINITY, scores)


def keep_top_p(scores: Logits, top_p: float, *, least: int = 1) -> Logits:
    """Set scores [rows, num_tokens] outside the smallest set with probability `top_p` to minus infinity."""
    probabilities, most = softmax(scores), 1 - top_p
    # Sorting dominates the time. Ids whose total probability is below `most` are removed unsorted; the margin covers
    # rounding.
    worth = probabilities >= 0.999 * most / scores.shape[1]
    if least > 1:
        np.put_along_axis(worth, highest(scores, min(least, scores.shape[1])), values=True, axis=1)
    columns, valid = _columns(worth)
    candidates = np.where(valid, np.take_along_axis(scores, columns, axis=1), _MINUS_INFINITY)
    weights = np.where(valid, np.take_along_axis(probabilities, columns, axis=1), 0)
    rest = probabilities.sum(axis=1, dtype=np.float64) - weights.sum(axis=1, dtype=np.float64)
    order = np.argsort(candidates, axis=1, kind="stable")
    columns, valid, weights = (np.take_along_axis(of, order, axis=1) for of in (columns, valid, weights))
    cumulative = rest[:, None] + np.cumsum(weights, axis=1, dtype=np.float64)
    mask = cumulative.astype(np.float32) > np.float32(most)
    mask[:, -least:] = True
    return _only(scores, columns, mask=mask & valid)


def keep_min_p(scores: Logits, min_p: float, *, least: int = 1) -> Logits:
    """Set scores [rows, num_tokens] with a probability below `min_p` times the row's highest to minus infinity."""
    probabilities = softmax(scores)
    removed = probabilities < np.float32(min_p) * probabilities.max(axis=1, keepdims=True)
    # The most probable id is always kept.
    if least > 1:
        np.put_along_axis(removed, highest(probabilities, min(least, scores.shape[1])), values=False, axis=1)
    return np.where(removed, _MINUS_INFINITY, scores)


def keep_typical_p(scores: Logits, typical_p: float, *, least: int = 1) -> Logits:
    """Set scores [rows, num_tokens] outside the most typical set with probability `typical_p` to minus infinity.

    The most typical ids are those whose negative log-probability is nearest to the entropy.
    """
    # Sorting dominates the time, and top-k leaves few ids.
    columns, valid = _columns(~np.isneginf(scores))
    logarithms = log_softmax(np.where(valid, np.take_along_axis(scores, columns, axis=1), _MINUS_INFINITY))
    probabilities = np.exp(logarithms)
    entropy = -(np.where(valid, logarithms, 0) * probabilities).sum(axis=1, keepdims=True)
    distance = np.abs(-logarithms - entropy)
    order = np.argsort(distance, axis=1, kind="stable")
    columns, valid, distance, probabilities = (
        np.take_along_axis(of, order, axis=1) for of in (columns, valid, distance, probabilities)
    )
    cumulative = np.cumsum(probabilities, axis=1, dtype=np.float64)
    last = (cumulative.astype(np.float32) < np.float32(typical_p)).sum(axis=1, keepdims=True)
    mask = distance <= np.take_along_axis(distance, np.minimum(last, distance.shape[1] - 1), axis=1)
    mask[:, :least] = True
    return _only(scores, columns, mask=mask & valid)


def highest(scores: Logits, count: int) -> Ids:
    """The columns [rows, count] of each row's highest scores, in descending order.

    Ties are in ascending order of columns. torch's topk does not define their order, and it differs between devices.
    """
    columns = np.empty((len(scores), count), np.int64)
    for row, (of, threshold) in enumerate(zip(scores, _nth_highest(scores, count), strict=True)):
        above = np.flatnonzero(of > threshold)
        level = np.flatnonzero(of == threshold)[: count - len(above)]
        columns[row] = np.concatenate([above[np.argsort(-of[above], kind="stable")], level])
    return columns


def _nth_highest(scores: Logits, count: int) -> Logits:
    """The `count`-th highest score of each row, [rows, 1]."""
    whole = scores.shape[1] - scores.shape[1] % _BLOCK
    if count * _BLOCK < whole:
        # Partitioning dominates the time. Only scores that reach the `count`-th highest block maximum are candidates.
        bound = _nth_highest(scores[:, :whole].reshape(len(scores), -1, _BLOCK).max(axis=2), count)
        columns, valid = _columns(scores >= bound)
        scores = np.where(valid, np.take_along_axis(scores, columns, axis=1), _MINUS_INFINITY)
    place = scores.shape[1] - count
    return np.partition(scores, place, axis=1)[:, place, None]


def _columns(mask: Mask) -> tuple[Ids, Mask]:
    """The columns at which a mask [rows, num_tokens] is true, in ascending order.

    Returns:
        The columns [rows, most], and a mask [rows, most] of the valid ones: rows with fewer columns are padded at the end.
    """
    counts = mask.sum(axis=1)
    valid = np.arange(counts.max()) < counts[:, None]
    columns = np.zeros(valid.shape, np.int64)
    columns[valid] = np.flatnonzero(mask) % mask.shape[1]
    return columns, valid


def _only(scores: Logits, columns: Ids, *, mask: Mask) -> Logits:
    """Scores [rows, num_tokens] that are minus infinity except in the `columns` [rows, most] where `mask` is true."""
    rows, places = np.nonzero(mask)
    ids = columns[rows, places]
    only = np.full_like(scores, _MINUS_INFINITY)
    only[rows, ids] = scores[rows, ids]
    return only


def softmax(scores: Logits) -> Logits:
    """The probabilities of scores [rows, num_tokens], in the same shape."""
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: Logits = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def log_softmax(scores: Logits) -> Logits:
    """The log-probabilities of scores [rows, num_tokens], in the same shape."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    logarithms: Logits = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logarithms
