"""Kernels for low-rank corrections: x·B, and y += (x·B)·Aᵀ, where each row belongs to a member with a perturbation of its own.

They read x once and y once, whatever the numbers of rows of the members are; sums are float32, in an order that depends on the
matrix's shape alone. Elements are float32, or bfloat16 as bits (uint16).

Shapes: n rows, P perturbations, r their rank.
"""

import numpy as np

from es_lite.algorithm.formats import narrow, wide
from es_lite.algorithm.jit import Threads, jit
from es_lite.scoring.logsumexp import halve_sum

_f32 = np.float32

LANES = 64
"""Partial sums of a product x·b."""

LEAST = 32
"""Rows of a thread."""


@jit
def _product(x, b, lanes):
    """x·b."""
    lanes[:] = _f32(0)
    whole = x.size // LANES * LANES
    for low in range(0, whole, LANES):
        some, others = x[low : low + LANES], b[low : low + LANES]
        for k in range(LANES):
            lanes[k] += wide(some[k]) * wide(others[k])
    for k in range(whole, x.size):
        lanes[k - whole] += wide(x[k]) * wide(b[k])
    return halve_sum(lanes)


@jit
def _project(out, x, right, ends, signs, first):
    """Fills out, float32 [n, r], with ±x·B; x: [n, in], rows first, first + 1, …; right: [P, r, in]."""
    lanes = np.empty(LANES, _f32)
    member = 0
    for row in range(x.shape[0]):
        while first + row >= ends[member]:
            member += 1
        sign, own = signs[member % signs.size], right[member // signs.size]
        for k in range(own.shape[0]):
            out[row, k] = sign * _product(x[row], own[k], lanes)


@jit
def _add(y, projected, left, ends, members, first):
    """y += projected·left; y: [n, out], projected: float32 [n, r], left: [P, r, out]; members: of a perturbation."""
    rank, width = left.shape[1], left.shape[2]
    total = np.empty(width, _f32)
    member = 0
    for row in range(y.shape[0]):
        while first + row >= ends[member]:
            member += 1
        own, out = left[member // members], y[row]
        total[:] = _f32(0)
        for k in range(rank - 1):
            factor, term = projected[row, k], own[k]
            for i in range(width):
                total[i] += factor * wide(term[i])
        factor, term = projected[row, rank - 1], own[rank - 1]
        if rank > 1:
            for i in range(width):
                out[i] = narrow(wide(out[i]) + (total[i] + factor * wide(term[i])), out[i])
        else:
            for i in range(width):
                out[i] = narrow(wide(out[i]) + factor * wide(term[i]), out[i])


def project(x: np.ndarray, right: np.ndarray, ends: np.ndarray, signs: np.ndarray, threads: Threads) -> np.ndarray:
    """±x·B of each row's perturbation, float32 [n, r].

    x: [n, in]; right: B, [P, r, in]; ends: of each member's rows, int64 [P · len(signs)]; signs: float32, of a perturbation's
    members.
    """
    out = np.empty((x.shape[0], right.shape[1]), np.float32)
    threads.each(x.shape[0], lambda low, high: _project(out[low:high], x[low:high], right, ends, signs, low), LEAST)
    return out


def add(y: np.ndarray, projected: np.ndarray, left: np.ndarray, ends: np.ndarray, members: int, threads: Threads) -> None:
    """Adds projected · left to y, [n, out]; left: (σ/√r)·Aᵀ, [P, r, out]; members: of a perturbation."""
    threads.each(y.shape[0], lambda low, high: _add(y[low:high], projected[low:high], left, ends, members, low), LEAST)
