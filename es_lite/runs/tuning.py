"""α and σ of each step: the recipe's, with their decays, or found from the scores ("auto")."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from es_lite.algorithm.estimate import Averages, Estimate
from es_lite.algorithm.schedule import decayed
from es_lite.algorithm.sigma_search import SigmaSearch
from es_lite.algorithm.step_size import StepSize
from es_lite.errors import UserError
from es_lite.recipe import Recipe
from es_lite.tables import ESTable

FIRST_SIGMA = 1e-3
"""Where the search for a σ that is "auto" begins: the papers'."""

FIRST_PROBES = 16
"""θ itself is scored in so many steps at first, and again when σ has been found; one in four of them has the items of the one
before it."""

PROBED_MEMBERS, LEAST_STEPS = 250, 4
"""Later it is scored in two steps in a row, the second of which has the items of the first, once for so many members, which takes
less than 1 % of the time; but at most once in so many steps, so that most have new items."""


def alpha_of(es: ESTable, step: int, estimate: dict[str, Any] | None) -> float | None:
    """α that a step was made with; None if nothing says so. estimate: what the journal has of it."""
    if estimate:
        return estimate["alpha"]
    return None if es.alpha == "auto" else decayed(float(es.alpha), es.alpha_decay, es.alpha_decay_every, step)


class Tuning:
    """Which α and σ the next step takes. What is found depends on the estimates of all steps so far, which the journal holds."""

    def __init__(self, recipe: Recipe, least_sigma: Callable[[], float], history: Sequence[tuple[float, dict[str, Any] | None]]):
        """least_sigma: a σ below which rounding removes perturbations; called only if σ is to be found. history: σ and the
        journal's estimate of each step so far.
        """
        self._es = es = recipe.es
        self.averages = Averages()
        """The estimates so far, smoothed."""
        self._step_size = StepSize(es.alpha_start, recipe.run.iterations) if es.alpha == "auto" else None
        self._search = SigmaSearch(FIRST_SIGMA, least_sigma()) if es.sigma == "auto" else None
        self._probe_every = max(LEAST_STEPS, math.ceil(PROBED_MEMBERS / es.population))
        self._alpha = 0.0
        self._sigma, self._since = 0.0, 0
        """If σ is searched for: that of the last step, and the first step that had it."""
        for step, (sigma, document) in enumerate(history):
            if document:
                found = Estimate(**_fields(document, step))
                self.alpha(step, sigma, found)
                self._alpha = document["alpha"]  # which differs if run.iterations does
        self._told = self._search is None or self._search.found

    @property
    def searching(self) -> bool:
        """Whether σ is "auto" and was not found yet."""
        return self._search is not None and not self._search.found

    def sigma(self, step: int) -> float:
        """σ of the next step."""
        es = self._es
        return self._search.sigma if self._search else decayed(float(es.sigma), es.sigma_decay, es.sigma_decay_every, step)

    def probes(self, step: int) -> bool:
        """Whether step `step` scores θ itself, which tells the curvature."""
        asked = self._step_size is not None and self._step_size.asks
        return asked or self.searching or self._age(step) < FIRST_PROBES or step % self._probe_every < 2

    def repeats(self, step: int) -> bool:
        """Whether step `step` has the items of the step before it, so that what that one gained is seen."""
        age = self._age(step)
        return self._step_size is not None and (step % self._probe_every == 1 or (age < FIRST_PROBES and age % 4 == 1))

    def _age(self, step: int) -> int:
        """How many steps before step `step` had its σ; with decays, all."""
        return 0 if self._renewed(self.sigma(step)) else step - self._since

    def _renewed(self, sigma: float) -> bool:
        return self._search is not None and sigma != self._sigma

    def alpha(self, step: int, sigma: float, found: Estimate) -> float:
        """α of a step. found: the estimate from its scores. To be called for every step, in order."""
        if self.repeats(step):
            self.averages.compare(found, self._alpha)
        if self._renewed(sigma):
            self.averages.forget_curvature()
            self._sigma, self._since = sigma, step
        self.averages.add(found)
        if self._search and not self._search.found:
            cost = 0.0 if found.curvature is None else found.curvature * sigma**2
            self._search.add(cost, found.curvature_error * sigma**2, math.sqrt(found.seen))
        if self._step_size:
            self._alpha = self._step_size.next(step, found, self.averages, sigma)
        else:
            es = self._es
            self._alpha = decayed(float(es.alpha), es.alpha_decay, es.alpha_decay_every, step)
        return self._alpha

    def document(self, found: Estimate, alpha: float) -> dict[str, Any] | None:
        """What the journal keeps of a step; None if nothing depends on it."""
        return asdict(found) | {"alpha": alpha} if self._step_size or self._search else None

    def gain_expected(self, alpha: float) -> float | None:
        """What a step of this α gains on items that it has not seen; None if the curvature is unknown."""
        cost = self.averages.cost
        return None if cost is None else self.averages.gain * alpha - cost * alpha**2

    def news(self) -> str | None:
        """One line on the σ that was found, once; else None."""
        if self._search is None or self._told or not self._search.found:
            return None
        self._told = True
        return self._search.words()


def _fields(document: dict[str, Any], step: int) -> dict[str, Any]:
    """Those of the estimate that the journal keeps. Raises UserError if another version of es_lite has other ones."""
    found = {name: value for name, value in document.items() if name != "alpha"}
    if found.keys() != {field.name for field in fields(Estimate)}:
        raise UserError(
            f"step {step + 1} of the run's journal: another version of es_lite kept other things there to find α and σ from; go "
            "on with that version, or start another run (run.dir)"
        )
    return found
