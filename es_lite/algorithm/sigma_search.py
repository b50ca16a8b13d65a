"""σ found in the first steps of a run, then held: such that a perturbation costs a given share of the spread of the scores.

A perturbation of σ costs κσ² on average, and its scores spread by about σ|g| (`estimate`), so the share grows in proportion to
σ. A small share means that scores are nearly linear in the perturbation, as the update takes them to be; if it is too small, the
spread drowns in rounding.
"""

import math
from typing import NamedTuple

SHARE = 0.5
"""Of the scores' spread that a perturbation costs, on average."""

CLOSE = 1.5
"""A σ is kept if its share is within this factor of the aim; or if one that is too small and one that is too large are within
this factor of each other, the better of the two: what a step's scores say of the share is not more exact than that."""

STEPS = 8
"""The most steps that the search takes; it then keeps what came closest."""

FURTHEST = 4.0
"""The most by which σ changes from one step to the next."""

UNCERTAIN = 2.0
"""The factor by which σ rises after a share that would be right, but is no larger than its error."""


class _Tried(NamedTuple):
    sigma: float
    share: float


class SigmaSearch:
    """σ of each step: a function of the shares of the steps before it."""

    def __init__(self, start: float, least: float) -> None:
        """start: the first σ. least: a σ below which rounding removes perturbations."""
        self.sigma = max(start, least)
        self.found = False
        self.share = 0.0
        """That of the σ that was found."""
        self._least = least
        self._differed = False
        """Whether members ever scored differently."""
        self._tried: list[_Tried] = []

    def add(self, cost: float, error: float, spread: float) -> None:
        """What the scores of a step with `sigma` said; to be called after each step until σ is found.

        cost: the unperturbed model's score less the members' mean, with its standard error; spread: the std of the members'
        means over items.
        """
        self._differed |= spread > 0
        share = cost / spread if spread else 0.0
        off = _off(share)
        if off <= CLOSE and error >= cost:  # it may be chance: the larger σ, the better its cost is seen
            share, off = 0.0, UNCERTAIN
        last = _Tried(self.sigma, share)
        self._tried.append(last)
        small = max((tried for tried in self._tried if tried.share < SHARE), default=_Tried(0.0, 0.0))
        large = min(
            (tried for tried in self._tried if tried.share > SHARE and tried.sigma > small.sigma), default=_Tried(math.inf, 0.0)
        )
        if off <= CLOSE or (self.sigma == self._least and share > SHARE):
            self._keep(last)
        elif large.sigma <= CLOSE * small.sigma:
            self._keep(small, large)
        elif len(self._tried) == STEPS:
            self._keep(*self._tried)
        elif small.sigma and large.sigma < math.inf:
            self.sigma = math.sqrt(small.sigma * large.sigma)
        else:
            factor = min(off, FURTHEST)
            self.sigma = max(self._least, self.sigma * factor if share < SHARE else self.sigma / factor)

    def _keep(self, *tried: _Tried) -> None:
        """Ends the search with the best of these."""
        self.found = True
        self.sigma, self.share = min(tried, key=lambda one: _off(one.share))

    def words(self) -> str:
        """One line on the σ that was found, and why it is that."""
        if not self._differed:
            return f'es.sigma = "auto": {self.sigma:.3g}; with every σ that was tried, all members scored the same'
        if self.share <= 0:
            why = "what a perturbation costs could not be told from chance with any σ that was tried"
            return f'es.sigma = "auto": {self.sigma:.3g}; {why}; more fitness.samples would tell'
        why = f"a perturbation costs {self.share:.0%} of the spread of the scores (aimed at: {SHARE:.0%})"
        if self.sigma == self._least:
            why += "; a smaller one would be lost in bf16"
        return f'es.sigma = "auto": {self.sigma:.3g}, at which {why}; held from now on'


def _off(share: float) -> float:
    """The factor by which a share misses the aim."""
    return max(share / SHARE, SHARE / share) if share > 0 else math.inf
