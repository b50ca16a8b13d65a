"""Streamed weights: their update waits for the next pass, and the page cache need not hold them."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from support import FITNESSES, NOISES, SHARED_TILES, TINY, assert_same_run, samples, train_here

from es_lite.planning.plan import Plan

pytestmark = pytest.mark.slow

STREAMED = "memory.residency=streamed"


CASES = [
    ("logprob", "gaussian", "bf16", "fp32"),
    ("logprob", "rademacher", "bf16", "none"),
    ("logprob", "lowrank 1", "int8", "fp32"),
    ("logprob", "lowrank 3", "int8", "none"),
    ("logprob", "lowrank 1", "bf16", "fp32"),
    ("reward", "lowrank 1", "int8", "none"),
    ("reward", "rademacher", "bf16", "fp32"),
]
"""Fitness, noise, weights and master."""


@pytest.fixture(params=CASES, ids="-".join)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A recipe of three steps, without an evaluation or a checkpoint."""
    fitness, noise, weights, master = request.param
    # Untied if there is no master: the embedding is then a layer that passes by itself, after the head.
    model = {"config": TINY | {"tie_word_embeddings": master == "fp32"}}
    memory = {"weights": weights, "master": master}
    write = FITNESSES[fitness]
    return write(tmp_path, model=model, memory=memory, es=SHARED_TILES, noise=NOISES[noise], eval={"every": 0})


def steps(run: Path) -> set[int]:
    """The steps that the layer files hold."""
    found = set()
    for path in (*run.glob("master/*"), *run.glob("weights/*")):
        with safe_open(path, framework="numpy") as file:
            found.add(int(file.metadata()["step"]))
    return found


def test_a_streamed_run_leaves_its_last_update_to_the_next_step(recipe: Path, tmp_path: Path) -> None:
    """Without an evaluation or a checkpoint at the end the files stand a step behind the journal, and --resume continues."""
    run = tmp_path / "run"
    assert train_here(recipe, run, STREAMED, "run.iterations=2").code == 0
    assert steps(run) == {1}
    assert train_here(recipe, run, STREAMED, "run.iterations=3", resume=True).code == 0
    assert steps(run) == {2}


def test_past_the_page_cache_or_in_the_other_residency_the_bits_are_the_same(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = ("eval.every=1", "eval.samples=4", "run.checkpoint_every=3")  # which brings every layer to the last step
    assert train_here(recipe, tmp_path / "resident", *evaluated, "memory.residency=resident").code == 0
    planned = Plan.of

    def past_the_page_cache(*of: object) -> Plan:
        plan = planned(*of)
        return replace(plan, execution=replace(plan.execution, direct=True))

    monkeypatch.setattr(Plan, "of", past_the_page_cache)
    streamed = train_here(recipe, tmp_path / "streamed", *evaluated, STREAMED)
    assert streamed.code == 0 and "streamed past the page cache" in streamed.out
    assert_same_run(tmp_path / "streamed", tmp_path / "resident")
    assert samples(tmp_path / "streamed") == samples(tmp_path / "resident")
