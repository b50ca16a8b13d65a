"""σ found in the first steps of a run, then held: such that a perturbation costs a given share of the spread of the scores.

A perturbation of σ costs κσ² on average, and its scores spread by about σ|g| (`estimate`), so the share grows in proportion to
σ. A small share means that scores are nearly linear in the perturbation, as the update takes them to be; if it is too small, the
spread drowns in rounding, and with rewards, members write the same.

What one step says of the share has an error that is often as large as the share itself. So what all tries say of a σ is
averaged, in proportion to σ, and each counts by its error and by how far off its own σ was. While that is uncertain, the lower
end of what may be true counts: the larger σ, the better its cost is seen among the differences of items.
"""

import math
from typing import NamedTuple

SHARE = 0.5
"""Of the scores' spread that a perturbation costs, on average."""

CLOSE = 1.5
"""A σ is kept if its share is within this factor of the aim."""

CERTAIN = 0.5
"""But not before the error of the share is less than this part of the aim."""

STEPS = 8
"""The most steps that the search takes; it then keeps what came closest."""

FURTHEST, UNCERTAIN = 4.0, 2.0
"""The most by which σ changes from one step to the next; and while the share is uncertain."""

EXACT = 0.05
"""The least error of a share, as a part of the aim: σ moves while θ does too."""


class _Try(NamedTuple):
    sigma: float
    share: float
    error: float
    """Of the share; infinite if all members scored the same."""


class SigmaSearch:
    """σ of each step: a function of the shares of the steps before it."""

    def __init__(self, start: float, least: float) -> None:
        """start: the first σ. least: a σ below which rounding removes perturbations."""
        self.sigma = max(start, least)
        self.found = False
        self.share = 0.0
        """That of the σ that was found."""
        self._least = least
        self._tried: list[_Try] = []

    def add(self, cost: float, error: float, spread: float) -> None:
        """What the scores of a step with `sigma` said; to be called after each step until σ is found.

        cost: the unperturbed model's score less the members' mean, with its standard error; spread: the std of the members'
        means over items.
        """
        self._tried.append(_Try(self.sigma, cost / spread, error / spread) if spread else _Try(self.sigma, 0.0, math.inf))
        share, error = self._share(self.sigma)
        certain = error <= CERTAIN * SHARE
        if certain and (_off(share) <= CLOSE or (self.sigma == self._least and share > SHARE)):
            self.found, self.share = True, share
        elif len(self._tried) == STEPS:
            scored = [tried.sigma for tried in self._tried if tried.error < math.inf]
            self.sigma = min(scored, key=lambda sigma: _off(self._share(sigma)[0]), default=self._tried[0].sigma)
            self.found = True
            self.share, _ = self._share(self.sigma)
        elif certain or error == math.inf:
            self.sigma = max(self._least, self._next(share, FURTHEST))
        else:
            self.sigma = max(self._least, self._next(share - error, UNCERTAIN))

    def _share(self, sigma: float) -> tuple[float, float]:
        """The share at this σ, and its error, by all that was tried."""
        weights = total = 0.0
        for tried in self._tried:
            factor = sigma / tried.sigma
            weight = 1 / ((factor * tried.error) ** 2 + SHARE**2 * (math.log(factor) ** 2 + EXACT**2))
            weights, total = weights + weight, total + weight * factor * tried.share
        return (total / weights, weights**-0.5) if weights else (0.0, math.inf)

    def _next(self, share: float, furthest: float) -> float:
        factor = min(_off(share), furthest)
        wanted = self.sigma * factor if share < SHARE else self.sigma / factor
        small = max((one.sigma for one in self._tried if one.error == math.inf or one.share + one.error < SHARE), default=0.0)
        large = min((one.sigma for one in self._tried if one.share - one.error > SHARE and one.sigma > small), default=math.inf)
        if small < wanted < large:
            return wanted
        return math.sqrt(small * large) if small and large < math.inf else wanted

    def words(self) -> str:
        """One line on the σ that was found, and why it is that."""
        if all(tried.error == math.inf for tried in self._tried):
            return f'es.sigma = "auto": {self.sigma:.3g}; with every σ that was tried, all members scored the same'
        why = f"a perturbation costs {self.share:.0%} of the spread of the scores (aimed at: {SHARE:.0%})"
        if self.sigma == self._least:
            why += "; a smaller one would be lost in bf16"
        return f'es.sigma = "auto": {self.sigma:.3g}, at which {why}; held from now on'


def _off(share: float) -> float:
    """The factor by which a share misses the aim."""
    return max(share / SHARE, SHARE / share) if share > 0 else math.inf
