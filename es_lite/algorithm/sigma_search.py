"""σ found in the first steps of a run, then held: such that a perturbation costs a given share of the spread of the scores.

A perturbation of σ costs κσ² on average, and its scores spread by about σ|g| (`estimate`), so the share grows in proportion to
σ. A small share means that scores are nearly linear in the perturbation, as the update takes them to be; if it is too small, the
spread drowns in rounding.
"""

SHARE = 0.5
"""Of the scores' spread that a perturbation costs, on average."""

CLOSE = 1.5
"""A σ is kept if its share is within this factor of the aim."""

STEPS = 6
"""The most steps that the search takes."""

FURTHEST = 8.0
"""The most by which σ changes from one step to the next."""


class SigmaSearch:
    """σ of each step: a function of the shares of the steps before it."""

    def __init__(self, start: float, least: float) -> None:
        """start: the first σ. least: a σ below which rounding removes perturbations."""
        self.sigma = max(start, least)
        self.found = False
        self.share: float | None = None
        """That of the last σ that was tried; None if its scores were all equal."""
        self._least = least
        self._tried = 0

    def add(self, cost: float, spread: float) -> None:
        """What the scores of a step with `sigma` said; to be called after each step until σ is found.

        cost: the unperturbed model's score less the members' mean; spread: the std of the members' means over items.
        """
        self._tried += 1
        self.share = cost / spread if spread else None
        factor = SHARE / max(self.share, SHARE / FURTHEST) if self.share is not None else FURTHEST
        factor = max(factor, 1 / FURTHEST)
        if 1 / CLOSE <= factor <= CLOSE or self._tried == STEPS or (factor < 1 and self.sigma == self._least):
            self.found = True
        else:
            self.sigma = max(self._least, self.sigma * factor)

    def words(self) -> str:
        """One line on the σ that was found, and why it is that."""
        if self.share is None:
            return f'es.sigma = "auto": {self.sigma:.3g}; with every σ that was tried, all members scored the same'
        why = f"a perturbation costs {self.share:.0%} of the spread of the scores (aimed at: {SHARE:.0%})"
        if self.sigma == self._least:
            why += "; a smaller one would be lost in bf16"
        return f'es.sigma = "auto": {self.sigma:.3g}, at which {why}; held from now on'
