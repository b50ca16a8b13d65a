"""The definition of ε: Philox4x32-10 and a table of normal quantiles.

ε is a pure function of (seed, step, pair, tensor, element index). The 64-bit seed is the Philox key, the
counter is (index // 8, tensor, pair, step), and the 128 bits that come out are eight 16-bit lanes, low half of
a word first: element `index` takes lane index % 8. Lane u stands for T[u] / 4096, where T[u] is the
normal quantile of (u + ½) / 65536, rounded to 1/4096. No logarithm or cosine is taken when noise is drawn, so no two machines
differ. This module is the reference; `kernels` gives the same bits faster.

Philox: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import functools
import hashlib
from statistics import NormalDist

import numpy as np

VERSION = "philox4x32-10/table16/1"
"""Names this definition in the journal; a change of any bit of ε is another version."""

TABLE_SHA256 = "1ea009ce409dac97d6bd609266910f809c5fb912f78e16bd89145b08174d6fc5"

QUANTUM = 4096
"""Table entries are multiples of 1/QUANTUM."""

INITIALISATION = 2**32 - 1
"""The step number that draws a random model's weights; no training step reaches it."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)


@functools.cache
def table() -> np.ndarray:
    """T, int16 [65536], read-only. Raises RuntimeError where this machine's arithmetic gives another table."""
    normal = NormalDist()
    quantiles = np.array([round(normal.inv_cdf((u + 0.5) / 65536) * QUANTUM) for u in range(65536)], dtype="<i2")
    if hashlib.sha256(quantiles.tobytes()).hexdigest() != TABLE_SHA256:
        raise RuntimeError("the table of normal quantiles differs from its definition: this Python's inv_cdf is unusual")
    quantiles.flags.writeable = False
    return quantiles


def key(seed: int) -> tuple[int, int]:
    """The two 32-bit words of the 64-bit seed, low word first."""
    return seed & 0xFFFFFFFF, seed >> 32


def philox4x32(counter: tuple[np.ndarray | int, ...], seed_key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters [n] (each of the four words an array or one number): uint32 [n, 4]."""
    c0, c1, c2, c3 = (np.atleast_1d(np.asarray(word, dtype=np.uint64)) for word in np.broadcast_arrays(*counter))
    k0, k1 = (np.uint64(word) for word in seed_key)
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & low, (k1 + np.uint64(_WEYL[1])) & low
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def gaussian(seed: int, step: int, pair: int, tensor: int, start: int, count: int) -> np.ndarray:
    """ε of elements start … start + count - 1 of a tensor: float32 [count], exact multiples of 1/4096."""
    first, last = start // 8, (start + count + 7) // 8
    words = philox4x32((np.arange(first, last), tensor, pair, step), key(seed))
    lanes = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(-1)
    offset = start - 8 * first
    return table()[lanes[offset : offset + count]].astype(np.float32) / np.float32(QUANTUM)
