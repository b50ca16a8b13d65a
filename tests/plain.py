"""Reference implementations of the formats and of the update in plain numpy float32: the kernels must equal them bit for bit."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from es_lite.algorithm.noise import gaussian, philox, rademacher
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.algorithm.noise.place import ROUNDING, Place

KINDS: dict[str, NoiseKind] = {
    "gaussian": gaussian,
    "rademacher": rademacher,
    "lowrank 1": LowRank(1),
    "lowrank 3": LowRank(3),
}
"""Every kind of noise, low-rank noise with two ranks."""

EVERY_KIND = pytest.mark.parametrize("noise", KINDS.values(), ids=KINDS)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16 bits, uint16."""
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def float32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def factor(scales: np.ndarray) -> np.ndarray:
    """What the elements of each row are multiplied by to become levels: float32 [rows, 1]."""
    scales = scales[:, None]
    whole = np.where(scales > np.float32(1e-36), scales, np.float32(np.inf))
    return np.float32(1) / whole * np.float32(127)


def quantised(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n] as int8 [n], each element rounded to nearest, and the scales of the rows."""
    rows = values.reshape(-1, width)
    scales = np.abs(rows).max(axis=1)
    return np.rint(rows * factor(scales)).astype(np.int8).ravel(), scales


def dequantised(stored: np.ndarray, scales: np.ndarray, width: int, start: int = 0) -> np.ndarray:
    """The values of stored elements start … of a tensor; `scales` are those of all its rows."""
    of_each = scales[(start + np.arange(stored.size)) // width]
    return stored.astype(np.float32) * of_each * np.float32(1 / 127)


def as_float32(stored: np.ndarray, scales: np.ndarray, width: int, start: int = 0) -> np.ndarray:
    """The values of stored elements, whichever of the three formats they are in."""
    if stored.dtype == np.int8:
        return dequantised(stored, scales, width, start)
    return float32(stored) if stored.dtype == np.uint16 else stored


def stored_as(dtype: np.dtype, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 values in the format of `dtype`, and their scales (empty unless it is int8)."""
    if dtype == np.int8:
        return quantised(values, width)
    return (bf16(values) if dtype == np.uint16 else values.copy()), np.zeros(0, np.float32)


def random16(seed: int, step: int, tensor: int, start: int, count: int) -> np.ndarray:
    """The 16 random bits that round elements start …, uint32 [count]."""
    first, last = start // 8, (start + count + 7) // 8
    words = philox.words((np.arange(first, last), tensor, ROUNDING, step), (seed & 0xFFFFFFFF, seed >> 32))
    lanes = np.stack([words & 0xFFFF, words >> 16], axis=-1).ravel()
    return lanes[start - 8 * first :][:count]


def grown(scales: np.ndarray, top: np.ndarray) -> np.ndarray:
    """The scales after an update, for rows whose greatest magnitudes have become `top`."""
    scales = np.where(scales <= np.float32(1e-36), top, scales)
    while (scales < top).any():
        scales = np.where(scales < top, scales * np.float32(17 / 16), scales)
    return scales


def terms(
    noise: NoiseKind, place: Place, coefficient: float, shape: tuple[int, ...], start: int, count: int
) -> Iterator[np.ndarray]:
    """What one pair adds to elements start … of a tensor of this shape, one after the other: float32 [count] each.

    This is c·ε but for matrices under low-rank noise, where it is (A[o, k]·(c·(1/√r)))·B[i, k] for each k.
    """
    rank, factor = noise.RANK, np.float32(coefficient)
    if not rank:
        yield factor * noise.epsilon(place, shape, start, count)
    elif len(shape) != 2:
        yield factor * gaussian.epsilon(place, shape, start, count)
    else:
        height, width = shape
        drawn = gaussian.epsilon(place, (), 0, (height + width) * rank).reshape(-1, rank)
        rows, columns = np.divmod(np.arange(start, start + count), width)
        for k in range(rank):
            yield drawn[rows, k] * (factor * np.float32(1 / math.sqrt(rank))) * drawn[height + columns, k]


def weighted_sum(
    noise: NoiseKind,
    place: Place,
    pairs: np.ndarray,
    coefficients: np.ndarray,
    shape: tuple[int, ...],
    start: int,
    count: int,
) -> np.ndarray:
    """Σ_p c_p·ε_p of elements start …, float32 [count]: every term is rounded, then added, in the order given."""
    total = np.zeros(count, np.float32)
    for pair, coefficient in zip(pairs, coefficients, strict=True):
        for term in terms(noise, place._replace(pair=int(pair)), coefficient, shape, start, count):
            total = total + term
    assert total.dtype == np.float32
    return total


def advanced(
    stored: np.ndarray,
    scales: np.ndarray,
    *,
    seed: int,
    step: int,
    tensor: int,
    pairs: np.ndarray,
    coefficients: np.ndarray,
    decay: float,
    start: int = 0,
    noise: NoiseKind = gaussian,
    shape: tuple[int, ...] = (),
    anchor: float = 0.0,
    origin: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Elements start … of a tensor after a step, and their scales. int8: whole rows, and `scales` of these rows only.

    shape: the tensor's; only low-rank noise depends on it. origin: θ₀ of the same elements, if the step is anchored.
    """
    width = stored.size // scales.size if scales.size else 1
    total = weighted_sum(noise, Place(seed, step, 0, tensor), pairs, coefficients, shape, start, stored.size)
    values = as_float32(stored, scales, width)
    pull = np.float32(decay) * values if origin is None else np.float32(anchor) * (values - origin)
    values = (values - pull) + total
    assert values.dtype == np.float32
    if stored.dtype == np.float32:
        return values, scales
    cut = random16(seed, step, tensor, start, stored.size)
    if stored.dtype == np.uint16:
        return ((values.view(np.uint32) + cut) >> 16).astype(np.uint16), scales
    rows = values.reshape(-1, width)
    scales = grown(scales, np.abs(rows).max(axis=1))
    up = (cut.reshape(rows.shape).astype(np.float32) + np.float32(0.5)) * np.float32(1 / 65536)
    levels = np.clip(np.floor(rows * factor(scales) + up), -127, 127)
    return levels.astype(np.int8).ravel(), scales
