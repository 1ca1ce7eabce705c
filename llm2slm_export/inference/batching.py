"""Batching of prompts by length, to keep padding low."""

from collections.abc import Iterator, Sequence

# The window, in batches, within which prompts are reordered. A longer one pads less and delays the first responses more.
WINDOW_BATCHES = 16
# With this ratio a padded batch has at most twice as many positions as real tokens.
LONGEST_PER_SHORTEST = 2


def batches(lengths: Sequence[int], *, size: int | None, window: int | None = None) -> Iterator[list[int]]:
    """Yield the prompt indices of each batch.

    Prompts are reordered within windows, of 16 batches by default. In a window the batch with the earliest prompt comes first, so that
    responses can be returned in order early.

    Args:
        lengths: tokens of each prompt.
        size: maximum prompts per batch; None: unlimited, and all prompts form one window.
        window: number of prompts that are reordered together; None: 16 batches.
    """
    if window is None:
        window = len(lengths) if size is None else size * WINDOW_BATCHES
    for first in range(0, len(lengths), max(1, window)):
        indices = sorted(range(first, min(first + window, len(lengths))), key=lambda index: lengths[index])
        yield from sorted(_cut(indices, lengths, size), key=min)


def _cut(indices: Sequence[int], lengths: Sequence[int], size: int | None) -> Iterator[list[int]]:
    """Split indices, sorted by length, where a batch is full or a prompt is too long for the batch's shortest one."""
    batch: list[int] = []
    for index in indices:
        if batch and (len(batch) == size or lengths[index] > LONGEST_PER_SHORTEST * lengths[batch[0]]):
            yield sorted(batch)
            batch = []
        batch.append(index)
    if batch:
        yield sorted(batch)
