"""Noise made, scaled, added and rounded in one pass over the weights (numba); bit-identical to `noise.gaussian`.

A kernel works through its elements in chunks that stay in the first cache: Philox words (which LLVM
vectorises, since the words are made apart from the table look-ups), look-ups, arithmetic, rounding. Parts of
arrays are sliced before a loop and indexed from 0 in it: an index `low + i`, which might be negative, is
not vectorised. All release the interpreter lock, and any slice of a tensor can be made alone, so the callers cut the work
among threads as they like. Arithmetic is plain IEEE float32, without fused multiply-add or fastmath.

Weights come as they are stored (`formats`): bfloat16 bits, or int8 with the scales of their rows.
"""

import numpy as np

from es_lite.algorithm import noise
from es_lite.algorithm.formats import NO_SCALES, load, round_bf16
from es_lite.algorithm.jit import CHUNK, jit

_u32, _u64, _f32 = np.uint32, np.uint64, np.float32
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_QUANTUM = np.float32(noise.QUANTUM)


@jit
def make_words(words, first, tensor, pair, step, k0, k1):
    """Philox4x32-10 of the counters first, first + 1, …: four words each into `words`."""
    for i in range(words.size // 4):
        c0, c1, c2, c3 = _u32(first + i), tensor, pair, step
        a, b = k0, k1
        for _ in range(10):
            p0, p1 = _u64(c0) * _M0, _u64(c2) * _M1
            c0, c1, c2, c3 = _u32(p1 >> _u64(32)) ^ c1 ^ a, _u32(p1), _u32(p0 >> _u64(32)) ^ c3 ^ b, _u32(p0)
            a, b = _u32(a + _W0), _u32(b + _W1)
        words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = c0, c1, c2, c3


@jit
def make_lanes(words, lanes, start, count, tensor, pair, step, k0, k1):
    """The 16 random bits of elements start … start + count - 1: a part of `lanes`, which is `words` seen as uint16."""
    counters = (start % 8 + count + 7) // 8
    make_words(words[: 4 * counters], start // 8, tensor, pair, step, k0, k1)
    return lanes[start % 8 :]


@jit
def make_noise(epsilon, words, lanes, table, start, count, tensor, pair, step, k0, k1):
    """ε of elements start … start + count - 1 into epsilon[:count]; `lanes` is `words` seen as uint16."""
    drawn = make_lanes(words, lanes, start, count, tensor, pair, step, k0, k1)
    for i in range(count):
        epsilon[i] = _f32(table[drawn[i]]) / _QUANTUM


@jit
def _perturb_bf16(plus, minus, weights, scales, width, offset, start, sigma, table, tensor, pair, step, k0, k1):
    words = np.empty(CHUNK // 2 + 4, _u32)
    lanes = words.view(np.uint16)
    epsilon, value, base = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32), np.empty(CHUNK, _f32)
    base_bits, value_bits = base.view(_u32), value.view(_u32)
    for low in range(0, weights.size, CHUNK):
        count = min(CHUNK, weights.size - low)
        make_noise(epsilon, words, lanes, table, start + low, count, tensor, pair, step, k0, k1)
        load(base, base_bits, weights[low : low + count], scales, width, offset + low)
        for i in range(count):
            epsilon[i] = sigma * epsilon[i]
            value[i] = base[i] + epsilon[i]
        round_bf16(plus[low : low + count], value_bits)
        if minus.size:
            for i in range(count):
                value[i] = base[i] - epsilon[i]
            round_bf16(minus[low : low + count], value_bits)


@jit
def _perturb_fp32(plus, minus, weights, scales, width, offset, start, sigma, table, tensor, pair, step, k0, k1):
    words = np.empty(CHUNK // 2 + 4, _u32)
    lanes = words.view(np.uint16)
    epsilon, base = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32)
    base_bits = base.view(_u32)
    for low in range(0, weights.size, CHUNK):
        count = min(CHUNK, weights.size - low)
        make_noise(epsilon, words, lanes, table, start + low, count, tensor, pair, step, k0, k1)
        load(base, base_bits, weights[low : low + count], scales, width, offset + low)
        part = plus[low : low + count]
        for i in range(count):
            part[i] = base[i] + sigma * epsilon[i]
        if minus.size:
            part = minus[low : low + count]
            for i in range(count):
                part[i] = base[i] - sigma * epsilon[i]


@jit
def _perturb_rows_bf16(plus, minus, weights, scales, rows, sigma, table, tensor, pair, step, k0, k1):
    width = weights.shape[1]
    for i in range(rows.size):
        other = minus[i] if minus.size else plus[i, :0]
        start = rows[i] * width
        _perturb_bf16(plus[i], other, weights[i], scales[i : i + 1], width, 0, start, sigma, table, tensor, pair, step, k0, k1)


@jit
def _perturb_rows_fp32(plus, minus, weights, scales, rows, sigma, table, tensor, pair, step, k0, k1):
    width = weights.shape[1]
    for i in range(rows.size):
        other = minus[i] if minus.size else plus[i, :0]
        start = rows[i] * width
        _perturb_fp32(plus[i], other, weights[i], scales[i : i + 1], width, 0, start, sigma, table, tensor, pair, step, k0, k1)


@jit
def _fill(out, start, scale, table, tensor, pair, step, k0, k1):
    words = np.empty(CHUNK // 2 + 4, _u32)
    lanes = words.view(np.uint16)
    epsilon = np.empty(CHUNK, _f32)
    for low in range(0, out.size, CHUNK):
        count = min(CHUNK, out.size - low)
        make_noise(epsilon, words, lanes, table, start + low, count, tensor, pair, step, k0, k1)
        part = out[low : low + count]
        for i in range(count):
            part[i] = scale * epsilon[i]


def perturb(
    plus: np.ndarray,
    minus: np.ndarray | None,
    weights: np.ndarray,
    *,
    seed: int,
    step: int,
    pair: int,
    tensor: int,
    sigma: float,
    start: int = 0,
    scales: np.ndarray = NO_SCALES,
    width: int = 1,
) -> None:
    """plus = round(weights + σε) and, where given, minus = round(weights - σε), the noise made once.

    weights: elements start … start + n - 1 of the tensor, bfloat16 bits, uint16 [n], or int8 [n] with the scales, float32, of
    all the tensor's rows of `width` elements. plus, minus: [n], uint16 for bfloat16 (rounded to nearest even) or
    float32 (exact sum in float32). σ is rounded to float32 first.
    """
    kernel = _perturb_bf16 if plus.dtype == np.uint16 else _perturb_fp32
    other = plus[:0] if minus is None else minus
    at = _counter(seed, step, pair, tensor)
    kernel(plus, other, weights, scales, width, start, start, _f32(sigma), noise.table(), *at)


def perturb_rows(
    plus: np.ndarray,
    minus: np.ndarray | None,
    weights: np.ndarray,
    rows: np.ndarray,
    *,
    seed: int,
    step: int,
    pair: int,
    tensor: int,
    sigma: float,
    scales: np.ndarray = NO_SCALES,
) -> None:
    """`perturb` of some rows of a matrix alone.

    weights: those rows, uint16 or int8 [R, W], with their scales, float32 [R], where they are int8; rows: their numbers in the
    matrix, int64 [R]; plus, minus: [R, W].
    """
    kernel = _perturb_rows_bf16 if plus.dtype == np.uint16 else _perturb_rows_fp32
    other = plus[:0] if minus is None else minus
    kernel(plus, other, weights, scales, rows, _f32(sigma), noise.table(), *_counter(seed, step, pair, tensor))


def fill(out: np.ndarray, *, seed: int, step: int, pair: int, tensor: int, scale: float, start: int = 0) -> None:
    """out = scale·ε, float32 [n]: a random model's weights, and the kernels' own test."""
    _fill(out, start, _f32(scale), noise.table(), *_counter(seed, step, pair, tensor))


def _counter(seed: int, step: int, pair: int, tensor: int) -> tuple[np.uint32, ...]:
    """What the kernels make words from beside the element's index."""
    k0, k1 = noise.key(seed)
    return _u32(tensor), _u32(pair), _u32(step), _u32(k0), _u32(k1)
