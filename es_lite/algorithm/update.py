"""The update of a step, θ ← (θ - decay·θ) + Σ_p c_p·ε_p, on weights in any stored format (numba).

An anchored step has anchor·(θ - θ₀) in place of decay·θ.

float32 needs no further rounding. bfloat16 and int8 are rounded stochastically: up with the probability of the fraction that is
cut off, so updates far below the format's resolution still move the weights by the right amount on average. The 16 random bits
come from the noise's counter with the reserved pair ROUNDING: element i takes lane i % 8 of counter i // 8. So the update is a
pure function of the stored bits and the record.

    bfloat16   (bits + random) >> 16: exactly unbiased
    int8       floor(x·((1/scale)·127) + (random + ½)/65536). If a magnitude exceeds the row's scale, the scale first grows, by
               factors of 17/16 until none does. Scales never shrink.

The noise kind computes the sum Σ_p c_p·ε_p, in blocks whose size it chooses.
"""

import numpy as np

from es_lite.algorithm.formats import LEVELS, NO_SCALES, TINY, factor_of, greatest, load
from es_lite.algorithm.jit import CHUNK, jit
from es_lite.algorithm.noise.kernels import draw_lanes, words_buffer, words_of
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.place import ROUNDING, Place

_u32, _f32 = np.uint32, np.float32

NO_ORIGIN = np.empty(0, np.float32)

GROWTH = np.float32(17 / 16)
"""A row's scale grows by this factor at a time."""


@jit
def _move(value, total, decay, anchor, origin):
    """Float32 values, in place. origin: θ₀, or empty for decay."""
    if origin.size:
        for i in range(value.size):
            value[i] = (value[i] - anchor * (value[i] - origin[i])) + total[i]
    else:
        for i in range(value.size):
            value[i] = (value[i] - decay * value[i]) + total[i]


@jit
def _apply_bf16(theta, total, decay, anchor, origin, start, none, tensor, pair, step, k0, k1):
    words, lanes = words_buffer()
    value = np.empty(CHUNK, _f32)
    bits = value.view(_u32)
    for low in range(0, theta.size, CHUNK):
        count = min(CHUNK, theta.size - low)
        part, moved = theta[low : low + count], total[low : low + count]
        load(value, bits, part, none, 1, 0)
        _move(value[:count], moved, decay, anchor, origin[low : low + count])
        cut = draw_lanes(words, lanes, start + low, count, tensor, pair, step, k0, k1)
        for i in range(count):
            part[i] = np.uint16((bits[i] + _u32(cut[i])) >> _u32(16))


@jit
def _apply_int8(theta, scales, total, decay, anchor, origin, start, tensor, pair, step, k0, k1):
    """theta: whole rows; scales: of these rows only."""
    words, lanes = words_buffer()
    width = theta.size // scales.size
    value = np.empty(width, _f32)
    bits = value.view(_u32)
    for row in range(scales.size):
        stored, moved = theta[row * width : (row + 1) * width], total[row * width : (row + 1) * width]
        load(value, bits, stored, scales, width, row * width)
        _move(value, moved, decay, anchor, origin[row * width : (row + 1) * width])
        scale, top = scales[row], greatest(value)
        if scale <= TINY:
            scale = top
        while scale < top:
            scale = scale * GROWTH
        scales[row] = scale
        factor = factor_of(scale)
        for low in range(0, width, CHUNK):
            count = min(CHUNK, width - low)
            cut = draw_lanes(words, lanes, start + row * width + low, count, tensor, pair, step, k0, k1)
            part, out = value[low : low + count], stored[low : low + count]
            for i in range(count):
                level = np.floor(part[i] * factor + (_f32(cut[i]) + _f32(0.5)) * _f32(1 / 65536))
                out[i] = np.int8(min(max(level, -LEVELS), LEVELS))


def advance(
    theta: np.ndarray,
    noise: NoiseKind,
    place: Place,
    pairs: np.ndarray,
    coefficients: np.ndarray,
    decay: float,
    shape: tuple[int, ...],
    *,
    start: int = 0,
    scales: np.ndarray = NO_SCALES,
    anchor: float = 0.0,
    origin: np.ndarray = NO_ORIGIN,
) -> None:
    """θ ← (θ - decay·θ) + Σ_p coefficients[p]·ε_{pairs[p]}, in place; the sum runs in the order given, in float32.

    If `origin` is given, which is θ₀ of the same elements, float32 [n], anchor·(θ - θ₀) takes the place of decay·θ.

    theta: elements of the tensor from `start` on: float32 [n]; bfloat16 bits, uint16 [n]; or int8 [n], whole rows, whose scales,
    float32 [rows], change too. place: its pair is ignored. pairs: uint32 [P]; coefficients: float32 [P].
    shape: the tensor's.
    """
    rounding = words_of(place._replace(pair=ROUNDING))
    width = theta.size // scales.size if scales.size else 1
    block = max(1, noise.block(shape) // width) * width
    total = np.empty(min(block, theta.size), np.float32)
    for low in range(0, theta.size, block):
        part = theta[low : low + block]
        moved, first = total[: part.size], start + low
        noise.weighted_sum(moved, place, pairs, coefficients, shape, start=first)
        pull = _f32(decay), _f32(anchor), origin[low : low + block]
        if theta.dtype == np.float32:
            _move(part, moved, *pull)
        elif theta.dtype == np.uint16:
            _apply_bf16(part, moved, *pull, first, NO_SCALES, *rounding)
        else:
            assert theta.dtype == np.int8
            rows = scales[low // width : (low + part.size) // width]
            _apply_int8(part, rows, moved, *pull, first, *rounding)
