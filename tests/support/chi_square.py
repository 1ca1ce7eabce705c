"""Pearson's chi-square test: whether draws follow a distribution."""

import numpy as np


def p_value(drawn: np.ndarray, expected: np.ndarray) -> float:
    """The chance of draws at least so far from what is expected. Counts [categories]; rare categories are pooled."""
    import torch

    rare = expected < 8
    drawn = np.append(drawn[~rare], drawn[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    drawn, expected = drawn[expected > 0], expected[expected > 0]
    statistic = ((drawn - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2)))


def p_value_of_two(one: np.ndarray, other: np.ndarray) -> float:
    """The chance that two sets of as many draws, counts [categories] each, are at least so far from each other."""
    together = (one + other) / 2
    rare = together < 8
    one, other = (np.append(counts[~rare], counts[rare].sum()) for counts in (one, other))
    together = (one + other) / 2
    # Half of what lies between two counts is as far from their mean as draws are from what is expected.
    return p_value(together + (one - other) / np.sqrt(2), together)
