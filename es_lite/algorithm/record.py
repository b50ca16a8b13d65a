"""The record of a step: what anyone needs, beside θ_t, to compute θ_{t+1} bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from es_lite.algorithm import shaping


@dataclass(frozen=True)
class Record:
    """Step t of a run: θ ← (θ - decay·θ) + Σ_j coefficients[j]·ε_j, in float32."""

    step: int
    seed: int
    """Key of the noise."""
    sigma: float
    """σ that the members were perturbed by; the update does not need it."""
    antithetic: bool
    decay: float
    """α·λ of the weight decay, a float32 value; 0 where it is off."""
    coefficients: tuple[float, ...]
    """c_j of each member, float32 values, 0 for a member whose score was not finite."""
    kind: str = "gaussian"
    """Kind of the noise."""

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Noise pairs that contribute, uint32 [P], and their float32 coefficients [P], in member order.

        Member j's noise is that of pair j; with antithetic sampling, pair p's coefficient is c_2p - c_2p+1.
        Pairs of coefficient 0 are left out, which changes no bit of the sum.
        """
        coefficients = np.array(self.coefficients, np.float32)
        if self.antithetic:
            coefficients = coefficients[0::2] - coefficients[1::2]
        used = np.flatnonzero(coefficients)
        return used.astype(np.uint32), coefficients[used]


def make(
    step: int,
    scores: Sequence[float] | np.ndarray,
    *,
    seed: int,
    sigma: float,
    alpha: float,
    shaping_kind: str,
    scale: str,
    antithetic: bool,
    weight_decay: float,
) -> Record:
    """Step `step` as its scores decide it: c_j = α/N·w_j ("standard") or α/(Nσ)·w_j ("nes").

    Raises ValueError where fewer than two scores are finite.
    """
    weights = shaping.shape(np.asarray(scores, np.float64), shaping_kind)
    step_size = alpha / len(scores) / (sigma if scale == "nes" else 1.0)
    coefficients = (step_size * weights).astype(np.float32)
    return Record(
        step=step,
        seed=seed,
        sigma=sigma,
        antithetic=antithetic,
        decay=float(np.float32(alpha * weight_decay)),
        coefficients=tuple(float(c) for c in coefficients),
    )
