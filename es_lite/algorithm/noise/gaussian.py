"""Gaussian noise, the kind "gaussian": its definition, in numpy, and the kernels that use it.

ε of an element is T[u] / 4096, where u are the element's 16 random bits (`philox`) and T[u] is the normal quantile of
(u + ½) / 65536 rounded to 1/4096. Drawing noise computes no logarithm or cosine, so all machines agree.

The kernels draw, scale, add and round in one pass over weights in their stored format (`formats`), with the ε that `epsilon`
defines, bit for bit. Arithmetic is plain IEEE float32, without fused multiply-add or fastmath. All kernels release the
interpreter lock and can process any slice of a tensor.
"""

import functools
import hashlib
import math
from statistics import NormalDist

import numpy as np
import torch

from es_lite.algorithm.formats import NO_SCALES, load
from es_lite.algorithm.jit import CHUNK, jit
from es_lite.algorithm.noise import on_device, philox
from es_lite.algorithm.noise.kernels import draw_lanes, put_moved, words_buffer, words_of
from es_lite.algorithm.noise.place import Place

NAME = "gaussian"
RANK = 0

TABLE_SHA256 = "1ea009ce409dac97d6bd609266910f809c5fb912f78e16bd89145b08174d6fc5"

QUANTUM = 4096
"""Table entries are multiples of 1/QUANTUM."""

_f32, _QUANTUM = np.float32, np.float32(QUANTUM)


@functools.cache
def table() -> np.ndarray:
    """T, int16 [65536], read-only. Raises RuntimeError if this machine's arithmetic gives another table."""
    normal = NormalDist()
    quantiles = np.array([round(normal.inv_cdf((u + 0.5) / 65536) * QUANTUM) for u in range(65536)], dtype="<i2")
    if hashlib.sha256(quantiles.tobytes()).hexdigest() != TABLE_SHA256:
        raise RuntimeError("the table of normal quantiles differs from its definition: this Python's inv_cdf is unusual")
    quantiles.flags.writeable = False
    return quantiles


def epsilon(place: Place, shape: tuple[int, ...], start: int, count: int) -> np.ndarray:
    """The definition: ε of elements start … start + count - 1, float32 [count], exact multiples of 1/4096; for any shape."""
    return table()[philox.lanes(place, start, count)].astype(np.float32) / np.float32(QUANTUM)


@functools.cache
def _table_on(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(table().copy()).to(device)


def epsilon_on_device(elements: torch.Tensor, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
    """The same with torch operations: ε of `elements` (see `on_device.lanes`), float32 [n], on their device."""
    return _table_on(elements.device)[on_device.lanes(elements, place)].to(torch.float32) / QUANTUM


def range_on_device(start: int, count: int, place: Place, device: torch.device) -> torch.Tensor:
    """ε of elements start … start + count - 1, float32 [count]."""
    first = start // philox.LANES * philox.LANES
    whole = torch.arange(first, -(-(start + count) // philox.LANES) * philox.LANES, device=device)
    return epsilon_on_device(whole, place, ())[start - first :][:count]


@jit
def _draw(epsilon, words, lanes, table, start, count, tensor, pair, step, k0, k1):
    """Draws ε of elements start … start + count - 1 into epsilon[:count]; `lanes` is `words` viewed as uint16."""
    drawn = draw_lanes(words, lanes, start, count, tensor, pair, step, k0, k1)
    for i in range(count):
        epsilon[i] = _f32(table[drawn[i]]) / _QUANTUM


@jit
def _perturb(plus, minus, weights, scales, width, offset, start, sigma, table, tensor, pair, step, k0, k1):
    """weights: elements from `start` on; the first is element `offset` of the rows that `scales` belong to."""
    words, lanes = words_buffer()
    noise, base, value = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32), np.empty(CHUNK, _f32)
    base_bits = base.view(np.uint32)
    for low in range(0, weights.size, CHUNK):
        count = min(CHUNK, weights.size - low)
        _draw(noise, words, lanes, table, start + low, count, tensor, pair, step, k0, k1)
        for i in range(count):
            noise[i] = sigma * noise[i]
        load(base, base_bits, weights[low : low + count], scales, width, offset + low)
        put_moved(plus[low : low + count], minus[low : low + count], base, noise, value)


@jit
def _perturb_rows(plus, minus, weights, scales, rows, sigma, table, tensor, pair, step, k0, k1):
    width = weights.shape[1]
    for i in range(rows.size):
        other = minus[i] if minus.size else plus[i, :0]
        start = rows[i] * width
        _perturb(plus[i], other, weights[i], scales[i : i + 1], width, 0, start, sigma, table, tensor, pair, step, k0, k1)


@jit
def _fill(out, start, scale, table, tensor, pair, step, k0, k1):
    words, lanes = words_buffer()
    epsilon = np.empty(CHUNK, _f32)
    for low in range(0, out.size, CHUNK):
        count = min(CHUNK, out.size - low)
        _draw(epsilon, words, lanes, table, start + low, count, tensor, pair, step, k0, k1)
        part = out[low : low + count]
        for i in range(count):
            part[i] = scale * epsilon[i]


@jit
def _weighted_sum(out, start, pairs, coefficients, table, tensor, step, k0, k1):
    words, lanes = words_buffer()
    epsilon = np.empty(CHUNK, _f32)
    for low in range(0, out.size, CHUNK):
        count = min(CHUNK, out.size - low)
        part = out[low : low + count]
        part[:] = _f32(0)
        for p in range(pairs.size):
            _draw(epsilon, words, lanes, table, start + low, count, tensor, pairs[p], step, k0, k1)
            for i in range(count):
                part[i] += coefficients[p] * epsilon[i]


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
    """plus = round(weights + σε) and, if given, minus = round(weights - σε), the noise drawn once.

    weights: elements start … start + n - 1 of a tensor of this shape: bfloat16 bits, uint16 [n], or int8 [n] with the scales,
    float32, of all the tensor's rows. plus, minus: [n], uint16 for bfloat16 (rounded to nearest, ties to even) or float32.
    σ is rounded to float32 first.
    """
    other = plus[:0] if minus is None else minus
    width = shape[-1] if shape else 1
    _perturb(plus, other, weights, scales, width, start, start, _f32(sigma), table(), *words_of(place))


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
    """`perturb` for some rows of a matrix of this shape.

    weights: these rows, uint16 or int8 [R, W]; scales: theirs, float32 [R], if they are int8; rows: their indices, int64 [R];
    plus, minus: [R, W].
    """
    other = plus[:0] if minus is None else minus
    _perturb_rows(plus, other, weights, scales, rows, _f32(sigma), table(), *words_of(place))


def block(shape: tuple[int, ...]) -> int:
    """Elements that `weighted_sum` is best asked for at a time: 256 KiB, which stay in a second-level cache."""
    return 32 * CHUNK


def weighted_sum(
    out: np.ndarray, place: Place, pairs: np.ndarray, coefficients: np.ndarray, shape: tuple[int, ...], *, start: int = 0
) -> None:
    """out = Σ_p coefficients[p]·ε_{pairs[p]} of elements start …, float32 [n]; the sum runs in the order given, in float32.

    place: its pair is ignored. pairs: uint32 [P]; coefficients: float32 [P]. shape: the tensor's.
    """
    tensor, _, step, k0, k1 = words_of(place)
    _weighted_sum(out, start, pairs, coefficients, table(), tensor, step, k0, k1)


def drawn(shape: tuple[int, ...], *, update: bool = False) -> int:
    """Elements of noise that are drawn for a tensor of this shape and a pair: to perturb it, or to update it."""
    return math.prod(shape)


def fill(out: np.ndarray, place: Place, scale: float, *, start: int = 0) -> None:
    """out = scale·ε of elements start …, float32 [n]: the weights of a random model."""
    _fill(out, start, _f32(scale), table(), *words_of(place))
