"""How far a run has moved from θ₀, from its records alone."""

import math
from collections.abc import Mapping

from es_lite.algorithm.record import Record


class Drift:
    """The root mean square of θ_t - θ₀ over all parameters, as its records have moved it.

    A step adds Σ_p c_p ε_p, whose elements have the mean square Σ_p c_p². Steps of independent noise are nearly orthogonal in so
    many dimensions, so mean squares add up; a decay δ (a record's `decay` or `anchor`) shrinks what there is by (1 - δ)²:

        m_{t+1} = (1 - δ_t)² m_t + Σ_p c_p²        drift = √m

    Where steps have a direction in common, they add up faster, so the true distance is a little larger. With a decay towards 0,
    the distance is that from θ₀ as the decay alone would have shrunk it.
    """

    def __init__(self, shares: Mapping[tuple[float, float], float]) -> None:
        """shares: of all parameters, by the factors of their group for coefficients and for decay; they add up to 1."""
        self._shares = shares
        self._means = dict.fromkeys(shares, 0.0)

    def add(self, record: Record) -> None:
        _, coefficients = record.pairs()
        squares = float((coefficients.astype(float) ** 2).sum())
        for coefficient_factor, decay_factor in self._means:
            kept = 1 - (record.decay + record.anchor) * decay_factor
            mean = self._means[coefficient_factor, decay_factor]
            self._means[coefficient_factor, decay_factor] = kept**2 * mean + coefficient_factor**2 * squares

    @property
    def rms(self) -> float:
        return math.sqrt(sum(share * self._means[factors] for factors, share in self._shares.items()))
