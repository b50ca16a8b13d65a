"""Evaluations and checkpoints: when they are due, what a crash prevented, which model is the best."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import plain
import pytest
from layers import Arrays, config_of, expected, layout_of, records, written
from safetensors.numpy import load_file

from es_lite import system
from es_lite.errors import RunError
from es_lite.model.layout import skeleton
from es_lite.recipe import Recipe
from es_lite.runs import milestones as module
from es_lite.runs.journal import Journal
from es_lite.runs.metrics import Metrics
from es_lite.runs.milestones import Milestones
from es_lite.weights.store import Store

STEPS = 6
SCORES = [-1.0, None, -3.0, -2.0]


class Console:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.stopping = False
        self.said: list[str] = []
        self.lines: list[dict] = []
        self.say, self.show_step, self.show_evaluation = self.said.append, self.lines.append, self.lines.append


class Run:
    """A run of STEPS steps whose layers stay at step 0, as those of a streamed run are behind; `evaluation` is θ's score."""

    def __init__(self, folder: Path, **changes: object) -> None:
        """changes: "table.key" to value."""
        self.folder = folder
        self.console = Console()
        self.evaluation = -4.0
        self.described: dict[str, float] = {}
        """Further metrics of an evaluation."""
        self.evaluated: list[int] = []
        self.written: list[dict] = []
        """What θ wrote in an evaluation."""
        recipe = Recipe()
        for name, value in {"run.iterations": STEPS, "run.checkpoint_dtype": "fp32", **changes}.items():
            table, key = name.split(".")
            recipe = dataclasses.replace(recipe, **{table: dataclasses.replace(getattr(recipe, table), **{key: value})})
        if not (folder / "journal.jsonl").exists():
            written(folder / "master", layout_of("gpt2"), "fp32")
            Journal.create(folder / "journal.jsonl", {})
        self.journal = Journal.open(folder / "journal.jsonl")
        self.metrics = Metrics(folder / "metrics.jsonl", tensorboard=False)
        self.milestones = Milestones(
            recipe=recipe,
            run=SimpleNamespace(path=folder, checkpoint=folder / "checkpoint", best=folder / "best"),
            journal=self.journal,
            metrics=self.metrics,
            console=self.console,
            model=skeleton(config_of("gpt2")),
            layout=layout_of("gpt2"),
            store=Store(folder / "master", layout_of("gpt2"), "fp32"),
            tokenizer=None,
            threads=1,
            evaluate=self.evaluate,
            reference=lambda: {"unigram_score": -5.0},
            memory=lambda: {"pss_gib": 1.5},
            unit="points, more are better",
        )

    def evaluate(self) -> tuple[dict[str, float], list[dict]]:
        self.evaluated.append(len(self.journal.records))
        return {"eval_score": self.evaluation, **self.described}, self.written

    def record(self) -> None:
        """The journal gets the next step; a crash may follow."""
        self.journal.append(records(STEPS)[len(self.journal.records)], SCORES)

    def step(self) -> None:
        self.record()
        self.milestones.after_step({"tokens": 123})

    def exported(self, name: str) -> dict | None:
        """What checkpoint/ or best/ says it holds."""
        state = self.folder / name / "es_lite.json"
        return json.loads(state.read_text()) if state.exists() else None


def checkpoints(run: Run, steps: int = STEPS) -> list[int]:
    """After which of the next steps a checkpoint was written."""
    found = []
    for _ in range(steps):
        run.step()
        if (state := run.exported("checkpoint")) and state["step"] == len(run.journal.records):
            found.append(state["step"])
    return found


# Metrics


def test_the_metrics_of_a_step_are_what_its_record_tells_and_the_figures(tmp_path):
    run = Run(tmp_path)
    run.step()
    (line,) = run.metrics.lines()
    assert line == {
        "step": 1,
        "score_mean": -2.0,
        "score_std": pytest.approx((2 / 3) ** 0.5),
        "score_best": -1.0,
        "eval_score": None,
        "sigma": 1e-2,
        "alpha": 5e-4,
        "tokens": 123,
    }
    assert run.console.lines == [line]


def test_sigma_and_alpha_are_those_of_the_step(tmp_path):
    """σ is the record's; α follows the recipe's decay or, if it is "auto", is what the journal says."""
    run = Run(tmp_path, **{"es.alpha": 0.25, "es.alpha_decay": 0.5, "es.alpha_decay_every": 1})
    for _ in range(3):
        run.step()
    run.journal.append(records(STEPS)[3], SCORES, {"alpha": 0.75})
    run.milestones.after_step({})
    assert [line["sigma"] for line in run.metrics.lines()] == [1e-2] * 4
    assert [line["alpha"] for line in run.metrics.lines()] == [0.25, 0.125, 0.0625, 0.75]


def test_metrics_that_a_crash_prevented_are_written_once(tmp_path):
    run = Run(tmp_path)
    run.step()
    run.record()
    run.record()
    for _ in range(2):
        run = Run(tmp_path)
        run.milestones.catch_up()
        assert [line["step"] for line in run.metrics.lines()] == [1, 2, 3]
    first, *others = run.metrics.lines()
    del first["tokens"]
    assert others == [first | {"step": 2}, first | {"step": 3}]
    assert run.console.lines == []


# Evaluations


def test_evaluations_are_done_before_the_first_step_at_multiples_and_after_the_last(tmp_path):
    run = Run(tmp_path, **{"eval.every": 4, "eval.best": False})
    run.milestones.catch_up()
    for _ in range(STEPS):
        run.step()
    assert run.evaluated == [0, 4, 6]
    assert [line["eval_score"] for line in run.metrics.lines()] == [-4.0, None, None, None, -4.0, None, -4.0]
    assert run.metrics.lines()[0] == {"step": 0, "eval_score": -4.0, "pss_gib": 1.5, "unigram_score": -5.0}
    assert run.console.lines == run.metrics.lines()


def test_all_metrics_of_an_evaluation_are_in_its_line_and_what_was_written_in_samples(tmp_path):
    run = Run(tmp_path, **{"eval.every": 1, "eval.best": False})
    run.described, run.written = {"eval_accuracy": 0.25}, [{"completion": "4"}, {"completion": "5"}]
    run.milestones.catch_up()
    run.described, run.written = {"eval_accuracy": 0.5}, [{"completion": "6"}]
    run.step()
    assert [line["eval_accuracy"] for line in run.metrics.lines()] == [0.25, 0.5]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": 0, "completion": "4"}, {"step": 0, "completion": "5"}, {"step": 1, "completion": "6"}]


def test_without_evaluations_there_are_none(tmp_path):
    run = Run(tmp_path)
    run.milestones.catch_up()
    for _ in range(STEPS):
        run.step()
    assert run.evaluated == [] and run.exported("best") is None


def test_an_evaluation_that_a_crash_prevented_is_done_once(tmp_path):
    run = Run(tmp_path, **{"eval.every": 2})
    run.milestones.catch_up()
    run.step()
    run.record()
    for evaluated in ([2], []):
        run = Run(tmp_path, **{"eval.every": 2})
        run.milestones.catch_up()
        assert run.evaluated == evaluated
        assert run.metrics.evaluations() == {0: -4.0, 2: -4.0}
    assert run.metrics.lines()[-1] == {"step": 2, "eval_score": -4.0, "pss_gib": 1.5}
    run.record()
    run.milestones.catch_up()
    assert run.evaluated == []  # step 3 has none


# best/


def test_best_is_the_model_of_the_highest_evaluation(tmp_path):
    run = Run(tmp_path, **{"eval.every": 1})
    run.milestones.catch_up()
    kept = []
    for run.evaluation in (-5.0, -3.0, -3.5, -3.0, -2.0):  # the first is below step 0's
        run.step()
        kept.append((run.exported("best") or {}).get("step"))
    assert kept == [None, 2, 2, 2, 5]
    assert run.exported("best") == {"step": 5, "eval_score": -2.0}
    assert run.exported("checkpoint") is None


def test_the_best_of_an_earlier_command_counts(tmp_path):
    for evaluation in (-2.0, -3.0):
        run = Run(tmp_path, **{"eval.every": 1})
        run.evaluation = evaluation
        run.step()
    assert run.exported("best") == {"step": 1, "eval_score": -2.0}


def test_best_can_be_left_out(tmp_path):
    run = Run(tmp_path, **{"eval.every": 1, "eval.best": False})
    run.step()
    assert run.evaluated == [1] and run.exported("best") is None


def test_a_best_model_that_could_not_be_written_is_not_forgotten(tmp_path, monkeypatch):
    run = Run(tmp_path, **{"eval.every": 1})

    def full(*_: object) -> None:
        raise RunError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "export", full)
        with pytest.raises(RunError):
            run.step()
    run = Run(tmp_path, **{"eval.every": 1})
    run.milestones.catch_up()
    assert run.exported("best") == {"step": 1, "eval_score": -4.0}


# checkpoint/


@pytest.mark.parametrize(("every", "steps"), [(0, []), (2, [2, 4, 6]), (4, [4])])
def test_checkpoints_are_written_at_multiples(tmp_path, every, steps):
    assert checkpoints(Run(tmp_path, **{"run.checkpoint_every": every})) == steps


@pytest.mark.parametrize(("every", "stopping", "step"), [(4, False, 5), (4, True, 5), (0, True, 5), (0, False, None)])
def test_the_last_step_is_checkpointed_if_there_are_checkpoints_or_the_run_was_stopped(tmp_path, every, stopping, step):
    run = Run(tmp_path, **{"run.checkpoint_every": every})
    for _ in range(5):
        run.step()
    run.console.stopping = stopping
    run.milestones.checkpoint_if_due()
    assert (run.exported("checkpoint") or {}).get("step") != 5
    run.milestones.checkpoint_if_due(last=True)
    assert (run.exported("checkpoint") or {}).get("step") == step


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    run = Run(tmp_path, **{"run.checkpoint_every": 1})
    run.step()
    before = (tmp_path / "checkpoint").stat().st_ino
    run.milestones.checkpoint_if_due(last=True)
    Run(tmp_path, **{"run.checkpoint_every": 1}).milestones.catch_up()
    assert (tmp_path / "checkpoint").stat().st_ino == before


def test_a_checkpoint_that_a_crash_prevented_is_written(tmp_path):
    run = Run(tmp_path, **{"run.checkpoint_every": 2, "eval.every": 2, "eval.best": False})
    run.record()
    run.record()
    run.evaluation = -1.5
    run.milestones.catch_up()
    assert run.exported("checkpoint") == {"step": 2, "eval_score": -1.5}


def test_no_checkpoint_is_written_before_the_first_step(tmp_path):
    run = Run(tmp_path, **{"run.checkpoint_every": 2})
    run.milestones.catch_up()
    assert run.exported("checkpoint") is None


def test_a_checkpoint_holds_the_journals_last_step_wherever_the_layers_are(tmp_path):
    run = Run(tmp_path, **{"run.checkpoint_every": 3, "eval.every": 3})
    assert checkpoints(run, 3) == [3]
    assert run.milestones.store.steps() == [0] * len(run.milestones.layout.layers)
    found = load_file(tmp_path / "checkpoint/model.safetensors")
    for layer in run.milestones.layout.layers:
        for name, (values, _) in expected(layer, Arrays(run.milestones.layout), "fp32", records(3)).items():
            assert plain.same_bits(found[name].ravel(), values), name
    card = (tmp_path / "checkpoint/README.md").read_text()
    assert "3 steps" in card and "Held-out score: -4.0000 (points, more are better)." in card and "[es]" in card


@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("fp32", 4)])
def test_a_stopped_run_without_disk_for_a_checkpoint_says_how_to_make_it(tmp_path, monkeypatch, dtype, itemsize):
    run = Run(tmp_path, **{"run.checkpoint_dtype": dtype})
    run.step()
    run.console.stopping = True
    needed = 1.1 * itemsize * run.milestones.layout.size
    monkeypatch.setattr(system, "free_disk_bytes", lambda path: int(needed) - 1)
    run.milestones.checkpoint_if_due(last=True)
    assert run.exported("checkpoint") is None
    assert run.console.said == [
        f"no checkpoint: it takes 0.0 GiB of disk, more than is free; to make it elsewhere: es-lite replay {tmp_path} --out DIR"
    ]
    monkeypatch.setattr(system, "free_disk_bytes", lambda path: int(needed) + 1)
    run.milestones.checkpoint_if_due(last=True)
    assert run.exported("checkpoint") == {"step": 1, "eval_score": None}
    assert len(run.console.said) == 1


def test_a_checkpoint_that_the_plan_has_room_for_is_tried_in_any_case(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "free_disk_bytes", lambda path: 0)
    assert checkpoints(Run(tmp_path, **{"run.checkpoint_every": 1}), 1) == [1]
