"""α found from the scores: a little more than the step that gains most, and less and less in the last part of a run.

The step that gains most now is α = gain/(2·cost) (`estimate`); twice as much would gain nothing. In the long run, a little more
than that gains more, since a part of what steps cost is taken back by later ones, while α carries a run along all other
directions (the short-horizon bias of stochastic meta-descent, arXiv 1803.02021). In the last part of a run, α falls in a straight
line to 0, which takes back what the random part of the steps still costs; not while steps gain as much as they ever did.
benchmarks/step-size.md has what else was tried.
"""

import math

from es_lite.algorithm.estimate import Averages, Estimate

MULTIPLE = 1.2
"""α is this multiple of the step that gains most now."""

LAST_PART = 0.25
"""Share of a run's steps over which α falls to 0, if steps gain nothing by then; the nearer they come to what they gained on
average so far, the shorter it is. A run that still gains has not been where the random parts of its steps add up.
"""

RISE, FALL = 2.0, 4.0
"""The most by which α rises above what it was when the curvature was last measured, and falls from one step to the next. At
first, larger steps soon lead to where the curvature is many times as large."""

CLOSE = 0.1
"""Up to this multiple of σ, the root mean square of a step's elements may rise faster: the scores are of what is further away."""

NEWS = 1.2
"""The curvature is measured again once α has risen by this."""

TRUST = 0.14
"""The root mean square of a step's elements is at most TRUST·√(pairs that the curvature was measured with, all in all) times σ,
since the more they are, the better it is known, and the less of a step is random."""

NEAR, OF_PAIR, FURTHEST = 1.0, 0.25, 2.0
"""It is also always at most OF_PAIR·√pairs times σ (then each pair moves it by OF_PAIR times σ: scores say nothing of what is
further away), but this bound is at least NEAR, and at most FURTHEST, times σ."""

KNOWN = 8
"""After so many measurements of the curvature, what steps are expected to gain is compared with what they were before."""


class StepSize:
    """α of each step, a function of the estimates of all steps up to it."""

    def __init__(self, start: float, iterations: int) -> None:
        """start: near which the first α is. iterations: steps of the whole run."""
        self._alpha = self._measured = start
        self._iterations = iterations
        self._gained, self._steps = 0.0, 0
        """The most that each step since the curvature has been known could gain, added up; and how many they are."""
        self._last_part: float | None = None
        """Share of the run over which α falls to 0, once that has begun."""

    @property
    def asks(self) -> bool:
        """Whether the curvature is to be measured in the next step."""
        return self._alpha > NEWS * self._measured

    def next(self, step: int, found: Estimate, averages: Averages, sigma: float) -> float:
        """α of step `step`; to be called for every step in order. found: its estimate; averages: with that."""
        left = max(0.0, 1 - step / max(1, self._iterations))
        if found.curvature is not None:
            self._measured = self._alpha
        if self._last_part is None:
            self._alpha = self._bounded(averages, sigma, found)
            if left <= LAST_PART * (1 - self._still_gained(averages)):
                self._last_part = left
        if self._last_part is None:
            return self._alpha
        return self._alpha * left / self._last_part if left else 0.0

    def _still_gained(self, averages: Averages) -> float:
        """What the step that gains most gains now, as a share of the average so far; 0 if that is unknown. To be called once a
        step.
        """
        cost = averages.cost
        if cost is None or cost <= 0 or averages.measurements < KNOWN:
            return 0.0
        now = max(0.0, averages.gain) ** 2 / (4 * cost)
        self._gained, self._steps = self._gained + now, self._steps + 1
        return min(1.0, now * self._steps / self._gained) if self._gained else 0.0

    def _bounded(self, averages: Averages, sigma: float, found: Estimate) -> float:
        cost, gain = averages.cost, max(0.0, averages.gain)
        highest, furthest = RISE * self._measured, math.inf
        if found.squares:
            as_sigma = sigma / found.squares**0.5  # α of a step whose elements have the root mean square σ
            trusted = TRUST * (found.pairs * max(1, averages.measurements)) ** 0.5
            bound = min(FURTHEST, max(NEAR, OF_PAIR * found.pairs**0.5))
            highest, furthest = max(highest, CLOSE * as_sigma), min(bound, trusted) * as_sigma
        if cost is None or cost <= 0:  # nothing is known that speaks against a larger step
            wanted = highest if gain else min(self._alpha, highest)
        else:
            wanted = max(min(MULTIPLE * gain / (2 * cost), highest), self._alpha / FALL)
        return min(wanted, furthest)
