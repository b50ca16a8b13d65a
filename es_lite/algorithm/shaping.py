"""Scores to weights: how much each member pulls (both papers' z-score; rank, as in OpenAI-ES)."""

import numpy as np


def shape(scores: np.ndarray, kind: str) -> np.ndarray:
    """Weights w_j, float64 [N], of scores r_j, float64 [N].

    "zscore": (r_j - mean) / (std + 1e-8), ddof 0. "rank": 2·rank/(N-1) - 1, ties sharing their mean rank.
    Scores that are not finite are left out of mean, std and ranks, and weigh 0; with fewer than two finite
    ones there is nothing to compare: ValueError.
    """
    finite = np.isfinite(scores)
    kept = scores[finite].astype(np.float64)
    if kept.size < 2:
        raise ValueError(f"{kept.size} of {scores.size} scores are finite; at least two are needed")
    weights = np.zeros(scores.shape, np.float64)
    if kind == "zscore":
        weights[finite] = (kept - kept.mean()) / (kept.std() + 1e-8)
    elif kind == "rank":
        weights[finite] = 2 * _mean_ranks(kept) / (kept.size - 1) - 1
    else:
        raise ValueError(f"unknown shaping {kind!r}")
    return weights


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[position]
