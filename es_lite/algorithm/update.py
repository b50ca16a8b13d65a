"""The update of a step, θ ← (θ - decay·θ) + Σ_p c_p·ε_p, on weights in any of the formats they are stored in (numba).

float32 takes it as it is. bfloat16 and int8, where there is no full-precision copy, round it stochastically: up with the
probability of what is cut off, so that updates far below a format's resolution still move the weights as
much as they should on average. The rounding's random 16 bits come from the noise's counter with the pair ROUNDING, which no
member has: element i takes lane i % 8 of its words. So the update is a pure function of the stored bits and the record.

    bfloat16   the 16 bits that are cut off, plus the random 16 bits, carry or not: exactly unbiased
    int8       floor(x·((1/scale)·127) + (random + ½)/65536), the row's scale having grown first where the row would clip:
               by factors of 17/16, the fewest for which no magnitude is above it. Scales never shrink.
"""

import numpy as np

from es_lite.algorithm import noise
from es_lite.algorithm.formats import LEVELS, TINY, factor_of, greatest, load
from es_lite.algorithm.jit import CHUNK, jit
from es_lite.algorithm.kernels import make_lanes, make_noise

_u32, _f32 = np.uint32, np.float32

ROUNDING = 2**32 - 1
"""The pair number whose words round the update; no member's pair reaches it."""

_ROUNDING = np.uint32(ROUNDING)

GROWTH = np.float32(17 / 16)
"""A row's scale grows by this factor at a time."""


@jit
def _total(total, epsilon, words, lanes, start, count, pairs, coefficients, table, tensor, step, k0, k1):
    """Σ_p coefficients[p]·ε_{pairs[p]} of elements start … into total[:count], in the order given."""
    total[:count] = _f32(0)
    for p in range(pairs.size):
        make_noise(epsilon, words, lanes, table, start, count, tensor, pairs[p], step, k0, k1)
        for i in range(count):
            total[i] += coefficients[p] * epsilon[i]


@jit
def _advance_fp32(theta, start, pairs, coefficients, decay, table, tensor, step, k0, k1):
    words = np.empty(CHUNK // 2 + 4, _u32)
    lanes = words.view(np.uint16)
    epsilon, total = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32)
    for low in range(0, theta.size, CHUNK):
        count = min(CHUNK, theta.size - low)
        _total(total, epsilon, words, lanes, start + low, count, pairs, coefficients, table, tensor, step, k0, k1)
        part = theta[low : low + count]
        for i in range(count):
            part[i] = (part[i] - decay * part[i]) + total[i]


@jit
def _advance_bf16(theta, start, pairs, coefficients, decay, table, tensor, step, k0, k1, none):
    words = np.empty(CHUNK // 2 + 4, _u32)
    lanes = words.view(np.uint16)
    epsilon, total, value = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32), np.empty(CHUNK, _f32)
    bits = value.view(_u32)
    for low in range(0, theta.size, CHUNK):
        count = min(CHUNK, theta.size - low)
        first = start + low
        _total(total, epsilon, words, lanes, first, count, pairs, coefficients, table, tensor, step, k0, k1)
        part = theta[low : low + count]
        load(value, bits, part, none, 1, 0)
        for i in range(count):
            value[i] = (value[i] - decay * value[i]) + total[i]
        cut = make_lanes(words, lanes, first, count, tensor, _ROUNDING, step, k0, k1)
        for i in range(count):
            part[i] = np.uint16((bits[i] + _u32(cut[i])) >> _u32(16))


@jit
def _advance_int8(theta, scales, width, start, pairs, coefficients, decay, table, tensor, step, k0, k1):
    """theta: whole rows; scales: theirs alone."""
    words = np.empty(CHUNK // 2 + 4, _u32)
    lanes = words.view(np.uint16)
    epsilon, total, row_value = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32), np.empty(width, _f32)
    row_bits = row_value.view(_u32)
    for row in range(scales.size):
        stored = theta[row * width : (row + 1) * width]
        load(row_value, row_bits, stored, scales, width, row * width)
        for low in range(0, width, CHUNK):
            count = min(CHUNK, width - low)
            first = start + row * width + low
            _total(total, epsilon, words, lanes, first, count, pairs, coefficients, table, tensor, step, k0, k1)
            value = row_value[low : low + count]
            for i in range(count):
                value[i] = (value[i] - decay * value[i]) + total[i]
        scale, top = scales[row], greatest(row_value)
        if scale <= TINY:
            scale = top
        while scale < top:
            scale = scale * GROWTH
        scales[row] = scale
        factor = factor_of(scale)
        for low in range(0, width, CHUNK):
            count = min(CHUNK, width - low)
            first = start + row * width + low
            cut = make_lanes(words, lanes, first, count, tensor, _ROUNDING, step, k0, k1)
            value, out = row_value[low : low + count], stored[low : low + count]
            for i in range(count):
                level = np.floor(value[i] * factor + (_f32(cut[i]) + _f32(0.5)) * _f32(1 / 65536))
                out[i] = np.int8(min(max(level, -LEVELS), LEVELS))


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
    scales: np.ndarray | None = None,
) -> None:
    """θ ← (θ - decay·θ) + Σ_p coefficients[p]·ε_{pairs[p]}, in place; the sum runs in the order given, in float32.

    theta: elements start … of the tensor, float32 [n], bfloat16 bits, uint16 [n], or int8 [n], whole rows whose scales,
    float32 [rows], change too; pairs: uint32 [P]; coefficients: float32 [P].
    """
    k0, k1 = noise.key(seed)
    common = pairs, coefficients, _f32(decay), noise.table(), _u32(tensor), _u32(step), _u32(k0), _u32(k1)
    if theta.dtype == np.float32:
        _advance_fp32(theta, start, *common)
    elif theta.dtype == np.uint16:
        _advance_bf16(theta, start, *common, np.zeros(0, np.float32))
    else:
        assert scales is not None and theta.dtype == np.int8
        _advance_int8(theta, scales, theta.size // scales.size, start, *common)
