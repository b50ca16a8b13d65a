"""Rademacher noise, the kind "rademacher": ε is 1 or -1, one random bit an element. Its definition, and the kernels that use it.

A counter's 128 bits are those of its four words, the lowest bit of each word first; element i takes bit i % 128 of counter
i // 128. So a perturbation draws a sixteenth of the random bits that gaussian noise takes, and needs no table.
"""

import math

import numpy as np
import torch

from es_lite.algorithm.formats import NO_SCALES, load
from es_lite.algorithm.jit import CHUNK, jit
from es_lite.algorithm.noise import on_device, philox
from es_lite.algorithm.noise.kernels import draw_words, put_moved, words_of
from es_lite.algorithm.noise.place import Place

NAME = "rademacher"
RANK = 0

BITS = 128
"""Random bits per counter, and so elements."""

_f32, _u32 = np.float32, np.uint32


def epsilon(place: Place, shape: tuple[int, ...], start: int, count: int) -> np.ndarray:
    """The definition: ε of elements start … start + count - 1, float32 [count]: 1 where the bit is 1, else -1."""
    first, last = start // BITS, -(-(start + count) // BITS)
    words = philox.words((np.arange(first, last), place.tensor, place.pair, place.step), place.key).reshape(-1)
    bits = (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(-1)[start - BITS * first :][:count]
    return np.float32(2) * bits.astype(np.float32) - np.float32(1)


def epsilon_on_device(elements: torch.Tensor, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
    """The same with torch operations: ε of `elements`, int64 [n], in any order; float32 [n], on their device."""
    counters, which = torch.unique_consecutive(elements // BITS, return_inverse=True)
    words = on_device.philox4x32(counters, place).reshape(-1)[4 * which + elements % BITS // 32]
    return (2 * (words >> (elements % 32) & 1) - 1).to(torch.float32)


@jit
def _buffers():
    """For the words of CHUNK elements from any start, and the elements: uint32, and viewed as float32."""
    words = np.empty(CHUNK // 32 + 4, _u32)
    signed = np.empty(32 * words.size, _u32)
    return words, signed, signed.view(_f32)


@jit
def _draw(words, signed, value, start, count, tensor, pair, step, k0, k1):
    """Draws value·ε of elements start … start + count - 1; returns the index of the first in `signed`. value: float32 bits."""
    first = start // BITS
    used = words[: 4 * (-(-(start + count) // BITS) - first)]
    draw_words(used, first, tensor, pair, step, k0, k1)
    for w in range(used.size):
        word, part = ~used[w], signed[32 * w : 32 * w + 32]
        for bit in range(32):
            part[bit] = value ^ ((word >> _u32(bit)) << _u32(31))
    return start - BITS * first


@jit
def _bits(value):
    """A float32's bits."""
    box = np.empty(1, _f32)
    box[0] = value
    return box.view(_u32)[0]


@jit
def _perturb(plus, minus, weights, scales, width, offset, start, sigma, tensor, pair, step, k0, k1):
    """As `gaussian._perturb`."""
    words, signed, noise = _buffers()
    base, value, step_bits = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32), _bits(sigma)
    base_bits = base.view(_u32)
    for low in range(0, weights.size, CHUNK):
        count = min(CHUNK, weights.size - low)
        at = _draw(words, signed, step_bits, start + low, count, tensor, pair, step, k0, k1)
        load(base, base_bits, weights[low : low + count], scales, width, offset + low)
        put_moved(plus[low : low + count], minus[low : low + count], base, noise[at : at + count], value)


@jit
def _perturb_rows(plus, minus, weights, scales, rows, sigma, tensor, pair, step, k0, k1):
    width = weights.shape[1]
    for i in range(rows.size):
        other = minus[i] if minus.size else plus[i, :0]
        _perturb(plus[i], other, weights[i], scales[i : i + 1], width, 0, rows[i] * width, sigma, tensor, pair, step, k0, k1)


@jit
def _weighted_sum(out, start, pairs, coefficients, tensor, step, k0, k1):
    words, signed, noise = _buffers()
    for low in range(0, out.size, CHUNK):
        count = min(CHUNK, out.size - low)
        part = out[low : low + count]
        part[:] = _f32(0)
        for p in range(pairs.size):
            at = _draw(words, signed, _bits(coefficients[p]), start + low, count, tensor, pairs[p], step, k0, k1)
            moved = noise[at : at + count]
            for i in range(count):
                part[i] += moved[i]


def perturb(
    plus: np.ndarray,
    minus: np.ndarray | None,
    weights: np.ndarray,
    place: Place,
    sigma: float,
    shape: tuple[int, ...],
    *,
    start: int = 0,
    scales: np.ndarray = NO_SCALES,
) -> None:
    """As `gaussian.perturb`."""
    other = plus[:0] if minus is None else minus
    width = shape[-1] if shape else 1
    _perturb(plus, other, weights, scales, width, start, start, _f32(sigma), *words_of(place))


def perturb_rows(
    plus: np.ndarray,
    minus: np.ndarray | None,
    weights: np.ndarray,
    rows: np.ndarray,
    place: Place,
    sigma: float,
    shape: tuple[int, ...],
    *,
    scales: np.ndarray = NO_SCALES,
) -> None:
    """As `gaussian.perturb_rows`."""
    other = plus[:0] if minus is None else minus
    _perturb_rows(plus, other, weights, scales, rows, _f32(sigma), *words_of(place))


def block(shape: tuple[int, ...]) -> int:
    """As `gaussian.block`."""
    return 32 * CHUNK


def weighted_sum(
    out: np.ndarray, place: Place, pairs: np.ndarray, coefficients: np.ndarray, shape: tuple[int, ...], *, start: int = 0
) -> None:
    """As `gaussian.weighted_sum`."""
    tensor, _, step, k0, k1 = words_of(place)
    _weighted_sum(out, start, pairs, coefficients, tensor, step, k0, k1)


def drawn(shape: tuple[int, ...], *, update: bool = False) -> int:
    """As `gaussian.drawn`."""
    return math.prod(shape)
