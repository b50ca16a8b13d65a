"""A running log-sum-exp over blocks of the vocabulary, so no [tokens, vocabulary] tensor is ever made.

Per token: the greatest logit so far and Σ exp(logit - greatest), float32. The exponential is a polynomial that
LLVM vectorises (numba's `math.exp` is one call per element); sums are made by halving, always in the same order.
"""

import numpy as np
import torch

from es_lite.algorithm.formats import MAGIC
from es_lite.algorithm.jit import Threads, jit
from es_lite.scoring.arrays import as_array

_f32, _u32 = np.float32, np.uint32

LOG2_E = np.float32(1.4426950408889634)
# The Taylor coefficients ln(2)^k / k! of 2^f; |f| <= 1/2 leaves a relative error under 2e-7.
C1, C2, C3 = np.float32(0.6931471805599453), np.float32(0.2402265069591007), np.float32(0.05550410866482158)
C4, C5, C6 = np.float32(0.009618129107628477), np.float32(0.0013333558146428443), np.float32(0.00015403530393381608)


@jit
def halve_max(values, buffer):
    """Maximum of values, whose size is a power of two; each loop is over whole halves, which LLVM vectorises."""
    half = values.size // 2
    low, high = values[:half], values[half:]
    for i in range(half):
        buffer[i] = low[i] if low[i] > high[i] else high[i]
    while half > 1:
        half //= 2
        low, high = buffer[:half], buffer[half : 2 * half]
        for i in range(half):
            low[i] = low[i] if low[i] > high[i] else high[i]
    return buffer[0]


@jit
def halve_sum(values):
    """Sum of values, whose size is a power of two, in a fixed order; destroys them."""
    half = values.size
    while half > 1:
        half //= 2
        low, high = values[:half], values[half : 2 * half]
        for i in range(half):
            low[i] += high[i]
    return values[0]


@jit
def exponentials(values, top, power, power_bits):
    """values = exp(values - top), float32, where top is at least the greatest; 2^-125 for what is smaller, as of -inf.

    exp(x) = 2^n · 2^f with n the nearest whole number to x·log2(e), found by adding and subtracting MAGIC: the
    low bits of the sum are n. power: a buffer of the same size; `power_bits` is the same seen as uint32.
    """
    for i in range(values.size):
        t = (values[i] - top) * LOG2_E
        t = _f32(-125) if t < _f32(-125) else t  # NaN stays
        power[i] = t + MAGIC
        values[i] = t - (power[i] - MAGIC)
    for i in range(values.size):
        power_bits[i] = (power_bits[i] << _u32(23)) + _u32(127 << 23)
    for i in range(values.size):
        f = values[i]
        values[i] = power[i] * (_f32(1) + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6))))))


@jit
def _row(values, power, power_bits, greatest, total):
    """One token's block, float32 [a power of two], -inf in the padding: the new (greatest, total)."""
    top = max(greatest, halve_max(values, power))
    exponentials(values, top, power, power_bits)
    # The padding's terms are 2^-125 each: far below the resolution of a sum that holds a 1.
    block = halve_sum(values)
    if total != 0:  # also NaN
        block += total * np.exp(greatest - top)
    return top, block


@jit
def buffers(width):
    """Buffers for a block: values and powers, float32 [the next power of two]."""
    padded = 2
    while padded < width:
        padded *= 2
    return np.empty(padded, _f32), np.empty(padded, _f32)


@jit
def _update_bf16(greatest, total, chosen, logits, targets, first):
    count, width = logits.shape
    values, power = buffers(width)
    value_bits, power_bits = values.view(_u32), power.view(_u32)
    for i in range(count):
        row = logits[i]
        for k in range(width):
            value_bits[k] = _u32(row[k]) << _u32(16)
        values[width:] = _f32(-np.inf)
        target = targets[i] - first
        if 0 <= target < width:
            chosen[i] = values[target]
        greatest[i], total[i] = _row(values, power, power_bits, greatest[i], total[i])


@jit
def _update_fp32(greatest, total, chosen, logits, targets, first):
    count, width = logits.shape
    values, power = buffers(width)
    power_bits = power.view(_u32)
    for i in range(count):
        values[:width] = logits[i]
        values[width:] = _f32(-np.inf)
        target = targets[i] - first
        if 0 <= target < width:
            chosen[i] = values[target]
        greatest[i], total[i] = _row(values, power, power_bits, greatest[i], total[i])


class RunningLogSumExp:
    """log Σ exp of each token's logits, fed block by block, and the logit of each token's target."""

    def __init__(self, targets: np.ndarray) -> None:
        """targets: int32 [tokens], the true next tokens."""
        self.targets = targets
        self.greatest = np.full(targets.size, -np.inf, np.float32)
        self.total = np.zeros(targets.size, np.float32)
        self.chosen = np.full(targets.size, np.nan, np.float32)

    def update(self, logits: np.ndarray | torch.Tensor, first: int, threads: Threads) -> None:
        """Adds the logits of vocabulary entries first, first + 1, …: [tokens, block], float32 or bfloat16 (bits: uint16)."""
        if isinstance(logits, torch.Tensor):
            logits = as_array(logits)
        kernel = _update_bf16 if logits.dtype == np.uint16 else _update_fp32

        def part(low: int, high: int) -> None:
            some = slice(low, high)
            kernel(self.greatest[some], self.total[some], self.chosen[some], logits[some], self.targets[some], first)

        threads.each(self.targets.size, part, least=64)

    def log_probabilities(self) -> np.ndarray:
        """Log-probabilities of the targets, float64 [tokens]."""
        return self.chosen.astype(np.float64) - (self.greatest.astype(np.float64) + np.log(self.total.astype(np.float64)))
