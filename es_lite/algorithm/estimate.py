"""What a step's scores say of it: what it gains on items that it has not seen, what it costs, how much of the scores is signal.

With g the gradient of the score at θ and H its second derivatives, antithetic pair p scores r_b(θ) ± σ g_b·ε_p + ½σ² ε_pᵀHε_p on
item b, to second order. So

    d_pb = (r_2p,b - r_2p+1,b)/2 = σ g_b·ε_p
    κ    = (r(θ) - mean of the members' scores)/σ² = -½ tr H

and a step θ + Σ_p c_p ε_p gains Σ_p c_p g·ε_p, to first order, and its random part costs κ Σ_p c_p². The gain must not be
measured on the items that the coefficients came from, which they also fit by chance. So a few items at a time are left out
(cross-validation): what they say of the step that the others make is unbiased, whatever the shaping, and however unlike items
are. A step costs more than its random part does, since the gradient tends to lie where the curvature is greatest: if the step
after it has the same items, what θ really gained on them is short of Σ_p c_p d_p/σ, its gain there to first order, by its whole
cost.

Without antithetic sampling, d is each member's score less the population's mean. Where es.groups makes α and σ unlike, all this
is of a step that follows the perturbations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

FOLDS = 8
"""Items are left out in so many parts in turn, or one by one if they are fewer."""


@dataclass(frozen=True)
class Estimate:
    """What one step's scores say; all 0 if they say nothing: fewer than two pairs or items, or equal scores."""

    slope: float = 0.0
    """Σ_p c_p d_p/σ at α = 1: what a step gains for each unit of α on its own items."""
    gain: float = 0.0
    """The same on items that were left out of the step."""
    seen: float = 0.0
    """The mean of d_p² over pairs, where d_p is the mean over items."""
    agreed: float = 0.0
    """The mean product of d_pb of different items: an unbiased estimate of what `seen` would be on all items there are."""
    scatter: float = 0.0
    """The mean of d_pb² over pairs and items: the scale of the other two."""
    squares: float = 0.0
    """Σ_p c_p² at α = 1."""
    pairs: int = 0
    """How many pairs said so."""
    curvature: float | None = None
    """κ; None if θ itself was not scored in this step."""
    curvature_error: float = 0.0
    """The standard error of κ, from how it varies between pairs and between items."""
    centre: float | None = None
    """θ's own score, if it was."""


def estimate(
    scores: np.ndarray,
    unit: Callable[[np.ndarray], np.ndarray],
    sigma: float,
    antithetic: bool,
    centre: np.ndarray | None = None,
) -> Estimate:
    """scores: float64 [N, items], NaN where an item does not count. unit: gives c_p at α = 1, float64 [pairs], of the scores of
    some of the items. centre: θ's own scores, float64 [items], if it was scored.

    Pairs of members without a finite score are left out, and so are items that do not count for all others.
    """
    members, kept, items = _finite(scores, antithetic)
    found = Estimate()
    if centre is not None and members.size and np.isfinite(centre[items]).all():
        lost = centre[items] - members.mean(axis=1)
        own, error = float(centre[items].mean()), _error(lost)
        found = Estimate(curvature=float(lost.mean()) / sigma**2, curvature_error=error / sigma**2, centre=own)
    d = (members[:, 0] - members[:, 1]) / 2 if antithetic else members[:, 0] - members[:, 0].mean(axis=0)
    pairs, count = d.shape
    of_pairs = d.mean(axis=1) if count else np.zeros(pairs)
    if pairs < 2 or count < 2 or not of_pairs.any():
        return found
    seen, scatter = float(np.mean(of_pairs**2)), float(np.mean(d**2))
    coefficients = unit(scores)
    return replace(
        found,
        slope=float(np.sum(coefficients[kept] * of_pairs)) / sigma,
        gain=_gain(scores[:, items], unit, d, kept) / sigma,
        seen=seen,
        agreed=(count * seen - scatter) / (count - 1),
        scatter=scatter,
        squares=float(np.sum(coefficients**2)),
        pairs=pairs,
    )


def _gain(scores: np.ndarray, unit: Callable[[np.ndarray], np.ndarray], d: np.ndarray, kept: np.ndarray) -> float:
    """Σ_p c_p d_pb at α = 1, the mean over items b, where c_p is of the scores, [N, items], of items in other parts. d: [pairs,
    items], of those pairs that are `kept`.
    """
    part = np.arange(d.shape[1]) % FOLDS
    parts = [part == number for number in range(min(FOLDS, part.size))]
    return float(sum(np.sum(unit(scores[:, ~left_out])[kept] @ d[:, left_out]) for left_out in parts)) / part.size


def _error(values: np.ndarray) -> float:
    """The standard error of the mean of values [pairs, items], where pairs and items were both drawn independently."""
    of_pairs, of_items = values.mean(axis=1), values.mean(axis=0)
    pairs, items = max(1, of_pairs.size - 1), max(1, of_items.size - 1)
    rest = values - of_pairs[:, None] - of_items + values.mean()
    variance = of_pairs.var() / pairs + of_items.var() / items - (rest**2).mean() / (pairs * items)  # which both others have
    return max(0.0, float(variance)) ** 0.5


def _finite(scores: np.ndarray, antithetic: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scores that count, [pairs, members of a pair, items], and of which pairs, bool [pairs], and items, bool [items]."""
    members = scores.reshape(-1, 2 if antithetic else 1, scores.shape[1])
    finite = np.isfinite(members)
    kept = finite.any(axis=2).all(axis=1)
    items = finite[kept].all(axis=(0, 1)) if kept.any() else np.zeros(scores.shape[1], bool)
    return members[kept][:, :, items], kept, items


def tied(scores: np.ndarray) -> float:
    """Share of the members, float64 [N], whose score equals another's."""
    _, counts = np.unique(scores[np.isfinite(scores)], return_counts=True)
    return float(counts[counts > 1].sum()) / scores.size


def _variance(share: float, pairs: float) -> float:
    """Of what the pairs of one step say of the share of signal, where it is this."""
    return 2 / pairs * (1 - min(1.0, max(0.0, share))) ** 2


class _Means(NamedTuple):
    """What is averaged of each step's estimate."""

    slope: float = 0.0
    squares: float = 0.0
    pairs: float = 0.0
    root_of_seen: float = 0.0
    """√seen."""
    seen: float = 0.0
    """seen/scatter, and likewise agreed/scatter."""
    agreed: float = 0.0
    gain: float = 0.0


class Averages:
    """Estimates, smoothed over as many steps as the signal asks for: few where it is strong, so that they follow what changes; at
    most, all so far, then the last 10 or, if that is more, the last quarter.

    The longer a run, the more slowly it changes, and the smaller is the share of signal, which takes more steps to see. The
    curvature, which is measured less often, is filtered (Kalman): a measurement counts by the errors of all so far, since items
    of little curvature have small errors too, and by how much the curvature may have changed since the one before. How many
    times its random part a step costs is smoothed over `COSTS` steps whose whole cost is known.
    """

    FEWEST, LEAST, SHARE, COSTS = 4, 10, 0.25, 8
    WITHIN = 0.1
    """The error of the signal, as a share of it, at which no more steps are averaged over."""
    CHANGE, PACE = 0.4, 2.0
    """The share by which the curvature changes between two measurements is PACE times the share of all steps so far that lie
    between them, and at most CHANGE: what changes fast at first changes ever more slowly.
    """
    EXPECTED_SIGNAL, EXPECTED_WITHIN = 0.2, 0.15
    """The mean and the deviation of what a signal is before anything is known of it."""
    ROUNDING = 0.1
    """What costs add up to is told apart from rounding if it is more than this share of the spread of the scores."""

    def __init__(self) -> None:
        self.curvature: float | None = None
        """κ; None if it was never measured."""
        self._variance = 0.0
        """Of the curvature."""
        self._errors = np.zeros(2)
        """Number of measurements of the curvature, and the sum of their squared errors."""
        self._steps = self._measured = 0
        """So far; and when the curvature was measured."""
        self._window = 0.0
        self._means = _Means()
        self._costs = np.zeros(3)
        """Of the steps whose whole cost is known: that, the cost of their random part, and what of their gain to first order is
        only that of their own items.
        """
        self._last = Estimate()

    def add(self, of_step: Estimate) -> None:
        most = max(self.LEAST, self.SHARE * self._steps)
        weight = 1 / min(self._steps + 1, max(self.FEWEST, min(most, self._asked())))
        self._steps += 1
        scale = of_step.scatter or 1.0
        values = _Means(
            of_step.slope,
            of_step.squares,
            of_step.pairs,
            of_step.seen**0.5,
            of_step.seen / scale,
            of_step.agreed / scale,
            of_step.gain,
        )
        self._window = 1 / weight
        self._means = _Means(*(mean + weight * (value - mean) for mean, value in zip(self._means, values, strict=True)))
        if of_step.curvature is not None:
            self._measure(of_step.curvature, of_step.curvature_error**2)
        self._last = of_step

    def _asked(self) -> float:
        """1 over the weight of the newest step at which the signal is known within `WITHIN`: half the number of steps that,
        counted alike, would say as much.
        """
        signal = self.signal or 0.0
        if signal <= 0:
            return math.inf
        return _variance(signal, max(1.0, self._means.pairs)) / 2 / (self.WITHIN * signal) ** 2

    def _measure(self, curvature: float, variance: float) -> None:
        elapsed, self._measured = self._steps - self._measured, self._steps
        self._errors += (1, variance)
        variance = self._errors[1] / self._errors[0]
        if self.curvature is None:
            self.curvature, self._variance = curvature, variance
            return
        change = min(self.CHANGE, self.PACE * elapsed / self._steps)
        self._variance += (change * (abs(self.curvature) + abs(curvature)) / 2) ** 2
        share = self._variance / (self._variance + variance) if variance else 1.0
        self.curvature += share * (curvature - self.curvature)
        self._variance *= 1 - share

    def forget_curvature(self) -> None:
        """To be called when σ has changed: what a σ that was too small said of the curvature may have been rounding."""
        self.curvature, self._variance = None, 0.0
        self._errors = np.zeros(2)
        self._costs = np.zeros(3)

    def compare(self, repeated: Estimate, alpha: float) -> None:
        """To be called before `add` for a step with the items of the step before it, which had this α."""
        last = self._last
        if repeated.centre is None or last.centre is None or self.curvature is None:
            return
        whole = last.slope * alpha - (repeated.centre - last.centre)
        random = self.curvature * last.squares * alpha**2
        own = max(0.0, self.slope - self.gain) * alpha
        self._costs += np.array([whole, random, own]) - self._costs / self.COSTS

    @property
    def measurements(self) -> int:
        """Of the curvature, with the present σ."""
        return int(self._errors[0])

    @property
    def signal(self) -> float | None:
        """Share of the variance of members' scores that items agree on. Unbiased, so it may be below 0; None if it is unknown."""
        return self._means.agreed / self._means.seen if self._means.seen else None

    @property
    def slope(self) -> float:
        """What a step gains for each unit of α on its own items, to first order."""
        return self._means.slope

    @property
    def gain(self) -> float:
        """What a step gains for each unit of α on items that it has not seen, to first order.

        What few pairs say of the share of a step's gain that is real is uncertain, the more so the smaller it is: so it is drawn
        towards what is to be expected.
        """
        if not self.slope:
            return 0.0
        found = self._means.gain / self.slope
        prior = _variance(found, self._means.pairs) / self.EXPECTED_WITHIN**2  # steps that would say as much
        return self.slope * (self._window * found + prior * self.EXPECTED_SIGNAL) / (self._window + prior)

    @property
    def excess(self) -> float:
        """How many times the cost of its random part a step costs; 1 if that is unknown.

        On its own items, it costs more than on others: what only they gain is soon gained, and has the noise of their scores in
        it. So costs are compared beside that gain.
        """
        whole, random, own = self._costs.tolist()
        doubtful = own + self.ROUNDING * self._means.root_of_seen
        return max(1.0, (whole + doubtful) / (random + doubtful)) if random + doubtful > 0 else 1.0

    @property
    def cost(self) -> float | None:
        """What a step costs for each unit of α²; None if the curvature is unknown."""
        return None if self.curvature is None else self._means.squares * self.curvature * self.excess
