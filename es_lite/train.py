"""The command `train`: trains a language model by evolution strategies, as a recipe says.

    python -m es_lite.train RECIPE [--set table.key=value ...] [--resume [--rebuild]]

`train` is a run from top to bottom, `Run.step` the papers' algorithm (EA4LLM, algorithm 1; Evolution Strategies at Scale,
algorithm 2). The journal gets a step's record before any weight changes; the engine then brings the weights to the journal's end,
whatever step they were left at.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers.utils import logging as transformers_logging

from es_lite import system
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.record import Record
from es_lite.engine.base import Engine, Execution
from es_lite.engine.local import LocalEngine
from es_lite.errors import DamagedFile, RunError, UserError
from es_lite.fitness import diagnosis
from es_lite.fitness.base import Dataset, Fitness, Items
from es_lite.fitness.kinds import fitness_of
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.planning.rates import estimate
from es_lite.quantities import GIB
from es_lite.recipe import Recipe
from es_lite.runs.console import Console
from es_lite.runs.directory import RunDirectory
from es_lite.runs.journal import Journal
from es_lite.runs.metrics import Metrics
from es_lite.runs.milestones import Milestones
from es_lite.runs.pace import Pace
from es_lite.scoring.perturbation import Perturbation
from es_lite.weights.store import Store


def train(recipe: Recipe, resume: bool = False, rebuild: bool = False) -> None:
    """Runs `recipe` to its last step, or continues the run in its directory.

    rebuild: rebuild damaged layer files from θ₀ and the journal instead of ending the run.

    Raises UserError for what the user must change, RunError if the run cannot continue; after either, the run
    directory can be resumed.
    """
    began = time.monotonic()
    # What is to be trained, and whether it fits, before anything is loaded or written.
    origin, fitness = Origin.of_recipe(recipe), fitness_of(recipe.fitness.kind)
    model, layout = origin.skeleton()
    plan = Plan.of(recipe, fitness, model.config, layout)
    if problem := plan.shortfall():
        raise UserError(f"{problem}\n\n{plan.parts()}")

    with RunDirectory(recipe, resume) as run:
        print(f"run directory {run.path}: reading the text and the model", flush=True)
        # The items, θ₀, the journal, and the step of each layer.
        dataset = fitness.open(recipe, model.config, run.path)
        theta_0 = origin.source(model, layout, Threads(1))
        header = {"data": dataset.fingerprint(), "compute": plan.execution.compute, "versions": system.versions()}
        if run.journal.exists():
            journal = Journal.open(run.journal)
            origin.check(journal.header, journal.path, layout, theta_0)
            check_data(journal, header, recipe)
            journal.check_noise(plan.noise)
        else:
            if resume:
                print(f"nothing to resume in {run.path}: starting at step 0", flush=True)
            journal = Journal.create(run.journal, origin.header(layout, theta_0) | header)
        store = Store(run.store, layout, origin.storage)
        if rebuild:
            for error in store.remove_damaged():
                print(f"removed, to be made again from θ₀ and the journal: {error}", flush=True)
        store.check_steps(len(journal.records), journal.path)
        run.keep(recipe)

        expected = estimate(plan.work, plan.execution, plan.noise, run.path)
        remaining = max(0, recipe.run.iterations - len(journal.records))
        print(f"{plan.summary(expected, remaining)}\n\n{plan.details(expected)}\n", flush=True)
        pace = Pace(expected.score_seconds, expected.update_seconds, recipe.run.minutes, began)
        with (
            Console(recipe.run.iterations, len(journal.records)) as console,
            LocalEngine(recipe, origin, layout, store, plan.execution, run.lock, console.warn) as engine,
        ):
            under_way = Run(recipe, fitness, dataset, engine, plan.execution, plan.noise, journal, store, console, pace)
            milestones = Milestones(
                recipe=recipe,
                run=run,
                journal=journal,
                metrics=Metrics(run.metrics, recipe.log.tensorboard),
                console=console,
                model=model,
                layout=layout,
                store=store,
                tokenizer=dataset.tokenizer,
                threads=plan.execution.workers * plan.execution.threads,
                evaluate=under_way.evaluate,
                reference=dataset.reference,
                memory=under_way.memory,
                unit=f"{fitness.measures}, {fitness.unit}",
            )
            under_way.begin()
            milestones.catch_up()
            while under_way.done < recipe.run.iterations and not console.stopping:
                milestones.after_step(under_way.step(milestones.sigma(under_way.done), milestones.alpha(under_way.done)))
                if engine.shortage and under_way.done < recipe.run.iterations:
                    raise RunError(f"stopped after step {under_way.done}, {engine.shortage}")
                if pace.exhausted and under_way.done < recipe.run.iterations:
                    console.say(f"the next step would exceed run.minutes = {recipe.run.minutes:g}")
                    console.stopping = True
            milestones.checkpoint_if_due(last=True)
            more = under_way.done < recipe.run.iterations
            resumable = f"; add --resume to continue from step {under_way.done}" if more else ""
            console.say(f"{under_way.done} of {recipe.run.iterations} steps done{resumable}")


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
    examined_sigma: float | None = None
    """The last σ that was examined."""

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

    def step(self, sigma: float, alpha: float) -> dict[str, float]:
        """One iteration. Returns its metrics."""
        es, seed, t = self.recipe.es, self.recipe.run.seed, self.done
        before, started = self.engine.traffic(), time.perf_counter()

        # Score the population on the step's items; if σ is new, score θ itself too.
        items = self.dataset.draw(t)
        signs = (1, -1) if es.antithetic else (1,)
        pairs = range(es.population // len(signs))
        perturbations = [Perturbation(seed, t, pair, sigma, signs, self.noise.NAME, self.noise.RANK) for pair in pairs]
        new_sigma = sigma != self.examined_sigma
        means = self._score([*perturbations, self.theta] if new_sigma else perturbations, items).mean(axis=1)
        scores = means[: es.population]
        scored = time.perf_counter()
        if new_sigma:
            self._examine(sigma, float(means[-1]), scores)

        # Decide: scores to utilities to coefficients. Once the journal has them, the step is done, whatever happens.
        finite = np.isfinite(scores)
        if not finite.all():
            self.console.warn(f"step {t + 1}: {np.sum(~finite)} of {scores.size} scores are not finite; they are ignored")
        try:
            record = Record.from_scores(
                t,
                scores,
                seed=seed,
                noise=self.noise,
                sigma=sigma,
                alpha=alpha,
                shaping_kind=es.shaping,
                scale=es.scale,
                antithetic=es.antithetic,
                weight_decay=es.weight_decay,
            )
        except ValueError as error:
            raise RunError(f"step {t + 1}: {error}; nothing has changed. es.sigma or es.alpha may be too large") from None
        self.journal.append(record, [score if np.isfinite(score) else None for score in scores.tolist()])

        # Move θ.
        with self.console.progress(f"step {t + 1}: update") as progress:
            self.engine.advance([record], progress)
        updated = time.perf_counter()

        if self.pace.stepped(updated - started):
            self._say_pace()
        after, tokens = self.engine.traffic(), es.population * items.scored_tokens
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / (updated - started),
            "step_seconds": updated - started,
            "score_seconds": scored - started,
            "update_seconds": updated - scored,
            **self.memory(),
            "read_gib": max(0, after[0] - before[0]) / GIB,
            "written_gib": max(0, after[1] - before[1]) / GIB,
            "workers": self.engine.workers,
        }

    def evaluate(self) -> float:
        """Mean score of θ on the held-out items; it does not depend on the number of workers."""
        with self.console.progress("evaluation") as progress:
            return float(self.engine.score([self.theta], self.dataset.held_out(), progress).mean())

    def memory(self) -> dict[str, float]:
        """Metrics of the memory in use."""
        now, peak = self.engine.memory()
        return {"pss_gib": now / GIB, "peak_pss_gib": peak / GIB}

    def _score(self, perturbations: Sequence[Perturbation], items: Items) -> np.ndarray:
        """float64 [members, items]; corrects the expected duration in the first step."""
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

    def _examine(self, sigma: float, centre: float, scores: np.ndarray) -> None:
        """Warns if σ is too small or too large to be of use; centre: θ's own score."""
        self.examined_sigma = sigma
        advice = [diagnosis.collapse_advice(self.fitness, centre, scores, sigma)]
        if self.execution.compute == "bf16":
            moved = diagnosis.share_moved(self.store.files, self.noise, sigma, self.recipe.run.seed)
            advice.append(diagnosis.rounding_advice(moved, sigma))
        for text in filter(None, advice):
            self.console.warn(text)


def check_data(journal: Journal, header: dict, recipe: Recipe) -> None:
    """Raises UserError if the items are not those that the run began with; warns if the compute type is another."""
    if journal.header["data"] != header["data"]:
        raise UserError(
            f"{recipe.data.path}: the text or its tokenizer has changed since {journal.path.parent} began; restore it"
        )
    if journal.header["compute"] != header["compute"]:
        print(
            f"warning: the run began in {journal.header['compute']}, this machine continues in {header['compute']}",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="es-lite train", description="Train a language model by evolution strategies, as a recipe says."
    )
    parser.add_argument("recipe", type=Path, help="a TOML file; example recipes are in recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="overrides", help="override a key")
    parser.add_argument("--resume", action="store_true", help="continue from where the run directory stands")
    parser.add_argument(
        "--rebuild", action="store_true", help="with --resume: make damaged layer files again from θ₀ and the journal"
    )
    arguments = parser.parse_args(argv)
    if arguments.rebuild and not arguments.resume:
        parser.error("--rebuild requires --resume")
    transformers_logging.set_verbosity_error()
    try:
        recipe = Recipe.load(arguments.recipe, arguments.overrides)
        LocalEngine.prepare()
        train(recipe, arguments.resume, arguments.rebuild)
    except DamagedFile as error:
        print(f"es_lite: {error}; add --resume --rebuild to make it again from θ₀ and the journal", file=sys.stderr)
        return error.exit_code
    except (UserError, RunError) as error:
        print(f"es_lite: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("es_lite: stopped immediately; add --resume to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
