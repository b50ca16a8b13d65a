"""A run under way: one step of the algorithm, and an evaluation.

`Run.step` is the papers' algorithm (EA4LLM, algorithm 1; Evolution Strategies at Scale, algorithm 2). The journal gets a step's
record before any weight changes; the engine then brings the weights to the journal's end, whatever step they were left at.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from es_lite.algorithm import shaping
from es_lite.algorithm.drift import Drift
from es_lite.algorithm.estimate import Estimate, estimate, tied
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.record import Record, coefficients, pair_coefficients
from es_lite.engine.base import Engine, Execution
from es_lite.errors import RunError
from es_lite.fitness import diagnosis
from es_lite.fitness.base import Dataset, Fitness, Graded, Items
from es_lite.quantities import GIB
from es_lite.recipe import Recipe
from es_lite.runs.console import Console
from es_lite.runs.journal import Journal
from es_lite.runs.pace import Pace
from es_lite.runs.tuning import Tuning
from es_lite.scoring.perturbation import Perturbation
from es_lite.weights.store import Store

TIED_STEPS, TIED_REWARD_STEPS = 5, 20
"""The run stops if all members score the same in so many steps in a row; rewards may be rare at first."""

ADVISED_AFTER = 20
"""Steps of a command after which there is advice, if any, on how to spend a step's time."""


@dataclass
class Run:
    """A run under way: a step of the algorithm, and what it needs."""

    recipe: Recipe
    fitness: Fitness
    dataset: Dataset
    engine: Engine
    execution: Execution
    noise: NoiseKind
    journal: Journal
    store: Store
    console: Console
    pace: Pace
    tuning: Tuning
    drift: Drift
    examined_sigma: float | None = None
    """The last σ that was examined."""
    tied_steps: int = 0
    """Steps in a row in which all members scored the same."""
    shares_tied: list[float] = field(default_factory=list)
    """The share of tied members in each step of this command."""

    @property
    def theta(self) -> Perturbation:
        """The unperturbed model, computed in the same way as the perturbed ones."""
        return Perturbation(kind=self.noise.NAME, rank=self.noise.RANK)

    @property
    def done(self) -> int:
        """Steps that the journal holds."""
        return len(self.journal.records)

    def begin(self) -> None:
        """Brings the weights to the journal's end, and verifies all layers' files."""
        self.console.say("advancing the weights to the end of the journal")
        with self.console.progress("weights") as progress:
            self.engine.advance(self.journal.records, progress)
            self.engine.check(progress)

    def step(self) -> dict[str, float | None]:
        """One iteration. Returns its metrics."""
        es, seed, t = self.recipe.es, self.recipe.run.seed, self.done
        sigma = self.tuning.sigma(t)
        before, started = self.engine.traffic(), time.perf_counter()

        # Score the population on the step's items; now and then, and if σ is new, score θ itself too.
        items = self.dataset.draw(t - 1 if self.tuning.repeats(t) else t)
        signs = (1, -1) if es.antithetic else (1,)
        pairs = range(es.population // len(signs))
        perturbations = [Perturbation(seed, t, pair, sigma, signs, self.noise.NAME, self.noise.RANK) for pair in pairs]
        scheduled = self.tuning.probes(t)
        probed = scheduled or sigma != self.examined_sigma
        answers = self._score([*perturbations, self.theta] if probed else perturbations, items)
        answered = time.perf_counter()
        graded = self._grade(answers[: es.population], items)
        scores = graded.means()
        centre = self._grade(answers[es.population :], items) if probed else None
        scored = time.perf_counter()
        if centre and sigma != self.examined_sigma and not self.tuning.searching:
            self._examine(sigma, float(centre.means()[0]), scores)
        self._count_tied(scores)

        # Decide: scores to utilities to α and coefficients. Once the journal has them, the step is done, whatever happens.
        finite = np.isfinite(scores)
        if not finite.all():
            self.console.warn(f"step {t + 1}: {np.sum(~finite)} of {scores.size} scores are not finite; they are ignored")
        try:
            utilities = self._utilities(graded.scores)
        except ValueError as error:
            raise RunError(f"step {t + 1}: {error}; nothing has changed. es.sigma or es.alpha may be too large") from None
        # What is found may depend on the steps alone, not on where a run was resumed and σ was new to it.
        found = self._estimate(graded.scores, sigma, centre if scheduled else None)
        alpha = self.tuning.alpha(t, sigma, found)
        if news := self.tuning.news():
            self.console.say(news)
        record = Record.from_utilities(
            t,
            utilities,
            seed=seed,
            noise=self.noise,
            sigma=sigma,
            alpha=alpha,
            scale=es.scale,
            antithetic=es.antithetic,
            weight_decay=es.weight_decay,
            anchor=es.anchor,
        )
        finite_scores = [score if np.isfinite(score) else None for score in scores.tolist()]
        self.journal.append(record, finite_scores, self.tuning.document(found, alpha))

        # Move θ.
        with self.console.progress(f"step {t + 1}: update") as progress:
            self.engine.advance([record], progress)
        updated = time.perf_counter()
        self.drift.add(record)
        share_tied = tied(scores)
        self._advise(share_tied)

        if self.pace.stepped(updated - started):
            self._say_pace()
        after, tokens = self.engine.traffic(), graded.figures.get("generated_tokens", es.population * items.scored_tokens)
        return {
            **graded.described,
            "tokens": tokens,
            "tokens_per_second": tokens / (updated - started),
            **graded.figures,
            **({"generation_seconds": answered - started} if self.fitness.generates else {}),
            "step_seconds": updated - started,
            "score_seconds": scored - started,
            "update_seconds": updated - scored,
            **self.memory(),
            "read_gib": max(0, after[0] - before[0]) / GIB,
            "written_gib": max(0, after[1] - before[1]) / GIB,
            "workers": self.engine.workers,
            **({"network_kib": self.engine.network() / 1024} if self.recipe.workers.engine == "ray" else {}),
            "signal": self.tuning.averages.signal,
            "tied": share_tied,
            "gain_expected": self.tuning.gain_expected(alpha),
            "drift_rms": self.drift.rms,
        }

    def evaluation(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of θ on the held-out items, and samples of what it wrote; see `Milestones`."""
        graded = self.evaluate()
        score = float(graded.means()[0])
        if not np.isfinite(score):
            raise RunError(
                f"step {self.done}: the model's score on the held-out items is not finite: "
                "the model is broken, or it cannot be computed in this type; nothing more has changed"
            )
        figures = {"eval_score": score}
        figures |= {f"eval_{name}": value for name, value in graded.described.items()}
        return figures, [asdict(sample) for sample in graded.samples]

    def evaluate(self) -> Graded:
        """θ on the held-out items; it does not depend on the number of workers."""
        items = self.dataset.held_out()
        with self.console.progress("evaluation") as progress:
            answers = self.engine.score([self.theta], items, progress)
        return self._grade(answers, items)

    def memory(self) -> dict[str, float]:
        """Metrics of the memory in use."""
        now, peak = self.engine.memory()
        return {"pss_gib": now / GIB, "peak_pss_gib": peak / GIB}

    def _utilities(self, scores: np.ndarray) -> np.ndarray:
        """Utilities, float64 [N], of scores [N, items]. Raises ValueError if fewer than two are finite."""
        es = self.recipe.es
        compared, spread = shaping.item_baseline(scores) if es.baseline == "item" else (shaping.means(scores), None)
        return shaping.utilities(compared, es.shaping, spread)

    def _estimate(self, scores: np.ndarray, sigma: float, centre: Graded | None) -> Estimate:
        es = self.recipe.es

        def unit(scores: np.ndarray) -> np.ndarray:
            return pair_coefficients(coefficients(self._utilities(scores), 1.0, sigma, es.scale), es.antithetic)

        return estimate(scores, unit, sigma, es.antithetic, None if centre is None else centre.scores[0])

    def _grade(self, answers: np.ndarray, items: Items) -> Graded:
        graded = self.dataset.grade(answers, items, self.done)
        for warning in graded.warnings:
            self.console.warn(warning)
        return graded

    def _score(self, perturbations: Sequence[Perturbation], items: Items) -> np.ndarray:
        """The engine's answers, [members, items]; corrects the expected duration in the first step."""
        began = time.perf_counter()
        members = sum(perturbation.members for perturbation in perturbations)
        what = f"step {self.done + 1}/{self.recipe.run.iterations}"
        with self.console.progress(what, members, self.pace.step_seconds) as show:

            def progress(share: float) -> None:
                if self.pace.scored(share, time.perf_counter() - began):
                    self._say_pace()
                show(share)

            return self.engine.score(perturbations, items, progress)

    def _say_pace(self) -> None:
        remaining = self.recipe.run.iterations - self.done
        if remaining:
            self.console.say(f"as measured now, {self.pace.outlook(remaining)}")

    def _count_tied(self, scores: np.ndarray) -> None:
        """Warns if all members score the same. Raises RunError if they have for too many steps."""
        finite = scores[np.isfinite(scores)]
        if finite.size < 2 or np.ptp(finite) > 0:
            self.tied_steps = 0
            return
        self.tied_steps += 1
        advice = diagnosis.tied_advice(self.fitness, float(finite[0]))
        most = TIED_REWARD_STEPS if self.fitness.generates else TIED_STEPS
        if self.tied_steps == most:
            raise RunError(f"step {self.done + 1}, the last of {most} in a row: {advice}")
        if self.tied_steps == 1:
            self.console.warn(f"step {self.done + 1}: {advice}")

    def _advise(self, share_tied: float) -> None:
        """Says, once, if the same time is better spent on more items or on more members."""
        self.shares_tied.append(share_tied)
        if len(self.shares_tied) == ADVISED_AFTER:
            mean_tied, samples = float(np.mean(self.shares_tied)), self.recipe.fitness.samples
            advice = diagnosis.budget_advice(self.tuning.averages.signal, mean_tied, samples, self.recipe.es.population)
            if advice:
                self.console.say(f"advice for another run: {advice}")

    def _examine(self, sigma: float, centre: float, scores: np.ndarray) -> None:
        """Warns if σ is too small or too large to be of use; centre: θ's own score."""
        self.examined_sigma = sigma
        advice = [diagnosis.collapse_advice(self.fitness, centre, scores, sigma)]
        if self.execution.compute == "bf16":
            moved = diagnosis.share_moved(self.store.files, self.noise, sigma, self.recipe.run.seed)
            advice.append(diagnosis.rounding_advice(moved, sigma))
        for text in filter(None, advice):
            self.console.warn(text)
