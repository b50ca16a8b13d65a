"""Scores to utilities: how much each member counts (both papers' z-score; rank, as in OpenAI-ES)."""

import numpy as np


def utilities(scores: np.ndarray, shaping: str) -> np.ndarray:
    """Utilities w_j, float64 [N], of scores r_j, float64 [N].

    "zscore": (r_j - mean) / (std + 1e-8), ddof 0. "rank": 2·rank/(N-1) - 1; ties share their mean rank.
    If all scores are equal, all utilities are exactly 0. Scores that are not finite are left out of mean, std and ranks, and
    their utility is 0. Raises ValueError if fewer than two are finite.
    """
    finite = np.isfinite(scores)
    kept = scores[finite].astype(np.float64)
    if kept.size < 2:
        raise ValueError(f"{kept.size} of {scores.size} scores are finite; at least two are needed")
    shaped = np.zeros(scores.shape, np.float64)
    if shaping == "zscore":
        if np.ptp(kept) > 0:  # else their mean may still be rounded to another number
            shaped[finite] = (kept - kept.mean()) / (kept.std() + 1e-8)
    elif shaping == "rank":
        shaped[finite] = 2 * _mean_ranks(kept) / (kept.size - 1) - 1
    else:
        raise ValueError(f"unknown shaping {shaping!r}")
    return shaped


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[position]
