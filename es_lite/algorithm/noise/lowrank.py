"""Low-rank noise, the kind "lowrank": of a matrix [out, in], E = A Bᵀ/√r with A [out, r] and B [in, r] gaussian (EGGROLL,
arXiv 2511.16652). A tensor that is not a matrix gets gaussian noise.

The factors are gaussian noise of the tensor's place: A[o, k] is element o·r + k, B[i, k] element (out + i)·r + k. A linear map
under such a perturbation is x Wᵀ + (σ/√r)(x B)Aᵀ, so E is never made (`factors`). What is not a plain linear map is perturbed
element by element, by the same definition (`perturb`).

Arithmetic is plain IEEE float32, without fused multiply-add or fastmath.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from es_lite.algorithm.formats import NO_SCALES, load
from es_lite.algorithm.jit import CHUNK, jit
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.kernels import put_moved, words_buffer, words_of
from es_lite.algorithm.noise.place import Place

BLOCK_ROWS = 64
"""Rows that are summed at a time: the columns' factors are drawn once for all of them, so drawing costs 1/64 of full noise."""

PANEL = 1024
"""Columns that are summed at a time: with BLOCK_ROWS rows, 256 KiB, which stay in a second-level cache."""

TERMS = 8
"""Rank-1 terms whose factors are drawn at a time (a pair's all, if its rank is higher, with narrower panels): with PANEL columns,
32 KiB, which stay in a first-level cache."""

_f32 = np.float32


@jit
def _factors(out, words, lanes, table, start, tensor, pair, step, k0, k1):
    """out = gaussian ε of elements start …, [n]."""
    for low in range(0, out.size, CHUNK):
        part = out[low : low + CHUNK]
        gaussian._draw(part, words, lanes, table, start + low, part.size, tensor, pair, step, k0, k1)


@jit
def _outer(noise, left, right, low, rank):
    """noise = Σ_k left[k]·right[k, low :]; the sum runs in the order of k."""
    first = right[0, low : low + noise.size]
    for i in range(noise.size):
        noise[i] = left[0] * first[i]
    for k in range(1, rank):
        other = right[k, low : low + noise.size]
        for i in range(noise.size):
            noise[i] += left[k] * other[i]


@jit
def _transposed(right, drawn, rank):
    """right [rank, n] = the factors of n columns as drawn, [n·rank]."""
    for k in range(rank):
        for i in range(right.shape[1]):
            right[k, i] = drawn[i * rank + k]


@jit
def _perturb_rows(plus, minus, weights, scales, rows, first, height, width, rank, root, sigma, table, tensor, pair, step, k0, k1):
    """plus, minus, weights: flat, of all or (rows[0] and the last) some elements of `rows`, from column `first` of the first on.

    scales: of these rows, if weights are int8.
    """
    words, lanes = words_buffer()
    drawn, right, left = np.empty(width * rank, _f32), np.empty((rank, width), _f32), np.empty(rank, _f32)
    _factors(drawn, words, lanes, table, height * rank, tensor, pair, step, k0, k1)
    _transposed(right, drawn, rank)
    noise, base, value = np.empty(CHUNK, _f32), np.empty(CHUNK, _f32), np.empty(CHUNK, _f32)
    base_bits = base.view(np.uint32)
    done, column = 0, first
    for i in range(rows.size):
        _factors(left, words, lanes, table, rows[i] * rank, tensor, pair, step, k0, k1)
        for k in range(rank):
            left[k] = left[k] * root
        while column < width and done < weights.size:
            count = min(CHUNK, width - column, weights.size - done)
            part = noise[:count]
            _outer(part, left, right, column, rank)
            for j in range(count):
                part[j] = sigma * part[j]
            load(base, base_bits, weights[done : done + count], scales[i : i + 1], width, column)
            put_moved(plus[done : done + count], minus[done : done + count], base, part, value)
            done += count
            column += count
        column = 0


@jit
def _add_terms(total, left, right, low, terms):
    """total += Σ_t left[t]·right[t, low :], in the order of t; four terms at a time stay in registers."""
    t, high = 0, low + total.size
    while t + 4 <= terms:
        a, b, c, d = left[t], left[t + 1], left[t + 2], left[t + 3]
        first, second = right[t, low:high], right[t + 1, low:high]
        third, fourth = right[t + 2, low:high], right[t + 3, low:high]
        for i in range(total.size):
            value = total[i] + a * first[i]
            value = value + b * second[i]
            value = value + c * third[i]
            total[i] = value + d * fourth[i]
        t += 4
    while t < terms:
        a, first = left[t], right[t, low:high]
        for i in range(total.size):
            total[i] += a * first[i]
        t += 1


@jit
def _weighted_sum(out, start, height, width, rank, root, pairs, coefficients, table, tensor, step, k0, k1):
    words, lanes = words_buffer()
    top, bottom = start // width, (start + out.size - 1) // width
    together = max(1, TERMS // rank)  # pairs
    wide = max(CHUNK // 16, PANEL * TERMS // max(TERMS, rank))
    drawn = np.empty(wide * rank, _f32)
    left, right = np.empty((bottom - top + 1, together * rank), _f32), np.empty((together * rank, wide), _f32)
    rows = np.empty((bottom - top + 1) * rank, _f32)
    out[:] = _f32(0)
    for first in range(0, pairs.size, together):
        chunk = min(together, pairs.size - first)
        for p in range(chunk):
            _factors(rows, words, lanes, table, top * rank, tensor, pairs[first + p], step, k0, k1)
            factor = coefficients[first + p] * root
            for row in range(left.shape[0]):
                for k in range(rank):
                    left[row, p * rank + k] = rows[row * rank + k] * factor
        for panel in range(0, width, wide):
            columns = min(wide, width - panel)
            for p in range(chunk):
                some = drawn[: columns * rank]
                _factors(some, words, lanes, table, (height + panel) * rank, tensor, pairs[first + p], step, k0, k1)
                _transposed(right[p * rank : (p + 1) * rank, :columns], some, rank)
            for row in range(left.shape[0]):
                at = (top + row) * width - start  # the row's first column in `out`; negative if `out` begins within the row
                low, high = max(panel, -at), min(panel + columns, out.size - at)
                if low < high:
                    _add_terms(out[at + low : at + high], left[row], right, low - panel, chunk * rank)


@dataclass(frozen=True)
class LowRank:
    """Noise of rank `rank`; methods as the functions of `gaussian`."""

    NAME: ClassVar[str] = "lowrank"
    RANK: int

    @property
    def root(self) -> np.float32:
        """1/√r."""
        return _f32(1 / math.sqrt(self.RANK))

    def factors(self, place: Place, shape: tuple[int, int], first: int = 0, count: int | None = None) -> tuple[np.ndarray, ...]:
        """A of rows first … first + count - 1 (default: all), [count, r], and B, [in, r]: float32, without 1/√r."""
        height, width = shape
        left = np.empty(((height if count is None else count), self.RANK), np.float32)
        right = np.empty((width, self.RANK), np.float32)
        gaussian.fill(left.reshape(-1), place, 1.0, start=first * self.RANK)
        gaussian.fill(right.reshape(-1), place, 1.0, start=height * self.RANK)
        return left, right

    def factors_on_device(
        self, place: Place, shape: tuple[int, int], device: torch.device, first: int = 0, count: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The same on a device."""
        height, width = shape
        left = gaussian.range_on_device(first * self.RANK, (height if count is None else count) * self.RANK, place, device)
        right = gaussian.range_on_device(height * self.RANK, width * self.RANK, place, device)
        return left.view(-1, self.RANK), right.view(-1, self.RANK)

    def epsilon(self, place: Place, shape: tuple[int, ...], start: int, count: int) -> np.ndarray:
        """The definition: E of elements start …, float32 [count]: Σ_k (A[o, k]·(1/√r))·B[i, k], in the order of k."""
        if len(shape) != 2:
            return gaussian.epsilon(place, shape, start, count)
        (height, width), rank = shape, self.RANK
        left = gaussian.epsilon(place, shape, 0, height * rank).reshape(height, rank) * self.root
        right = gaussian.epsilon(place, shape, height * rank, width * rank).reshape(width, rank)
        rows, columns = np.divmod(np.arange(start, start + count), width)
        total = left[rows, 0] * right[columns, 0]
        for k in range(1, rank):
            total = total + left[rows, k] * right[columns, k]
        return total

    def epsilon_on_device(self, elements: torch.Tensor, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) != 2:
            return gaussian.epsilon_on_device(elements, place, shape)
        left, right = self.factors_on_device(place, (shape[0], shape[1]), elements.device)
        left, rows, columns = left * float(self.root), elements // shape[1], elements % shape[1]
        rows = rows.clamp(max=shape[0] - 1)  # the last group of 8 may end beyond the tensor
        total = left[rows, 0] * right[columns, 0]
        for k in range(1, self.RANK):
            total = total + left[rows, k] * right[columns, k]
        return total

    def perturb(
        self,
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
        if len(shape) != 2:
            gaussian.perturb(plus, minus, weights, place, sigma, shape, start=start, scales=scales)
            return
        width = shape[1]
        rows = np.arange(start // width, -(-(start + weights.size) // width))
        own = scales[rows[0] : rows[-1] + 1] if scales.size and rows.size else scales
        self._perturb_rows(plus, minus, weights, rows, start % width, place, sigma, shape, own)

    def perturb_rows(
        self,
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
        other = None if minus is None else minus.reshape(-1)
        self._perturb_rows(plus.reshape(-1), other, weights.reshape(-1), rows, 0, place, sigma, shape, scales)

    def _perturb_rows(
        self,
        plus: np.ndarray,
        minus: np.ndarray | None,
        weights: np.ndarray,
        rows: np.ndarray,
        column: int,
        place: Place,
        sigma: float,
        shape: tuple[int, ...],
        scales: np.ndarray,
    ) -> None:
        other, size = plus[:0] if minus is None else minus, (shape[0], shape[1], self.RANK, self.root)
        _perturb_rows(plus, other, weights, scales, rows, column, *size, _f32(sigma), gaussian.table(), *words_of(place))

    def block(self, shape: tuple[int, ...]) -> int:
        return BLOCK_ROWS * shape[1] if len(shape) == 2 else gaussian.block(shape)

    def weighted_sum(
        self,
        out: np.ndarray,
        place: Place,
        pairs: np.ndarray,
        coefficients: np.ndarray,
        shape: tuple[int, ...],
        *,
        start: int = 0,
    ) -> None:
        """As `gaussian.weighted_sum`; a coefficient multiplies A: Σ_p Σ_k (A_p[o, k]·(c_p·(1/√r)))·B_p[i, k], in that order."""
        if len(shape) != 2:
            gaussian.weighted_sum(out, place, pairs, coefficients, shape, start=start)
            return
        tensor, _, step, k0, k1 = words_of(place)
        size = (*shape, self.RANK, self.root)
        _weighted_sum(out, start, *size, pairs, coefficients, gaussian.table(), tensor, step, k0, k1)

    def drawn(self, shape: tuple[int, ...], *, update: bool = False) -> int:
        """As `gaussian.drawn`; the update draws B once per BLOCK_ROWS rows."""
        if len(shape) != 2:
            return gaussian.drawn(shape)
        times = -(-shape[0] // BLOCK_ROWS) if update else 1
        return self.RANK * (shape[0] + times * shape[1])
