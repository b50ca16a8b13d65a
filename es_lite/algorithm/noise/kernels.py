"""`philox` compiled with numba: the same words and lanes, vectorised.

Kernels process elements in chunks that stay in the first-level cache. To let LLVM vectorise, words are drawn in a loop without
table look-ups, and arrays are sliced before a loop and indexed from 0: an index `low + i`, which might be negative, is not
vectorised. Lanes are the words viewed as uint16 (little-endian).
"""

import numpy as np
from numba import types
from numba.extending import overload

from es_lite.algorithm.formats import round_bf16
from es_lite.algorithm.jit import CHUNK, jit
from es_lite.algorithm.noise.philox import KEY_INCREMENTS, MULTIPLIERS, ROUNDS
from es_lite.algorithm.noise.place import Place

_u32, _u64 = np.uint32, np.uint64
_M0, _M1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
_W0, _W1 = (np.uint32(increment) for increment in KEY_INCREMENTS)

Words = tuple[np.uint32, np.uint32, np.uint32, np.uint32, np.uint32]
"""A place as kernels take it: tensor, pair, step and the two words of the key."""


def words_of(place: Place) -> Words:
    k0, k1 = place.key
    return _u32(place.tensor), _u32(place.pair), _u32(place.step), _u32(k0), _u32(k1)


@jit
def words_buffer():
    """A buffer for the words of CHUNK elements from any start: uint32, and viewed as uint16 lanes."""
    words = np.empty(CHUNK // 2 + 4, _u32)
    return words, words.view(np.uint16)


@jit
def draw_words(words, first, tensor, pair, step, k0, k1):
    """Fills `words` with those of counters first, first + 1, …, four each."""
    for i in range(words.size // 4):
        c0, c1, c2, c3 = _u32(first + i), tensor, pair, step
        a, b = k0, k1
        for _ in range(ROUNDS):
            p0, p1 = _u64(c0) * _M0, _u64(c2) * _M1
            c0, c1, c2, c3 = _u32(p1 >> _u64(32)) ^ c1 ^ a, _u32(p1), _u32(p0 >> _u64(32)) ^ c3 ^ b, _u32(p0)
            a, b = _u32(a + _W0), _u32(b + _W1)
        words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = c0, c1, c2, c3


@jit
def draw_lanes(words, lanes, start, count, tensor, pair, step, k0, k1):
    """The 16 random bits of elements start … start + count - 1: the part of `lanes` that begins with them."""
    counters = (start % 8 + count + 7) // 8
    draw_words(words[: 4 * counters], start // 8, tensor, pair, step, k0, k1)
    return lanes[start % 8 :]


def put_moved(plus, minus, base, noise, value):
    """plus = round(base + noise) and, if `minus` is not empty, minus = round(base - noise).

    plus, minus: uint16 (bfloat16 bits) or float32 [n]; base, noise: float32, at least n; value: a buffer like base.
    """
    raise NotImplementedError("compiled code only")


@overload(put_moved)
def _put_moved(plus, minus, base, noise, value):
    def bf16(plus, minus, base, noise, value):
        bits = value.view(np.uint32)
        for i in range(plus.size):
            value[i] = base[i] + noise[i]
        round_bf16(plus, bits)
        if minus.size:
            for i in range(minus.size):
                value[i] = base[i] - noise[i]
            round_bf16(minus, bits)

    def fp32(plus, minus, base, noise, value):
        for i in range(plus.size):
            plus[i] = base[i] + noise[i]
        for i in range(minus.size):
            minus[i] = base[i] - noise[i]

    return bf16 if plus.dtype == types.uint16 else fp32
