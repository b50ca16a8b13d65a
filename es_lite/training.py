"""A run under way: a step of the papers' algorithm, and what is done between steps."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from es_lite import data, plan, system
from es_lite import recipe as recipes
from es_lite.algorithm import record as records
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.algorithm.schedule import decayed
from es_lite.data import Corpus
from es_lite.errors import RunError
from es_lite.plan import GIB
from es_lite.recipe import Recipe
from es_lite.runs.console import Console
from es_lite.runs.directory import RunDirectory
from es_lite.runs.export import export, model_card, step_of
from es_lite.runs.journal import Journal
from es_lite.runs.metrics import Metrics
from es_lite.scoring import diagnosis
from es_lite.scoring.perturb import UNPERTURBED, Perturbation
from es_lite.weights.layerfile import LayerFile
from es_lite.weights.layout import Layer, Layout
from es_lite.weights.store import Finished
from es_lite.workers.pool import SMALLER, Pool
from es_lite.workers.worker import Advance, Check, Score, Task

SLOWEST_FLOPS, SLOWEST_NOISE = 5e9, 2e7
"""A second of a worker on the slowest machine, in FLOP and noise elements: beyond that, it counts as hung."""


@dataclass
class Training:
    """A run under way: what a step needs."""

    recipe: Recipe
    planned: plan.Plan
    model: PreTrainedModel
    layout: Layout
    files: Sequence[LayerFile]
    """Of the layers, in order."""
    standing: int
    """The step that the layers' files stand at, all of them, or later."""
    tokenizer: PreTrainedTokenizerBase
    train_set: Corpus
    held_out: Corpus | None
    run: RunDirectory
    journal: Journal
    metrics: Metrics
    console: Console
    pool: Pool
    pss: system.PeakPss
    examined_sigma: float | None = None
    """The σ that was last looked at for its size."""

    @property
    def done(self) -> int:
        """Steps that the journal holds; the weights stand there too, but within `step`."""
        return len(self.journal.records)

    def step(self) -> None:
        """One iteration (EA4LLM, algorithm 1; Evolution Strategies at Scale, algorithm 2)."""
        es, seed, t = self.recipe.es, self.recipe.run.seed, self.done
        started = time.perf_counter()
        traffic = system.io_bytes(self._pids)
        sigma, alpha = self._sigma(t), self._alpha(t)

        # Score: the same M samples for every member, and where σ is new, for θ itself.
        batch = data.pack(self.train_set, data.draw(len(self.train_set), self.recipe.fitness.samples, seed, t))
        signs = (1, -1) if es.antithetic else (1,)
        pairs = range(es.population // len(signs))
        perturbations = [Perturbation(seed, t, pair, sigma, signs) for pair in pairs]
        new_sigma = sigma != self.examined_sigma
        if new_sigma:
            perturbations.append(UNPERTURBED)
        means = [value.mean(axis=1) for value in self._scores(perturbations, batch, f"step {t + 1}: scores")]
        scores = np.concatenate(means[: len(pairs)])
        scored = time.perf_counter()

        # Decide: scores to weights to coefficients. From the journal on, the step is done, whatever happens.
        finite = scores[np.isfinite(scores)]
        if finite.size < scores.size:
            self.console.warn(
                f"step {t + 1}: {scores.size - finite.size} of {scores.size} scores are not finite; they count for nothing"
            )
        if new_sigma:
            self._examine(sigma, float(means[-1][0]), scores)
        try:
            record = records.make(
                t,
                scores,
                seed=seed,
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

        # Move; streamed layers do as they pass in the next step.
        if not self.planned.streamed:
            self.update([record])
        updated = time.perf_counter()

        tokens = es.population * batch.targets
        read, written = (max(0, now - before) for now, before in zip(system.io_bytes(self._pids), traffic, strict=True))
        evaluation = self.evaluate() if self._due(self.recipe.eval.every) else None
        line = self._line(t) | {
            "eval_score": evaluation,
            "tokens": tokens,
            "tokens_per_second": tokens / (updated - started),
            "step_seconds": updated - started,
            "score_seconds": scored - started,
            "update_seconds": updated - scored,
            "pss_gib": self.pss.sample() / GIB,
            "peak_pss_gib": self.pss.peak_bytes / GIB,
            "read_gib": read / GIB,
            "written_gib": written / GIB,
            "workers": len(self.pool.pids),
        }
        self._keep_best(evaluation)
        self.metrics.write(line)
        self.console.step(line, self.recipe.run.iterations)
        self.checkpoint_if_due()
        if self.pool.cramped and self.done < self.recipe.run.iterations:
            raise RunError(f"stopped after step {self.done}, memory is short: {self.pool.cramped}; nothing is lost: {SMALLER}")

    def prepare(self, fresh: bool) -> None:
        """Makes the layers' files that are missing, checks those that are there, and fills the working copy.

        fresh: the run has only begun, and what files there are it has just written.
        """
        self.console.say("bringing the weights level with the journal")
        if not self.planned.streamed:
            self.update(self.journal.records[self.standing :])
            return
        missing = [file for file in self.files if not file.path.exists()]
        tasks: list[Task] = [Advance(file.layer.index, self.journal.records, self.done) for file in missing]
        if not fresh:
            tasks += [Check(file.layer.index) for file in self.files if file not in missing]
        self._each(tasks, self.done, "layers")

    def update(self, history: Sequence[Record]) -> None:
        """Brings all layers, their files and the working copy, to the journal's end; the largest ones first."""
        layers = sorted(self.layout.layers, key=lambda layer: -layer.size)
        self._each([Advance(layer.index, history, self.done) for layer in layers], len(history), "update")
        self.standing = self.done

    def _each(self, tasks: Sequence[Task], steps: int, what: str) -> None:
        """Does tasks of a layer each, in `steps` steps of the update."""
        drawn = (1 + steps * self.recipe.es.population) * max(layer.size for layer in self.layout.layers)
        self.pool.map(tasks, drawn / SLOWEST_NOISE, self.console.tasks(what, len(tasks)))

    def evaluate(self) -> float:
        """Mean log-probability of θ on the held-out samples; the same number on any number of workers."""
        assert self.held_out is not None
        batch = data.pack(self.held_out, data.spread(self.held_out, self.recipe.eval.samples))
        (scores,) = self._scores([UNPERTURBED], batch, "evaluation")
        return float(scores.mean())

    def catch_up(self) -> None:
        """What a crash cut off after the journal had the step: its metrics, an evaluation, a checkpoint; at step 0 the first."""
        written = {line.get("step") for line in self.metrics.lines()}
        for t in range(self.done):
            if t + 1 not in written:
                self.metrics.write(self._line(t))
        self._evaluate_if_due()
        if self.done:
            self.checkpoint_if_due()

    def _line(self, t: int) -> dict[str, Any]:
        """What the journal knows of a step's metrics."""
        scores = np.array([score for score in self.journal.scores[t] if score is not None])
        score = {"score_mean": float(scores.mean()), "score_std": float(scores.std()), "score_best": float(scores.max())}
        return {"step": t + 1} | score | {"eval_score": None, "sigma": self._sigma(t), "alpha": self._alpha(t)}

    def _sigma(self, t: int) -> float:
        es = self.recipe.es
        return decayed(es.sigma, es.sigma_decay, es.sigma_decay_every, t)

    def _alpha(self, t: int) -> float:
        es = self.recipe.es
        return decayed(es.alpha, es.alpha_decay, es.alpha_decay_every, t)

    def _evaluate_if_due(self) -> None:
        if not self._due(self.recipe.eval.every) or self.done in self.metrics.evaluations():
            return
        line: dict[str, Any] = {"step": self.done, "eval_score": self.evaluate(), "pss_gib": self.pss.sample() / GIB}
        if self.done == 0:
            assert self.held_out is not None
            line["vocab_size"] = self.model.config.get_text_config().vocab_size
            line["unigram_score"] = data.unigram_score(self.train_set, self.held_out, line["vocab_size"])
        else:
            self._keep_best(line["eval_score"])
        self.metrics.write(line)
        self.console.step(line, self.recipe.run.iterations)

    def checkpoint_if_due(self, last: bool = False) -> None:
        """Where checkpoints are on, or the run was asked to stop: `checkpoint/` as θ stands, if it does not already."""
        every = self.recipe.run.checkpoint_every
        due = (bool(every) and (last or self.done % every == 0)) or (last and self.console.stopping)
        if due and step_of(self.run.checkpoint) != self.done:
            size = self.layout.size * (2 if self.recipe.run.checkpoint_dtype == "bf16" else 4)
            if not every and system.free_disk_bytes(self.run.path) < 1.1 * size:
                self.console.say(f"no checkpoint: it takes {size / GIB:.1f} GiB of disk; es_lite.replay makes it elsewhere")
                return
            self._export(self.run.checkpoint, self.metrics.evaluations().get(self.done))

    def _keep_best(self, evaluation: float | None) -> None:
        if (
            self.recipe.eval.best
            and evaluation is not None
            and evaluation > max(self.metrics.evaluations().values(), default=-np.inf)
        ):
            self._export(self.run.best, evaluation)

    def _export(self, folder: Path, evaluation: float | None) -> None:
        threads = Threads(self.planned.workers * self.planned.threads)

        def read(layer: Layer) -> Finished:
            return Finished(self.files[layer.index], self.journal.records[self.standing :], self.done, threads)

        card = model_card(self.done, recipes.dumps(self.recipe), self.recipe.model.path, evaluation)
        state = {"step": self.done, "eval_score": evaluation}
        export(folder, self.model, self.layout, read, self.tokenizer, self.recipe.run.checkpoint_dtype, card, state)

    def _scores(self, perturbations: Sequence[Perturbation], batch: data.Batch, what: str) -> list[np.ndarray]:
        """Under each perturbation, each sample's score: float64 [members, B]."""
        pass_samples, micro = self.planned.pass_samples, self.recipe.fitness.micro_batch
        members = sum(perturbation.members for perturbation in perturbations)
        work = 2 * members * batch.targets * self.layout.size / SLOWEST_FLOPS
        if self.planned.folded:  # the whole population at once
            records = self.journal.records[self.standing :]
            samples = max(1, pass_samples * self.planned.members // members // micro) * micro
            task = Score(perturbations, batch, samples, records, self.done)
            passes = -(-len(batch.lengths) // samples)
            moved = self.layout.size * (passes * (members + 1) + (len(records) + 1) * self.recipe.es.population)
            with self.console.parameters(what, passes * self.layout.size) as progress:
                (values,) = self.pool.map([task], work + moved / SLOWEST_NOISE, lambda index: None, progress)
            self.standing = self.done
            return values
        # A perturbation at a time; where there is only one, its samples are cut for all workers.
        share = len(batch.lengths)
        if len(perturbations) == 1:
            share = -(-share // (micro * len(self.pool.pids))) * micro
        lows = range(0, len(batch.lengths), share)
        parts = [data.Batch(batch.tokens[low : low + share], batch.lengths[low : low + share]) for low in lows]
        tasks = [Score([perturbation], part, pass_samples) for perturbation in perturbations for part in parts]
        values = [value for (value,) in self.pool.map(tasks, work, self.console.tasks(what, len(tasks)))]
        count = len(parts)
        return [np.concatenate(values[i * count : (i + 1) * count], axis=1) for i in range(len(perturbations))]

    def _due(self, every: int) -> bool:
        return bool(every) and (self.done % every == 0 or self.done == self.recipe.run.iterations)

    def _examine(self, sigma: float, centre: float, scores: np.ndarray) -> None:
        """Warns where σ is too small or too large to be of use; centre: θ's own score."""
        self.examined_sigma = sigma
        advice = [diagnosis.collapse_advice(centre, scores, sigma)]
        if self.planned.compute == "bf16":
            moved = diagnosis.share_moved(self.files, sigma, self.recipe.run.seed)
            advice.append(diagnosis.rounding_advice(moved, sigma))
        for text in filter(None, advice):
            self.console.warn(text)

    @property
    def _pids(self) -> list[int]:
        return [os.getpid(), *self.pool.pids]
