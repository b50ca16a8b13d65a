"""Philox and the perturbation with torch operations, on any device: the same bits as the kernels'.

Philox's unsigned 32-bit words are held in signed 64-bit integers, which torch has on every device. A product of two words may
wrap around, but masking its low and high halves still gives the right bits. Each arithmetic operation is a separate call, so no
compiler fuses a multiplication with an addition.
"""

from collections.abc import Callable

import torch

from es_lite.algorithm.formats import RECIPROCAL
from es_lite.algorithm.noise.philox import KEY_INCREMENTS, LANES, MULTIPLIERS, ROUNDS
from es_lite.algorithm.noise.place import Place

CHUNK = 2**22
"""Elements processed at a time: for every 8 of them, 10 words of 8 bytes are in use at once."""

_LOW = 0xFFFFFFFF


def philox4x32(counters: torch.Tensor, place: Place) -> torch.Tensor:
    """The words of counters, int64 [n]: int64 [n, 4], each from 0 to 2³² - 1."""
    c0 = counters & _LOW
    c1, c2, c3 = (torch.full_like(c0, word) for word in (place.tensor, place.pair, place.step))
    k0, k1 = place.key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & _LOW, (k1 + KEY_INCREMENTS[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def lanes(elements: torch.Tensor, place: Place) -> torch.Tensor:
    """The 16 random bits of each element, int64 [n].

    elements: indices in the tensor, int64 [n], in groups of 8 consecutive ones that begin at a multiple of 8.
    """
    words = philox4x32(elements[::LANES] // LANES, place)
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(-1)


def as_float32(stored: torch.Tensor, scales: torch.Tensor | None, width: int, first: int = 0) -> torch.Tensor:
    """The values of stored elements first, first + 1, …, float32 [n].

    stored: bfloat16 [n], or int8 [n] with the scales, float32 [rows], of rows of `width` elements.
    """
    if scales is None:
        return stored.to(torch.float32)
    rows = torch.arange(first, first + stored.numel(), device=stored.device) // width
    return stored.to(torch.float32) * scales[rows] * float(RECIPROCAL)


def converted(stored: torch.Tensor, scales: torch.Tensor | None, width: int, compute: torch.dtype) -> torch.Tensor:
    """The values of a part's stored elements in the type `compute`, [n]; `stored` itself if it has that type."""
    if stored.dtype == compute:
        return stored
    out = torch.empty(stored.numel(), dtype=compute, device=stored.device)
    for low in range(0, stored.numel(), CHUNK):
        high = min(low + CHUNK, stored.numel())
        out[low:high] = as_float32(stored[low:high], scales, width, low)
    return out


def perturb(
    outs: list[torch.Tensor],
    stored: torch.Tensor,
    scales: torch.Tensor | None,
    shape: tuple[int, ...],
    elements: torch.Tensor | int,
    draw: Callable[[torch.Tensor, Place, tuple[int, ...]], torch.Tensor],
    place: Place,
    sigma: float,
) -> None:
    """outs[0] = round(weights + σε) and, if given, outs[1] = round(weights - σε), the noise drawn once; outs may have any type.

    stored, scales: as in `as_float32`. shape: the tensor's. elements: the index of the first element in its tensor, or all
    indices, as in `lanes`. draw: the kind's `epsilon_on_device`.
    """
    width = shape[-1] if shape else 1
    sigma = float(torch.tensor(sigma, dtype=torch.float32))
    for low in range(0, stored.numel(), CHUNK):
        high = min(low + CHUNK, stored.numel())
        base = as_float32(stored[low:high], scales, width, low)
        if isinstance(elements, torch.Tensor):
            epsilon = draw(elements[low:high], place, shape)
        else:  # all elements of the counters from the first to the last
            first = elements + low
            whole = torch.arange(first // LANES * LANES, -(-(elements + high) // LANES) * LANES, device=stored.device)
            epsilon = draw(whole, place, shape)[first % LANES : first % LANES + high - low]
        moved = epsilon.mul_(sigma)
        outs[0][low:high] = base + moved
        for out in outs[1:]:
            out[low:high] = base - moved
