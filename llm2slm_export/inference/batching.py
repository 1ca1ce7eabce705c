"""Which prompts run together: those of similar length, so that little of a batch is padding. It knows lengths only."""

from collections.abc import Iterator, Sequence

# How far a prompt may be moved to find company: a longer window pads less, and keeps earlier answers waiting longer.
WINDOW_BATCHES = 16
# Then a batch's padded area is at most twice its real tokens, whatever the lengths.
LONGEST_PER_SHORTEST = 2


def batches(lengths: Sequence[int], *, size: int | None) -> Iterator[list[int]]:
    """The indices of each batch; every prompt is in one.

    Prompts are moved inside windows of 16 batches. In a window the batch that holds the earliest prompt comes first, so
    that answers can be given in order soon.

    Args:
        lengths: tokens of each prompt.
        size: most prompts in a batch; None: any number, and all prompts are one window.
    """
    window = len(lengths) if size is None else size * WINDOW_BATCHES
    for first in range(0, len(lengths), max(1, window)):
        indices = sorted(range(first, min(first + window, len(lengths))), key=lambda index: lengths[index])
        yield from sorted(_cut(indices, lengths, size), key=min)


def _cut(indices: Sequence[int], lengths: Sequence[int], size: int | None) -> Iterator[list[int]]:
    """Cut indices, shortest prompt first, where a batch is full or a prompt is too long for the company it would have."""
    batch: list[int] = []
    for index in indices:
        if batch and (len(batch) == size or lengths[index] > LONGEST_PER_SHORTEST * lengths[batch[0]]):
            yield sorted(batch)
            batch = []
        batch.append(index)
    if batch:
        yield sorted(batch)
