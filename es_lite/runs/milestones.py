"""What happens between steps: evaluations and checkpoints that are due, or that a crash prevented, and the best model so far."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from es_lite import system
from es_lite.algorithm.jit import Threads
from es_lite.model.layout import Layout
from es_lite.quantities import GIB
from es_lite.recipe import Recipe
from es_lite.runs.console import Console
from es_lite.runs.directory import RunDirectory
from es_lite.runs.export import export, model_card, step_of
from es_lite.runs.journal import Journal
from es_lite.runs.metrics import Metrics
from es_lite.runs.tuning import alpha_of
from es_lite.weights.store import Store


@dataclass
class Milestones:
    recipe: Recipe
    run: RunDirectory
    journal: Journal
    metrics: Metrics
    console: Console
    model: PreTrainedModel
    layout: Layout
    store: Store
    tokenizer: PreTrainedTokenizerBase
    threads: int
    evaluate: Callable[[], tuple[dict[str, float], list[dict[str, Any]]]]
    """Metrics of θ on the held-out items, "eval_score" among them, and samples of what it wrote."""
    reference: Callable[[], dict[str, float]]
    """Metrics to compare with, for the line of step 0."""
    memory: Callable[[], dict[str, float]]
    """Metrics of the memory in use."""
    unit: str
    """What a held-out score is, in words."""

    @property
    def done(self) -> int:
        """Steps that the journal holds."""
        return len(self.journal.records)

    def catch_up(self) -> None:
        """Does what a crash prevented after a step was in the journal: metrics, an evaluation, a checkpoint. At step 0, the first
        evaluation."""
        written = {line.get("step") for line in self.metrics.lines()}
        for step in range(self.done):
            if step + 1 not in written:
                self.metrics.write(self.from_journal(step))
        if self._due(self.recipe.eval.every) and self.done not in self.metrics.evaluations():
            line: dict[str, Any] = {"step": self.done, **self._evaluation(), **self.memory()}
            if self.done == 0:
                line |= self.reference()
            else:
                self._keep_best(line["eval_score"])
            self.metrics.write(line)
            self.console.show_evaluation(line)
        if self.done:
            self.checkpoint_if_due()

    def from_journal(self, step: int) -> dict[str, Any]:
        """The metrics of a step that follow from the journal."""
        scores = np.array([score for score in self.journal.scores[step] if score is not None])
        score = {"score_mean": float(scores.mean()), "score_std": float(scores.std()), "score_best": float(scores.max())}
        sizes = {
            "sigma": self.journal.records[step].sigma,
            "alpha": alpha_of(self.recipe.es, step, self.journal.estimates[step]),
        }
        return {"step": step + 1} | score | {"eval_score": None} | sizes

    def after_step(self, figures: dict[str, Any]) -> None:
        """Completes the journal's last step: an evaluation and checkpoints if they are due, and its metrics."""
        line = self.from_journal(self.done - 1) | figures
        if self._due(self.recipe.eval.every):
            line |= self._evaluation()
            self._keep_best(line["eval_score"])
        self.metrics.write(line)
        self.console.show_step(line)
        self.checkpoint_if_due()

    def _evaluation(self) -> dict[str, float]:
        """Evaluates θ; keeps the samples. Returns the metrics."""
        figures, samples = self.evaluate()
        self.metrics.keep_samples([{"step": self.done, **sample} for sample in samples])
        return figures

    def checkpoint_if_due(self, last: bool = False) -> None:
        """Writes `checkpoint/` if it is due or the run was asked to stop, unless it is there already."""
        every = self.recipe.run.checkpoint_every
        due = (bool(every) and (last or self.done % every == 0)) or (last and self.console.stopping)
        if not due or step_of(self.run.checkpoint) == self.done:
            return
        size = self.layout.size * (2 if self.recipe.run.checkpoint_dtype == "bf16" else 4)
        if not every and system.free_disk_bytes(self.run.path) < 1.1 * size:
            self.console.say(
                f"no checkpoint: it takes {size / GIB:.1f} GiB of disk, more than is free; to make it elsewhere: "
                f"es-lite replay {self.run.path} --out DIR"
            )
            return
        self._export(self.run.checkpoint, self.metrics.evaluations().get(self.done))

    def _keep_best(self, evaluation: float) -> None:
        best_so_far = max(self.metrics.evaluations().values(), default=-np.inf)
        if self.recipe.eval.best and evaluation > best_so_far:
            self._export(self.run.best, evaluation)

    def _export(self, folder: Path, evaluation: float | None) -> None:
        threads = Threads(self.threads)
        result = "" if evaluation is None else f"{evaluation:.4f} ({self.unit})"
        export(
            folder,
            self.model,
            self.layout,
            lambda layer: self.store.reader(layer, self.journal.records, self.done, threads),
            self.tokenizer,
            self.recipe.run.checkpoint_dtype,
            model_card(self.done, self.recipe.dumps(), self.recipe.model.path, result),
            {"step": self.done, "eval_score": evaluation},
        )

    def _due(self, every: int) -> bool:
        return bool(every) and (self.done % every == 0 or self.done == self.recipe.run.iterations)
