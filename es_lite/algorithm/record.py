"""The record of a step: what is needed, besides θ_t and θ₀, to compute θ_{t+1} bit for bit."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from es_lite.algorithm.noise.kinds import NoiseKind, kind_of


@dataclass(frozen=True)
class Record:
    """Step t of a run: θ ← (θ - decay·θ - anchor·(θ - θ₀)) + Σ_j coefficients[j]·ε_j, in float32."""

    step: int
    seed: int
    """The key of the noise."""
    sigma: float
    """The σ of the perturbations; the update does not need it."""
    antithetic: bool
    decay: float
    """α·λ of the weight decay, a float32 value; 0 if it is off, which it is whenever `anchor` is not 0."""
    coefficients: tuple[float, ...]
    """c_j of each member, float32 values; 0 for a member whose score was not finite."""
    kind: str = "gaussian"
    """The kind of noise."""
    rank: int = 0
    """Its rank, if it is "lowrank"; else 0."""
    anchor: float = 0.0
    """α·λ of the decay towards θ₀, a float32 value; 0 if it is off."""

    @classmethod
    def from_utilities(
        cls,
        step: int,
        utilities: np.ndarray,
        *,
        seed: int,
        noise: NoiseKind,
        sigma: float,
        alpha: float,
        scale: str,
        antithetic: bool,
        weight_decay: float = 0.0,
        anchor: float = 0.0,
    ) -> Self:
        """The record that follows from utilities w_j, [N]: c_j = α/N·w_j (scale "standard") or α/(Nσ)·w_j ("nes")."""
        return cls(
            step=step,
            seed=seed,
            sigma=sigma,
            antithetic=antithetic,
            decay=float(np.float32(alpha * weight_decay)),
            coefficients=tuple(float(c) for c in coefficients(utilities, alpha, sigma, scale).astype(np.float32)),
            kind=noise.NAME,
            rank=noise.RANK,
            anchor=float(np.float32(alpha * anchor)),
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
        of_pairs = pair_coefficients(np.array(self.coefficients, np.float32), self.antithetic)
        used = np.flatnonzero(of_pairs)
        return used.astype(np.uint32), of_pairs[used]


def coefficients(utilities: np.ndarray, alpha: float, sigma: float, scale: str) -> np.ndarray:
    """c_j of utilities w_j, float64 [N]; see `Record.from_utilities`."""
    return alpha / len(utilities) / (sigma if scale == "nes" else 1.0) * utilities


def pair_coefficients(coefficients: np.ndarray, antithetic: bool) -> np.ndarray:
    """c_p of each pair, [P], from the members' c_j, [N]: c_2p - c_2p+1, or c_j itself without antithetic sampling."""
    return coefficients[0::2] - coefficients[1::2] if antithetic else coefficients
