"""Converts between float32 and the formats of stored weights: bfloat16 bits (uint16), and int8 with one scale per row.

int8 is row-wise absmax, as in bitsandbytes' `int8_vectorwise_quant`: a row's scale is its greatest magnitude, an element is
stored as round(x · ((1 / scale) · 127)), halves to even, and its value is element · scale · (1/127), each operation in float32.
A row of zeros has the scale 0. Values are assumed to be finite.
"""

from typing import Any, Literal

import numpy as np
from numba import types
from numba.extending import overload

from es_lite.algorithm.jit import CHUNK, jit

Storage = Literal["fp32", "bf16", "int8"]
"""How tensors are stored. With "int8", vectors (norms, biases) are bfloat16."""

_u32, _f32 = np.uint32, np.float32

LEVELS = np.float32(127)
RECIPROCAL = np.float32(1 / 127)
MAGIC = np.float32(12582912.0)
"""1.5 · 2²³: adding and subtracting it rounds to a whole number, halves to even."""

TINY = np.float32(1e-36)
"""A row without a greater magnitude counts as zeros: the reciprocal of its scale might not be finite."""

NO_SCALES = np.zeros(0, np.float32)
"""Stands for the scales of a tensor without any."""


def wide(element: Any) -> Any:
    """In kernels: a float32, or bfloat16 bits, as a float32."""
    raise NotImplementedError


def narrow(value: Any, like: Any) -> Any:
    """In kernels: a float32 as it is, or rounded to the nearest bfloat16 bits, ties to even; `like` has the type."""
    raise NotImplementedError


@overload(wide)
def _wide(element):
    if element == types.uint16:
        return lambda element: _u32(_u32(element) << _u32(16)).view(np.float32)
    return lambda element: element


@overload(narrow)
def _narrow(value, like):
    if like == types.uint16:

        def rounded(value, like):
            bits = _f32(value).view(np.uint32)
            return np.uint16((bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) >> _u32(16))

        return rounded
    return lambda value, like: value


@jit
def load(values, bits, stored, scales, width, start):
    """Converts `stored`, a tensor's elements from `start` on, into values[: stored.size]; `bits` is `values` viewed as uint32.

    scales: of all rows of `width` elements of the tensor, if it is int8; empty if it is bfloat16.
    """
    if scales.size == 0:
        for i in range(stored.size):
            bits[i] = _u32(stored[i]) << _u32(16)
        return
    row = start // width
    inside = start - row * width
    done = 0
    while done < stored.size:
        count = min(width - inside, stored.size - done)
        scale = scales[row]
        part, out = stored[done : done + count], values[done : done + count]
        for i in range(count):
            out[i] = _f32(part[i]) * scale * RECIPROCAL
        done += count
        row += 1
        inside = 0


@jit
def round_bf16(out, bits):
    """Rounds float32 bits to the nearest bfloat16, ties to even."""
    for i in range(out.size):
        out[i] = np.uint16((bits[i] + _u32(0x7FFF) + ((bits[i] >> _u32(16)) & _u32(1))) >> _u32(16))


@jit
def greatest(values):
    """The greatest magnitude."""
    lanes = np.zeros(32, _f32)
    whole = values.size // 32 * 32
    for low in range(0, whole, 32):
        part = values[low : low + 32]
        for k in range(32):
            lanes[k] = max(lanes[k], abs(part[k]))
    top = _f32(0)
    for k in range(32):
        top = max(top, lanes[k])
    for i in range(whole, values.size):
        top = max(top, abs(values[i]))
    return top


@jit
def factor_of(scale):
    """The factor from a row's values to its int8 levels."""
    return _f32(1) / scale * LEVELS if scale > TINY else _f32(0)


@jit
def _quantise(out, scales, values, width):
    for row in range(scales.size):
        part, target = values[row * width : (row + 1) * width], out[row * width : (row + 1) * width]
        scale = greatest(part)
        scales[row] = scale
        factor = factor_of(scale)
        for i in range(width):
            target[i] = np.int8((part[i] * factor + MAGIC) - MAGIC)


@jit
def _dequantise_bf16(out, stored, scales, width, start):
    value = np.empty(CHUNK, _f32)
    bits = value.view(_u32)
    for low in range(0, stored.size, CHUNK):
        count = min(CHUNK, stored.size - low)
        load(value, bits, stored[low : low + count], scales, width, start + low)
        round_bf16(out[low : low + count], bits)


@jit
def _dequantise_fp32(out, stored, scales, width, start):
    load(out, out.view(_u32), stored, scales, width, start)


@jit
def _to_bf16(out, values):
    round_bf16(out, values.view(_u32))


def to_bf16(out: np.ndarray, values: np.ndarray) -> None:
    """Rounds float32 [n] to bfloat16 bits, uint16 [n]: to nearest, ties to even."""
    _to_bf16(out, values)


def quantise(out: np.ndarray, scales: np.ndarray, values: np.ndarray) -> None:
    """Converts float32 [rows·width] to int8 [rows·width] and float32 scales [rows]."""
    _quantise(out, scales, values, values.size // scales.size)


def dequantise(out: np.ndarray, stored: np.ndarray, *, scales: np.ndarray, width: int, start: int) -> None:
    """Converts stored elements, as in `load`, to float32 [n] or, rounded to nearest, to bfloat16 bits, uint16 [n]."""
    kernel = _dequantise_bf16 if out.dtype == np.uint16 else _dequantise_fp32
    kernel(out, stored, scales, width, start)


def as_float32(stored: np.ndarray, scales: np.ndarray = NO_SCALES, width: int = 1, start: int = 0) -> np.ndarray:
    """The values, float32, of bfloat16 bits, or of int8 elements from `start` on with all the tensor's scales."""
    if not scales.size:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    out = np.empty(stored.size, np.float32)
    dequantise(out, stored, scales=scales, width=width, start=start)
    return out
