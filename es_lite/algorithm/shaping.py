"""Scores to utilities: how much each member counts (both papers' z-score; rank, as in OpenAI-ES)."""

import numpy as np


def utilities(scores: np.ndarray, shaping: str, spread: float | None = None) -> np.ndarray:
    """Utilities w_j, float64 [N], of scores r_j, float64 [N].

    "zscore": (r_j - mean) / (spread + 1e-8), where spread is the scores' std, ddof 0, unless it is given.
    "rank": 2·rank/(N-1) - 1; ties share their mean rank.
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
            shaped[finite] = (kept - kept.mean()) / ((kept.std() if spread is None else spread) + 1e-8)
    elif shaping == "rank":
        shaped[finite] = 2 * _mean_ranks(kept) / (kept.size - 1) - 1
    else:
        raise ValueError(f"unknown shaping {shaping!r}")
    return shaped


def means(scores: np.ndarray) -> np.ndarray:
    """The mean of each row of float64 [N, items], without what is NaN; NaN if a row has nothing else."""
    counted = ~np.isnan(scores)
    if counted.all():
        return scores.mean(axis=1)
    sums, counts = np.where(counted, scores, 0.0).sum(axis=1), counted.sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def item_baseline(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """The members' scores, [N], and their spread if each item's mean over the members is taken off first (EGGROLL).

    scores: float64 [N, items], NaN where an item does not count. The spread is the std, ddof 0, of all that is left, so items
    that tell members apart by chance make a step smaller. Where every item counts, what is taken off is the same for all members,
    and their scores are as they were. Members without a finite score are left out, and have NaN.
    """
    of_members = means(scores)
    finite = np.isfinite(of_members)
    kept = scores[finite]
    centred = kept - means(kept.T)
    spread = float(np.nanstd(centred)) if kept.size else 0.0
    if not np.isnan(kept).any():
        return np.where(finite, of_members, np.nan), spread
    compared = np.full(len(scores), np.nan)
    compared[finite] = means(centred)
    return compared, spread


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[position]
