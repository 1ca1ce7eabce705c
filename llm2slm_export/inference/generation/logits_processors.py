"""Scores of next tokens, and what transformers' logits processors and warpers make of them, in their order.

A name that starts with `keep` is a warper: only sampling uses it. Rows are independent of each other.
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

_NEVER = np.float32(-np.inf)
_BLOCK = 64


class Processors:
    """All processors and warpers that options ask for, and the ids so far, which some of them read.

    Args:
        special_ids: `eos` and `decoder_start` count.
        num_tokens: the ids that scores are given for.
        rows: how many sequences there are at first.

    Raises:
        UsageError: options that name ids from `num_tokens` on.
    """

    def __init__(self, options: GenerationOptions, *, special_ids: SpecialIds, num_tokens: int, rows: int) -> None:
        options.check_ids(num_tokens)
        start = special_ids.decoder_start
        # transformers' input_ids: they begin with the decoder start token, and a decoder-only SLM, whose prompt is
        # embeddings, has none. Penalties and bad words see that token, and lengths count it.
        self._ids = np.full((rows, 0 if start is None else 1), start or 0, np.int64)
        self._start = self._ids.shape[1]
        self._options = options
        self._eos = [token_id for token_id in special_ids.eos if token_id < num_tokens]
        self._words = BadWords(options.bad_words_ids, eos=special_ids.eos)
        # Beams need a token besides every EOS to go on with.
        self._least = max(2, len(special_ids.eos) + 1) if options.num_beams > 1 else 1

    @property
    def chosen(self) -> Ids:
        """[rows, tokens] the tokens chosen so far, without the decoder start token."""
        return self._ids[:, self._start :]

    def __call__(self, scores: Logits) -> Logits:
        """The scores [rows, num_tokens] of the next token, processed.

        Raises:
            UsageError: a row has no token left.
        """
        options, chosen, given = self._options, self._ids.shape[1] - self._start, scores
        for process in self._active():
            scores = process(scores)
        if scores is not given and np.isneginf(scores.max(axis=1)).any():
            raise UsageError(
                f"The generation options leave no token to choose after {chosen} tokens.",
                f"bad_words_ids: {len(options.bad_words_ids)} of them",
                f"no_repeat_ngram_size: {options.no_repeat_ngram_size}",
                remedy="forbid less",
            )
        return warp(scores, options, least=self._least) if options.do_sample else scores

    @property
    def idle(self) -> bool:
        """Whether the scores of the next token stay as they are."""
        return not self._options.do_sample and not self._active()

    def _active(self) -> list[Callable[[Logits], Logits]]:
        """What is done to the scores of the next token, in transformers' order."""
        options, ids, chosen = self._options, self._ids, self._ids.shape[1] - self._start
        active: list[Callable[[Logits], Logits]] = []
        if options.repetition_penalty != 1.0:
            active.append(lambda scores: penalise_seen(scores, ids, penalty=options.repetition_penalty))
        if options.no_repeat_ngram_size:
            active.append(lambda scores: forbid_repeats(scores, ids, size=options.no_repeat_ngram_size))
        if options.bad_words_ids:
            active.append(lambda scores: self._words(scores, ids))
        if chosen < options.min_new_tokens:
            active.append(lambda scores: forbid(scores, self._eos))
        # The second token where there is no decoder start token: that is where transformers forces it.
        if (first := options.forced_bos_token_id) is not None and ids.shape[1] == 1:
            active.append(lambda scores: force(scores, first))
        if (last := options.forced_eos_token_id) is not None and chosen == options.max_new_tokens - 1:
            active.append(lambda scores: force(scores, last))
        return active

    def append(self, ids: Ids) -> None:
        """Every row goes on with its token of `ids` [rows]."""
        self._ids = np.concatenate([self._ids, ids[:, None]], axis=1)

    def keep(self, rows: Ids) -> None:
        """Go on with only these rows, indices into the present ones; a row can be there more than once."""
        self._ids = self._ids[rows]


class BadWords:
    """Sequences of ids that are never completed: `bad_words_ids`.

    Args:
        words: the sequences.
        eos: a sequence that is just one of these is ignored, as in transformers.
    """

    def __init__(self, words: Sequence[tuple[int, ...]], *, eos: Sequence[int]) -> None:
        words = sorted((word for word in words if word not in [(token_id,) for token_id in eos]), key=len)
        # By length: all words of a length are compared at once.
        self._groups = [np.array(list(group), np.int64) for _, group in groupby(words, key=len)]

    def __call__(self, scores: Logits, ids: Ids) -> Logits:
        """Scores [batch, vocab] with those that would complete a word after `ids` [batch, so far] at minus infinity."""
        fitting = [group for group in self._groups if group.shape[1] - 1 <= ids.shape[1]]
        if not fitting:
            return scores
        forbidden = scores.copy()
        for group in fitting:
            beginning, last = group[:, :-1], group[:, -1]
            end = ids[:, ids.shape[1] - beginning.shape[1] :]
            rows, words = np.nonzero((end[:, None] == beginning).all(axis=2))
            forbidden[rows, last[words]] = _NEVER
        return forbidden


def penalise_seen(scores: Logits, ids: Ids, *, penalty: float) -> Logits:
    """Scores [batch, vocab] with those of `ids` [batch, so far] made smaller: `repetition_penalty`."""
    rows, places = np.nonzero(ids < scores.shape[1])
    seen = ids[rows, places]
    found, factor = scores[rows, seen], np.float32(penalty)
    penalised = scores.copy()
    penalised[rows, seen] = np.where(found < 0, found * factor, found / factor)
    return penalised


def forbid_repeats(scores: Logits, ids: Ids, *, size: int) -> Logits:
    """Scores [batch, vocab] with those at minus infinity that would repeat `size` of `ids` [batch, so far]."""
    length = ids.shape[1]
    if length < size:
        return scores
    windows = np.lib.stride_tricks.sliding_window_view(ids, size, axis=1)  # [batch, windows, size]
    end = ids[:, None, length + 1 - size :]
    last = windows[..., -1]
    rows, places = np.nonzero((windows[..., :-1] == end).all(axis=2) & (last < scores.shape[1]))
    forbidden = scores.copy()
    forbidden[rows, last[rows, places]] = _NEVER
    return forbidden


def forbid(scores: Logits, ids: Sequence[int]) -> Logits:
    """Scores [batch, vocab] with those of `ids` at minus infinity."""
    forbidden = scores.copy()
    forbidden[:, list(ids)] = _NEVER
    return forbidden


def force(scores: Logits, token_id: int) -> Logits:
    """Scores [batch, vocab]: zero for `token_id`, minus infinity for all others."""
    forced = np.full_like(scores, _NEVER)
    forced[:, token_id] = 0
    return forced


def warp(scores: Logits, options: GenerationOptions, *, least: int = 1) -> Logits:
    """Scores [batch, vocab] as sampling sees them, with at least `least` ids of a row left."""
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
    """Scores [batch, vocab] with all below the k-th highest of their row at minus infinity."""
    threshold = _nth_highest(scores, min(max(top_k, least), scores.shape[1]))
    return np.where(scores < threshold, _NEVER, scores)


def keep_top_p(scores: Logits, top_p: float, *, least: int = 1) -> Logits:
    """Scores [batch, vocab] with all outside the smallest set of probability `top_p` at minus infinity."""
    probabilities, most = softmax(scores), 1 - top_p
    # Sorting is what costs. Ids so improbable that all of them together weigh less than `most` are removed unsorted;
    # the margin is for rounding.
    worth = probabilities >= 0.999 * most / scores.shape[1]
    if least > 1:
        np.put_along_axis(worth, highest(scores, min(least, scores.shape[1])), values=True, axis=1)
    columns, given = _columns(worth)
    candidates = np.where(given, np.take_along_axis(scores, columns, axis=1), _NEVER)
    weights = np.where(given, np.take_along_axis(probabilities, columns, axis=1), 0)
    rest = probabilities.sum(axis=1, dtype=np.float64) - weights.sum(axis=1, dtype=np.float64)
    order = np.argsort(candidates, axis=1, kind="stable")
    columns, given, weights = (np.take_along_axis(of, order, axis=1) for of in (columns, given, weights))
    cumulative = rest[:, None] + np.cumsum(weights, axis=1, dtype=np.float64)
    kept = cumulative.astype(np.float32) > np.float32(most)
    kept[:, -least:] = True
    return _only(scores, columns, kept=kept & given)


def keep_min_p(scores: Logits, min_p: float, *, least: int = 1) -> Logits:
    """Scores [batch, vocab] with all less probable than `min_p` times the likeliest of their row at minus infinity."""
    probabilities = softmax(scores)
    removed = probabilities < np.float32(min_p) * probabilities.max(axis=1, keepdims=True)
    # The likeliest is never below a part of itself.
    if least > 1:
        np.put_along_axis(removed, highest(probabilities, min(least, scores.shape[1])), values=False, axis=1)
    return np.where(removed, _NEVER, scores)


def keep_typical_p(scores: Logits, typical_p: float, *, least: int = 1) -> Logits:
    """Scores [batch, vocab] with all outside the most typical set of probability `typical_p` at minus infinity.

    The most typical ids are those whose surprise is nearest to the entropy.
    """
    # Sorting is what costs, and top-k has left few.
    columns, given = _columns(~np.isneginf(scores))
    logarithms = log_softmax(np.where(given, np.take_along_axis(scores, columns, axis=1), _NEVER))
    probabilities = np.exp(logarithms)
    entropy = -(np.where(given, logarithms, 0) * probabilities).sum(axis=1, keepdims=True)
    distance = np.abs(-logarithms - entropy)
    order = np.argsort(distance, axis=1, kind="stable")
    columns, given, distance, probabilities = (
        np.take_along_axis(of, order, axis=1) for of in (columns, given, distance, probabilities)
    )
    cumulative = np.cumsum(probabilities, axis=1, dtype=np.float64)
    last = (cumulative.astype(np.float32) < np.float32(typical_p)).sum(axis=1, keepdims=True)
    kept = distance <= np.take_along_axis(distance, np.minimum(last, distance.shape[1] - 1), axis=1)
    kept[:, :least] = True
    return _only(scores, columns, kept=kept & given)


def highest(scores: Logits, count: int) -> Ids:
    """The columns [batch, count] of each row's highest scores, the highest first.

    Of equals the first comes first; torch's topk leaves that open, and so its order differs from device to device.
    """
    columns = np.empty((len(scores), count), np.int64)
    for row, (of, threshold) in enumerate(zip(scores, _nth_highest(scores, count), strict=True)):
        above = np.flatnonzero(of > threshold)
        level = np.flatnonzero(of == threshold)[: count - len(above)]
        columns[row] = np.concatenate([above[np.argsort(-of[above], kind="stable")], level])
    return columns


def _nth_highest(scores: Logits, count: int) -> Logits:
    """[batch, 1] the score of each row that `count - 1` others come before."""
    whole = scores.shape[1] - scores.shape[1] % _BLOCK
    if count * _BLOCK < whole:
        # Partitioning is what costs. `count` blocks have a score that reaches the bound, and few scores do.
        bound = _nth_highest(scores[:, :whole].reshape(len(scores), -1, _BLOCK).max(axis=2), count)
        columns, given = _columns(scores >= bound)
        scores = np.where(given, np.take_along_axis(scores, columns, axis=1), _NEVER)
    place = scores.shape[1] - count
    return np.partition(scores, place, axis=1)[:, place, None]


def _columns(mask: Mask) -> tuple[Ids, Mask]:
    """The columns [batch, most] at which mask [batch, vocab] is true, in ascending order.

    Returns:
        The columns, and whether they are given, [batch, most]: rows with fewer end in columns that are not.
    """
    counts = mask.sum(axis=1)
    given = np.arange(counts.max()) < counts[:, None]
    columns = np.zeros(given.shape, np.int64)
    columns[given] = np.flatnonzero(mask) % mask.shape[1]
    return columns, given


def _only(scores: Logits, columns: Ids, *, kept: Mask) -> Logits:
    """Scores [batch, vocab]: minus infinity but in those columns [batch, some] that are `kept` [batch, some]."""
    rows, places = np.nonzero(kept)
    ids = columns[rows, places]
    only = np.full_like(scores, _NEVER)
    only[rows, ids] = scores[rows, ids]
    return only


def softmax(scores: Logits) -> Logits:
    """Probabilities [batch, vocab] of scores [batch, vocab]."""
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: Logits = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def log_softmax(scores: Logits) -> Logits:
    """Logarithms of the probabilities [batch, vocab] of scores [batch, vocab]."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    logarithms: Logits = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logarithms
