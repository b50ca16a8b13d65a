"""The command: trains a language model by evolution strategies, as a recipe says.

    python -m es_lite.train RECIPE [--set table.key=value ...] [--resume]

`train` is a run from top to bottom, `Training.step` the papers' algorithm. The journal gets a step's record before any
weight changes; the weights catch up with the journal, wherever they were left.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from es_lite import data, plan, system
from es_lite import recipe as recipes
from es_lite.algorithm import record as records
from es_lite.algorithm.record import Record
from es_lite.algorithm.schedule import decayed
from es_lite.data import Corpus
from es_lite.errors import RunError, UserError
from es_lite.recipe import Recipe
from es_lite.runs import origin as origins
from es_lite.runs.console import Console
from es_lite.runs.directory import RunDirectory
from es_lite.runs.export import export, model_card, step_of
from es_lite.runs.journal import Journal
from es_lite.runs.metrics import Metrics
from es_lite.runs.origin import Origin
from es_lite.scoring import diagnosis
from es_lite.scoring.perturb import UNPERTURBED, Perturbation
from es_lite.tokenizer import load_tokenizer
from es_lite.weights import master, working
from es_lite.weights.layout import Layer, Layout
from es_lite.workers.pool import Pool
from es_lite.workers.worker import Advance, Score, Setup

GIB = 2**30

SLOWEST_FLOPS, SLOWEST_NOISE = 5e9, 2e7
"""A second of a worker on the slowest machine, in FLOP and noise elements: beyond that, it counts as hung."""


def train(recipe: Recipe, resume: bool = False) -> None:
    """Runs `recipe` to its last step, or on from where its run directory stands.

    Raises UserError for what the user must change, RunError where the run cannot go on; after either, the run
    directory resumes.
    """
    # What is to be trained, and whether it fits, before anything is loaded or written.
    origin = Origin.of_recipe(recipe)
    model, layout = origin.skeleton()
    planned = plan.make(recipe, model.config, layout)
    if problem := plan.shortfall(planned):
        raise UserError(f"{problem}\n\n{planned.text()}")

    with RunDirectory(recipe, resume) as run:
        print(f"{layout.size:,} parameters in {len(layout.layers)} layers, run directory {run.path}", flush=True)
        print(planned.text(), flush=True)
        tokenizer, train_set, held_out = read_data(recipe, model, run.path)
        data.draw(len(train_set), recipe.fitness.samples, recipe.run.seed, 0)  # says at once if M is too large

        # θ₀, the journal, and where each layer stands.
        theta_0 = origin.source(model, layout)
        if run.journal.exists():
            journal = Journal.open(run.journal)
            origins.check(journal, layout, theta_0)
        else:
            journal = Journal.create(run.journal, origin.header(layout, theta_0))
        standing = [master.standing(run.master, layer) for layer in layout.layers]
        if max(standing) > len(journal.records):
            raise UserError(
                f"{run.master}: a layer stands at step {max(standing)}, but {run.journal} ends at step "
                f"{len(journal.records)}; restore the journal, or remove {run.master} to make it again from the journal"
            )

        run.keep(recipe)

        descriptor = working.allocate(layout)
        setup = Setup(origin, layout, run.master, planned.compute, planned.threads, recipe.fitness.micro_batch)
        metrics = Metrics(run.metrics, recipe.log.tensorboard)
        with (
            Console(recipe.run.iterations, len(journal.records)) as console,
            Pool(setup, descriptor, planned.workers, recipe.workers.deadline, console.warn) as pool,
            system.PeakPss(lambda: [os.getpid(), *pool.pids]) as pss,
        ):
            training = Training(
                recipe, planned, model, layout, tokenizer, train_set, held_out, run, journal, metrics, console, pool, pss
            )
            console.say("bringing the weights level with the journal")
            training.update(journal.records[min(standing) :])
            training.evaluate_if_due()
            while training.done < recipe.run.iterations and not console.stopping:
                training.step(working.WorkingCopy(layout, descriptor) if training.done == 0 else None)
            training.checkpoint_if_due(last=True)
            resumable = f"; add --resume to go on from step {training.done}" if training.done < recipe.run.iterations else ""
            console.say(f"{training.done} of {recipe.run.iterations} steps done{resumable}")


@dataclass
class Training:
    """A run under way: what a step needs."""

    recipe: Recipe
    planned: plan.Plan
    model: PreTrainedModel
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    train_set: Corpus
    held_out: Corpus | None
    run: RunDirectory
    journal: Journal
    metrics: Metrics
    console: Console
    pool: Pool
    pss: system.PeakPss

    @property
    def done(self) -> int:
        """Steps that the journal holds; the weights stand there too, but within `step`."""
        return len(self.journal.records)

    def step(self, working_copy: working.WorkingCopy | None) -> None:
        """One iteration (EA4LLM, algorithm 1; Evolution Strategies at Scale, algorithm 2).

        working_copy: given at the first step, where σ is examined.
        """
        es, seed, t = self.recipe.es, self.recipe.run.seed, self.done
        started = time.perf_counter()
        traffic = system.io_bytes(self._pids)
        sigma = decayed(es.sigma, es.sigma_decay, es.sigma_decay_every, t)
        alpha = decayed(es.alpha, es.alpha_decay, es.alpha_decay_every, t)

        # Score: the same M samples for every member.
        batch = data.pack(self.train_set, data.draw(len(self.train_set), self.recipe.fitness.samples, seed, t))
        signs = (1, -1) if es.antithetic else (1,)
        pairs = range(es.population // len(signs))
        tasks = [Score(Perturbation(seed, t, pair, sigma, signs), batch, self.planned.pass_samples) for pair in pairs]
        if working_copy is not None:
            tasks.append(Score(UNPERTURBED, batch, self.planned.pass_samples))
        values = self._scores(tasks, f"step {t + 1}: scores")
        means = [value.mean(axis=1) for value in values]
        scores = np.concatenate(means[: len(pairs)])
        scored = time.perf_counter()

        # Decide: scores to weights to coefficients. From the journal on, the step is done, whatever happens.
        finite = scores[np.isfinite(scores)]
        if finite.size < scores.size:
            self.console.warn(
                f"step {t + 1}: {scores.size - finite.size} of {scores.size} scores are not finite; they count for nothing"
            )
        if working_copy is not None:
            self._examine_sigma(working_copy, sigma, float(means[-1][0]), scores)
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

        # Move.
        self.update([record])
        updated = time.perf_counter()

        tokens = es.population * batch.targets
        read, written = (max(0, now - before) for now, before in zip(system.io_bytes(self._pids), traffic, strict=True))
        evaluation = self.evaluate() if self._due(self.recipe.eval.every) else None
        line = {
            "step": self.done,
            "score_mean": float(finite.mean()),
            "score_std": float(finite.std()),
            "score_best": float(finite.max()),
            "eval_score": evaluation,
            "sigma": sigma,
            "alpha": alpha,
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

    def update(self, history: Sequence[Record]) -> None:
        """Brings all layers, the master's files and the working copy, to the journal's end; the largest ones first."""
        layers = sorted(self.layout.layers, key=lambda layer: -layer.size)
        tasks = [Advance(layer.index, history, self.done) for layer in layers]
        drawn = sum(len(record.coefficients) for record in history) * layers[0].size
        self.pool.map(tasks, drawn / SLOWEST_NOISE, self.console.tasks("update", len(tasks)))

    def evaluate(self) -> float:
        """Mean log-probability of θ on the held-out samples; the same number on any number of workers."""
        assert self.held_out is not None
        batch = data.pack(self.held_out, data.spread(self.held_out, self.recipe.eval.samples))
        micro = self.recipe.fitness.micro_batch
        share = -(-len(batch.lengths) // (micro * len(self.pool.pids))) * micro
        lows = range(0, len(batch.lengths), share)
        parts = [data.Batch(batch.tokens[low : low + share], batch.lengths[low : low + share]) for low in lows]
        tasks = [Score(UNPERTURBED, part, self.planned.pass_samples) for part in parts]
        return float(np.concatenate(self._scores(tasks, "evaluation"), axis=1).mean())

    def evaluate_if_due(self) -> None:
        """The evaluation before the first step, or one that a crash cut off."""
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
        every = self.recipe.run.checkpoint_every
        if every and (last or self.done % every == 0) and step_of(self.run.checkpoint) != self.done:
            self._export(self.run.checkpoint, self.metrics.evaluations().get(self.done))

    def _keep_best(self, evaluation: float | None) -> None:
        if evaluation is not None and evaluation > max(self.metrics.evaluations().values(), default=-np.inf):
            self._export(self.run.best, evaluation)

    def _export(self, folder: Path, evaluation: float | None) -> None:
        def read(layer: Layer) -> master.MasterLayer:
            return master.MasterLayer(master.file_of(self.run.master, layer), layer)

        card = model_card(self.done, recipes.dumps(self.recipe), self.recipe.model.path, evaluation)
        state = {"step": self.done, "eval_score": evaluation}
        export(folder, self.model, self.layout, read, self.tokenizer, self.recipe.run.checkpoint_dtype, card, state)

    def _scores(self, tasks: Sequence[Score], what: str) -> list[np.ndarray]:
        tokens = max(task.perturbation.members * task.batch.targets for task in tasks)
        return self.pool.map(tasks, 2 * tokens * self.layout.size / SLOWEST_FLOPS, self.console.tasks(what, len(tasks)))

    def _due(self, every: int) -> bool:
        return bool(every) and (self.done % every == 0 or self.done == self.recipe.run.iterations)

    def _examine_sigma(self, copy: working.WorkingCopy, sigma: float, centre: float, scores: np.ndarray) -> None:
        advice = [diagnosis.collapse_advice(centre, scores, sigma)]
        if self.planned.compute == "bf16":
            moved = diagnosis.share_moved(self.layout, copy, sigma, self.recipe.run.seed)
            advice.append(diagnosis.rounding_advice(moved, sigma))
        for text in filter(None, advice):
            self.console.warn(text)

    @property
    def _pids(self) -> list[int]:
        return [os.getpid(), *self.pool.pids]


def read_data(recipe: Recipe, model: PreTrainedModel, run_dir: Path) -> tuple[PreTrainedTokenizerBase, Corpus, Corpus | None]:
    """The tokenizer, the samples to train on, and those held out (None where eval is off)."""
    table, length = recipe.data, recipe.fitness.max_length
    texts = data.read_texts(table.path, table.lines)
    tokenizer = load_tokenizer(table, recipe.model.path, run_dir, texts)
    corpus = data.tokenize(texts, tokenizer, table.samples, length)
    held_out = None
    if recipe.eval.every and recipe.eval.path:
        held_out = data.tokenize(data.read_texts(recipe.eval.path, 0), tokenizer, table.samples, length)
    elif recipe.eval.every:
        corpus, held_out = data.split(corpus, recipe.eval.fraction)
    for part in filter(None, (corpus, held_out)):
        data.check_vocabulary(part, model.config.get_text_config().vocab_size)
    return tokenizer, corpus, held_out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m es_lite.train", description="Train a language model by evolution strategies, as a recipe says."
    )
    parser.add_argument("recipe", type=Path, help="a TOML file; the ones that come with es_lite are in recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="overrides", help="override a key")
    parser.add_argument("--resume", action="store_true", help="go on from where the run directory stands")
    arguments = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    try:
        train(recipes.load(arguments.recipe, arguments.overrides), arguments.resume)
    except (UserError, RunError) as error:
        print(f"es_lite: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("es_lite: stopped at once; add --resume to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
