"""Rank correlation."""

import numpy as np


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float | None:
    """Return Spearman's correlation of two [P] arrays; None where either is the same throughout."""
    ranks = [_ranks(left), _ranks(right)]
    if any(rank.std() == 0 for rank in ranks):
        return None
    return round(float(np.corrcoef(ranks)[0, 1]), 4)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank values, equal ones by the mean of their places."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]
