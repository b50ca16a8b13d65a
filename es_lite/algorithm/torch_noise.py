"""The noise by torch's integer operations, on any device: the same bits as `noise.gaussian`, and the perturbation from it.

Philox works on unsigned 32-bit words; torch has signed 64-bit ones everywhere. A product of two words wraps around in
them without harm: its low and high halves are masked out of the same 64 bits. Each arithmetic operation is a call of its own, so
that no compiler fuses a multiplication with an addition: the sums are the kernels', bit for bit.
"""

import functools

import torch

from es_lite.algorithm import noise
from es_lite.algorithm.formats import RECIPROCAL

CHUNK = 2**22
"""Elements made at a time: 10 words of 8 bytes for every 8 of them are in use at once."""

_LOW = 0xFFFFFFFF


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(noise.table().copy()).to(device)


def philox4x32(counters: torch.Tensor, tensor: int, pair: int, step: int, seed: int) -> torch.Tensor:
    """Words of the counters, int64 [n]: int64 [n, 4], each from 0 to 2³² - 1."""
    c0 = counters & _LOW
    c1, c2, c3 = (torch.full_like(c0, word) for word in (tensor, pair, step))
    k0, k1 = noise.key(seed)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def gaussian(elements: torch.Tensor, *, seed: int, step: int, pair: int, tensor: int) -> torch.Tensor:
    """ε of the elements of a tensor, float32 [n], exact multiples of 1/4096.

    elements: their numbers, int64 [n]: n is a multiple of 8, and so is the first of every 8 that follow one another.
    """
    words = philox4x32(elements[::8] // 8, tensor, pair, step, seed)
    lanes = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(-1)
    return _table(elements.device)[lanes].to(torch.float32) / noise.QUANTUM


def as_float32(stored: torch.Tensor, scales: torch.Tensor | None, width: int, first: int = 0) -> torch.Tensor:
    """What stored elements first, first + 1, … stand for, float32 [n].

    stored: bfloat16 [n], or int8 [n] with the scales, float32 [rows], of rows of `width` elements.
    """
    if scales is None:
        return stored.to(torch.float32)
    rows = torch.arange(first, first + stored.numel(), device=stored.device) // width
    return stored.to(torch.float32) * scales[rows] * float(RECIPROCAL)


def perturb(
    outs: list[torch.Tensor],
    stored: torch.Tensor,
    scales: torch.Tensor | None,
    width: int,
    elements: torch.Tensor | int,
    *,
    sigma: float,
    **place: int,
) -> None:
    """outs[0] = round(weights + σε) and, where given, outs[1] = round(weights - σε), the noise made once; any type of outs.

    stored, scales, width: as in `as_float32`. elements: the number of the first in its tensor, or of each of them, int64 [n], as
    in `gaussian`. place: seed, step, pair and tensor of the noise.
    """
    sigma = float(torch.tensor(sigma, dtype=torch.float32))
    for low in range(0, stored.numel(), CHUNK):
        high = min(low + CHUNK, stored.numel())
        base = as_float32(stored[low:high], scales, width, low)
        if isinstance(elements, torch.Tensor):
            epsilon = gaussian(elements[low:high], **place)
        else:  # from the 8 that the first is among to those that the last is among
            first = elements + low
            whole = torch.arange(first // 8 * 8, -(-(elements + high) // 8) * 8, device=stored.device)
            epsilon = gaussian(whole, **place)[first % 8 : first % 8 + high - low]
        moved = epsilon.mul_(sigma)
        outs[0][low:high] = base + moved
        for out in outs[1:]:
            out[low:high] = base - moved
