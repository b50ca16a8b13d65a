"""α and σ that the program finds, through the real command: whatever happens to a run, it finds the same."""

import json
from pathlib import Path

import pytest
from support import FITNESSES, assert_same_run, digest, metrics, replayed, tensors, train_here, write_recipe

STEPS = 12
FOUND = {"alpha": "auto", "sigma": "auto", "population": 8}


def recipe_of(folder: Path, fitness: str, **es: object) -> Path:
    return FITNESSES[fitness](folder, run={"iterations": STEPS}, es=FOUND | es, eval={"every": 4, "samples": 4})


@pytest.mark.parametrize("fitness", ["logprob", pytest.param("reward", marks=pytest.mark.long)])
@pytest.mark.parametrize("antithetic", [True, pytest.param(False, marks=pytest.mark.long)], ids=["antithetic", "members"])
def test_a_run_that_is_stopped_after_every_step_finds_what_one_does_that_is_not(tmp_path: Path, fitness: str, antithetic: bool):
    recipe = recipe_of(tmp_path, fitness, antithetic=antithetic)
    assert train_here(recipe, tmp_path / "whole").code == 0
    for step in range(STEPS):
        finished = train_here(recipe, tmp_path / "parts", "run.minutes=1e-6", "workers.count=1", resume=step > 0)
        assert finished.code == 0, finished.err
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    steps = metrics(tmp_path / "whole")[1:]
    assert len({line["alpha"] for line in steps}) > STEPS // 2
    assert [(line["alpha"], line["sigma"]) for line in steps] == [
        (line["alpha"], line["sigma"]) for line in metrics(tmp_path / "parts") if "alpha" in line
    ]


def test_where_weights_are_changes_nothing_that_is_found(tmp_path: Path) -> None:
    """In bf16, in which σ has a lower bound."""
    recipe = recipe_of(tmp_path, "logprob")
    keys = "workers.compute=bf16", "memory.residency="
    for residency in ("resident", "streamed"):
        assert train_here(recipe, tmp_path / residency, keys[0], keys[1] + residency).code == 0
    journals = [(tmp_path / residency / "journal.jsonl").read_bytes() for residency in ("resident", "streamed")]
    assert journals[0] == journals[1]


def test_what_was_found_is_said_and_kept(tmp_path: Path) -> None:
    finished = train_here(recipe_of(tmp_path, "logprob"), tmp_path / "run", "es.population=32")
    assert finished.out.count('es.sigma = "auto": ') == 1 and "of the spread of the scores" in finished.out
    steps = metrics(tmp_path / "run")[1:]
    said = next(line for line in finished.out.splitlines() if line.startswith('es.sigma = "auto"'))
    assert f"{steps[-1]['sigma']:.3g}, at which" in said
    assert len({line["sigma"] for line in steps[6:]}) == 1
    lines = [json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()][1:]
    assert [line["estimate"]["alpha"] for line in lines] == [line["alpha"] for line in steps]
    assert [line["sigma"] for line in lines] == [line["sigma"] for line in steps]
    assert all(line["estimate"]["curvature"] is not None for line in lines[:4]), "θ itself is scored in the first steps"


def test_the_journal_of_a_given_alpha_and_sigma_has_no_estimates(tmp_path: Path) -> None:
    """So earlier versions can read it."""
    assert train_here(write_recipe(tmp_path), tmp_path / "run").code == 0
    text = (tmp_path / "run/journal.jsonl").read_text()
    assert "estimate" not in text and "anchor" not in text


@pytest.mark.parametrize("fitness", list(FITNESSES))
def test_every_step_has_its_signal_its_ties_its_expected_gain_and_its_drift(tmp_path: Path, fitness: str) -> None:
    recipe = FITNESSES[fitness](tmp_path, run={"iterations": 4})
    assert train_here(recipe, tmp_path / "run").code == 0
    steps = [line for line in metrics(tmp_path / "run") if line["step"]]
    assert all(line["signal"] <= 1.0 + 1e-9 and 0 <= line["tied"] <= 1 and line["gain_expected"] is not None for line in steps)
    drifts = [line["drift_rms"] for line in steps]
    assert drifts == sorted(drifts) and drifts[0] > 0


def test_the_drift_goes_on_after_a_resume_and_is_the_real_distance(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, es={"anchor": 2.0, "population": 16}, run={"iterations": 8})
    assert train_here(recipe, tmp_path / "run", "run.iterations=4").code == 0
    assert train_here(recipe, tmp_path / "run", resume=True).code == 0
    before, after = replayed(tmp_path / "run", tmp_path / "before", "--step", "0"), tensors(tmp_path / "run")
    squares = sum(float(((after[name] - before[name]) ** 2).sum()) for name in after)
    real = (squares / sum(values.size for values in after.values())) ** 0.5
    assert metrics(tmp_path / "run")[-1]["drift_rms"] == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("master", ["fp32", "none"])
@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_an_anchored_run_is_resumed_and_replayed_to_the_same_bits(tmp_path: Path, master: str, residency: str) -> None:
    recipe = write_recipe(tmp_path, es={"anchor": 5.0}, memory={"master": master, "residency": residency}, run={"iterations": 4})
    checkpoint = "run.checkpoint_every=4", "run.checkpoint_dtype=fp32"
    assert train_here(recipe, tmp_path / "whole", *checkpoint).code == 0
    assert train_here(recipe, tmp_path / "parts", *checkpoint, "run.minutes=1e-6").code == 0
    assert train_here(recipe, tmp_path / "parts", *checkpoint, resume=True).code == 0
    assert digest(tmp_path / "parts")["journal.jsonl"] == digest(tmp_path / "whole")["journal.jsonl"]
    if residency == "resident":
        assert_same_run(tmp_path / "parts", tmp_path / "whole")
    (exported,) = (tmp_path / "whole/checkpoint").glob("*.safetensors")
    replayed(tmp_path / "whole", tmp_path / "replayed")
    assert exported.read_bytes() == (tmp_path / "replayed/model.safetensors").read_bytes()
    plain = write_recipe(tmp_path, memory={"master": master, "residency": residency}, run={"iterations": 4})
    assert train_here(plain, tmp_path / "plain", *checkpoint).code == 0
    assert exported.read_bytes() != next((tmp_path / "plain/checkpoint").glob("*.safetensors")).read_bytes()
