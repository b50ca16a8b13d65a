"""The record of a step: what is needed, besides θ_t, to compute θ_{t+1} bit for bit."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from es_lite.algorithm import shaping
from es_lite.algorithm.noise.kinds import NoiseKind, kind_of


@dataclass(frozen=True)
class Record:
    """Step t of a run: θ ← (θ - decay·θ) + Σ_j coefficients[j]·ε_j, in float32."""

    step: int
    seed: int
    """The key of the noise."""
    sigma: float
    """The σ of the perturbations; the update does not need it."""
    antithetic: bool
    decay: float
    """α·λ of the weight decay, a float32 value; 0 if it is off."""
    coefficients: tuple[float, ...]
    """c_j of each member, float32 values; 0 for a member whose score was not finite."""
    kind: str = "gaussian"
    """The kind of noise."""
    rank: int = 0
    """Its rank, if it is "lowrank"; else 0."""

    @classmethod
    def from_scores(
        cls,
        step: int,
        scores: np.ndarray,
        *,
        seed: int,
        noise: NoiseKind,
        sigma: float,
        alpha: float,
        shaping_kind: str,
        scale: str,
        antithetic: bool,
        weight_decay: float,
    ) -> Self:
        """The record that follows from scores r_j, [N]: c_j = α/N·w_j (scale "standard") or α/(Nσ)·w_j ("nes").

        Raises ValueError if fewer than two scores are finite.
        """
        utilities = shaping.utilities(np.asarray(scores, np.float64), shaping_kind)
        step_size = alpha / len(scores) / (sigma if scale == "nes" else 1.0)
        coefficients = (step_size * utilities).astype(np.float32)
        return cls(
            step=step,
            seed=seed,
            sigma=sigma,
            antithetic=antithetic,
            decay=float(np.float32(alpha * weight_decay)),
            coefficients=tuple(float(c) for c in coefficients),
            kind=noise.NAME,
            rank=noise.RANK,
        )

    @property
    def noise(self) -> NoiseKind:
        """Raises ValueError if this version does not know the kind."""
        return kind_of(self.kind, self.rank)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs that contribute, uint32 [P], and their coefficients, float32 [P], in member order.

        Member j's noise is that of pair j; with antithetic sampling, pair p's coefficient is c_2p - c_2p+1.
        Pairs of coefficient 0 are left out, which changes no bit of the sum.
        """
        coefficients = np.array(self.coefficients, np.float32)
        if self.antithetic:
            coefficients = coefficients[0::2] - coefficients[1::2]
        used = np.flatnonzero(coefficients)
        return used.astype(np.uint32), coefficients[used]
