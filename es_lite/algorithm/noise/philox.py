"""Philox4x32-10, the counter-based random number generator behind all noise: the reference, in numpy.

The key is the 64-bit seed; the counter is (index, tensor, pair, step). The 128 bits of a counter's words are read as eight 16-bit
lanes, the low half of each word first; element i of a tensor takes lane i % 8 of counter i // 8.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy as np

from es_lite.algorithm.noise.place import Place

VERSION = "philox4x32-10/table16/1"
"""Names the definition of noise in journals; a change to any bit of ε needs a new version."""

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

LANES = 8
"""16-bit lanes per counter."""


def words(counter: tuple[np.ndarray | int, ...], key: tuple[int, int]) -> np.ndarray:
    """The words of n counters, uint32 [n, 4]. counter: its four words, each an array or one number."""
    c0, c1, c2, c3 = (np.atleast_1d(np.asarray(word, dtype=np.uint64)) for word in np.broadcast_arrays(*counter))
    k0, k1 = (np.uint64(word) for word in key)
    m0, m1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(KEY_INCREMENTS[0])) & low, (k1 + np.uint64(KEY_INCREMENTS[1])) & low
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def lanes(place: Place, start: int, count: int) -> np.ndarray:
    """The 16 random bits of elements start … start + count - 1: uint32 [count]."""
    first, last = start // LANES, -(-(start + count) // LANES)
    drawn = words((np.arange(first, last), place.tensor, place.pair, place.step), place.key)
    halves = np.stack([drawn & 0xFFFF, drawn >> 16], axis=-1).reshape(-1)
    return halves[start - LANES * first :][:count]
