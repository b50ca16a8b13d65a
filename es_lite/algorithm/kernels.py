"""Noise made, scaled, added and rounded in one pass over the weights (numba); bit-identical to `noise.gaussian`.

A kernel works through its elements in chunks that stay in the first cache: Philox words (which LLVM
vectorises, since the words are made apart from the table look-ups), look-ups, arithmetic, rounding. Parts of
arrays are sliced before a loop and indexed from 0 in it: an index `low + i`, which might be negative, is
not vectorised. All release the interpreter lock, and any slice of a tensor can be made alone, so the callers cut the work
among threads as they like. Arithmetic is plain IEEE float32, without fused multiply-add or fastmath.

bfloat16 travels as its bits in uint16; values are taken to be finite.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from es_lite.algorithm import noise

CHUNK = 2048
"""Elements of a chunk: a multiple of 8; its buffers (28 KiB) fit a first-level cache."""

_u32, _u64, _f32 = np.uint32, np.uint64, np.float32
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_QUANTUM = np.float32(noise.QUANTUM)

jit = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
"""Plain IEEE arithmetic: no fastmath. Compiled code is kept beside the module, or in the user's cache folder."""


@jit
def _words(words, first, tensor, pair, step, k0, k1):
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
def _noise(epsilon, words, lanes, table, start, count, tensor, pair, step, k0, k1):
    """ε of elements start … start + count - 1 into epsilon[:count]; `lanes` is `words` seen as uint16."""
    counters = (start % 8 + count + 7) // 8
    _words(words[: 4 * counters], start // 8, tensor, pair, step, k0, k1)
    lanes = lanes[start % 8 :]
    for i in range(count):
        epsilon[i] = _f32(table[lanes[i]]) / _QUANTUM


@jit
def _from_bf16(bits, values):
    for i in range(values.size):
        bits[i] = _u32(values[i]) << _u32(16)


@jit
def _round_bf16(out, bits):
    """float32 bits rounded to the nearest bfloat16, ties to even."""
    for i in range(out.size):
        out[i] = np.uint16((bits[i] + _u32(0x7FFF) + ((bits[i] >> _u32(16)) & _u32(1))) >> _u32(16))


@jit
def _perturb_bf16(plus, minus, weights, start, sigma, table, tensor, pair, step, k0, k1):
    words = np.empty(CHUNK // 2 + 4, _u32)
    lanes = words.view(np.uint16)
    epsilon, value, base = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32), np.empty(CHUNK, _f32)
    base_bits, value_bits = base.view(_u32), value.view(_u32)
    for low in range(0, weights.size, CHUNK):
        count = min(CHUNK, weights.size - low)
        _noise(epsilon, words, lanes, table, start + low, count, tensor, pair, step, k0, k1)
        _from_bf16(base_bits, weights[low : low + count])
        for i in range(count):
            epsilon[i] = sigma * epsilon[i]
            value[i] = base[i] + epsilon[i]
        _round_bf16(plus[low : low + count], value_bits)
        if minus.size:
            for i in range(count):
                value[i] = base[i] - epsilon[i]
            _round_bf16(minus[low : low + count], value_bits)


@jit
def _perturb_fp32(plus, minus, weights, start, sigma, table, tensor, pair, step, k0, k1):
    words = np.empty(CHUNK // 2 + 4, _u32)
    lanes = words.view(np.uint16)
    epsilon, base = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32)
    base_bits = base.view(_u32)
    for low in range(0, weights.size, CHUNK):
        count = min(CHUNK, weights.size - low)
        _noise(epsilon, words, lanes, table, start + low, count, tensor, pair, step, k0, k1)
        _from_bf16(base_bits, weights[low : low + count])
        part = plus[low : low + count]
        for i in range(count):
            part[i] = base[i] + sigma * epsilon[i]
        if minus.size:
            part = minus[low : low + count]
            for i in range(count):
                part[i] = base[i] - sigma * epsilon[i]


@jit
def _perturb_rows_bf16(plus, minus, weights, rows, sigma, table, tensor, pair, step, k0, k1):
    for i in range(rows.size):
        row = rows[i]
        start = row * weights.shape[1]
        other = minus[i] if minus.size else plus[i, :0]
        _perturb_bf16(plus[i], other, weights[row], start, sigma, table, tensor, pair, step, k0, k1)


@jit
def _perturb_rows_fp32(plus, minus, weights, rows, sigma, table, tensor, pair, step, k0, k1):
    for i in range(rows.size):
        row = rows[i]
        start = row * weights.shape[1]
        other = minus[i] if minus.size else plus[i, :0]
        _perturb_fp32(plus[i], other, weights[row], start, sigma, table, tensor, pair, step, k0, k1)


@jit
def _advance(theta, start, pairs, coefficients, decay, table, tensor, step, k0, k1):
    words = np.empty(CHUNK // 2 + 4, _u32)
    lanes = words.view(np.uint16)
    epsilon, total = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32)
    for low in range(0, theta.size, CHUNK):
        count = min(CHUNK, theta.size - low)
        total[:] = _f32(0)
        for p in range(pairs.size):
            _noise(epsilon, words, lanes, table, start + low, count, tensor, pairs[p], step, k0, k1)
            for i in range(count):
                total[i] += coefficients[p] * epsilon[i]
        part = theta[low : low + count]
        for i in range(count):
            part[i] = (part[i] - decay * part[i]) + total[i]


@jit
def _fill(out, start, scale, table, tensor, pair, step, k0, k1):
    words = np.empty(CHUNK // 2 + 4, _u32)
    lanes = words.view(np.uint16)
    epsilon = np.empty(CHUNK, _f32)
    for low in range(0, out.size, CHUNK):
        count = min(CHUNK, out.size - low)
        _noise(epsilon, words, lanes, table, start + low, count, tensor, pair, step, k0, k1)
        part = out[low : low + count]
        for i in range(count):
            part[i] = scale * epsilon[i]


@jit
def _to_bf16(out, values):
    _round_bf16(out, values.view(_u32))


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
) -> None:
    """plus = round(weights + σε) and, where given, minus = round(weights - σε), the noise made once.

    weights: uint16 [n], bfloat16 bits of elements start … start + n - 1 of the tensor; plus, minus: [n], uint16
    for bfloat16 (rounded to nearest even) or float32 (exact sum in float32). σ is rounded to float32 first.
    """
    kernel = _perturb_bf16 if plus.dtype == np.uint16 else _perturb_fp32
    other = plus[:0] if minus is None else minus
    k0, k1 = noise.key(seed)
    kernel(plus, other, weights, start, _f32(sigma), noise.table(), _u32(tensor), _u32(pair), _u32(step), _u32(k0), _u32(k1))


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
) -> None:
    """`perturb` of the rows `rows`, int64 [R], of a matrix alone; plus, minus: [R, W]; weights: uint16 [V, W]."""
    kernel = _perturb_rows_bf16 if plus.dtype == np.uint16 else _perturb_rows_fp32
    other = plus[:0] if minus is None else minus
    k0, k1 = noise.key(seed)
    kernel(plus, other, weights, rows, _f32(sigma), noise.table(), _u32(tensor), _u32(pair), _u32(step), _u32(k0), _u32(k1))


def advance(
    theta: np.ndarray,
    *,
    seed: int,
    step: int,
    tensor: int,
    pairs: np.ndarray,
    coefficients: np.ndarray,
    decay: float,
    start: int = 0,
) -> None:
    """θ ← (θ - decay·θ) + Σ_p coefficients[p]·ε_{pairs[p]}, in place; the sum runs in the order given, in float32.

    theta: float32 [n], elements start … of the tensor; pairs: uint32 [P]; coefficients: float32 [P].
    """
    k0, k1 = noise.key(seed)
    _advance(theta, start, pairs, coefficients, _f32(decay), noise.table(), _u32(tensor), _u32(step), _u32(k0), _u32(k1))


def fill(out: np.ndarray, *, seed: int, step: int, pair: int, tensor: int, scale: float, start: int = 0) -> None:
    """out = scale·ε, float32 [n]: a random model's weights, and the kernels' own test."""
    k0, k1 = noise.key(seed)
    _fill(out, start, _f32(scale), noise.table(), _u32(tensor), _u32(pair), _u32(step), _u32(k0), _u32(k1))


def to_bf16(out: np.ndarray, values: np.ndarray) -> None:
    """float32 [n] rounded to bfloat16 bits, uint16 [n]: to nearest, ties to even."""
    _to_bf16(out, values)


def as_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits, uint16, as the float32 values they stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Threads:
    """Cuts the elements of a kernel call among a worker's threads; the bits do not depend on how many."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def each(self, size: int, work: Callable[[int, int], None], least: int = 16 * CHUNK) -> None:
        """Calls work(low, high) so that the ranges cover 0 … size; work of less than two times `least` is not cut."""
        if self._pool is None or size < 2 * least:
            work(0, size)
            return
        share = max(least, -(-size // self.count))
        list(self._pool.map(lambda low: work(low, min(low + share, size)), range(0, size, share)))
