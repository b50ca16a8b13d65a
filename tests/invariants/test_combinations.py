"""The invariants in the combinations of noise, weights, master and residency: workers and replay.

Rewards take turns with all of them. test_killed_combinations.py has runs in which something is killed,
test_damaged_combinations.py damaged files.
"""

from pathlib import Path

import numpy as np
import pytest
from combinations import (
    CROWDED_REWARDS_CASES,
    EVERY_REFERENCE,
    FROZEN_CASES,
    KINDS,
    REWARDS_CASES,
    STEPS,
    STORAGES,
    References,
    references_of,
)
from support import assert_same_run, metrics, replayed, samples, tensors, train_here

from es_lite import replay
from es_lite.fitness.kinds import fitness_of
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.recipe import Recipe

pytestmark = pytest.mark.slow


def evaluations(run: Path) -> list[float | None]:
    return [line["eval_score"] for line in metrics(run)]


@EVERY_REFERENCE
def test_many_workers_or_streamed_weights_change_no_bit(
    references: References, noise: str, weights: str, master: str, settings: str, tmp_path: Path
) -> None:
    """Nor do they change the score of an evaluation. Four workers share the blocks; streamed, two are lanes."""
    reference = references(noise, weights, master, settings)
    for residency, workers in (("resident", 4), ("streamed", 2)):
        run = tmp_path / residency
        finished = train_here(reference.recipe, run, f"memory.residency={residency}", f"workers.count={workers}")
        assert finished.code == 0, finished.err
        assert_same_run(run, reference.run)
        assert evaluations(run) == evaluations(reference.run)
        assert samples(run) == samples(reference.run)


@pytest.mark.parametrize("noise", KINDS)
def test_two_pairs_of_low_rank_noise_share_a_tile(references: References, noise: str) -> None:
    """Or this file would say nothing of such tiles."""
    for settings, storage in (("plain", STORAGES[0]), ("rewards", STORAGES[KINDS.index(noise)])):
        recipe = Recipe.load(references(noise, *storage, settings).recipe)
        model, layout = Origin.of_recipe(recipe).skeleton()
        execution = Plan.of(recipe, fitness_of(recipe.fitness.kind), model.config, layout).execution
        assert (execution.tile_members, execution.group) == ((4, 2) if noise == "lowrank 1" else (1, 1))


@references_of(*REWARDS_CASES, *CROWDED_REWARDS_CASES)
def test_members_write_other_texts_that_end_at_different_times(
    references: References, noise: str, weights: str, master: str, settings: str
) -> None:
    """Or this file would say nothing of sequences that leave a tile before others."""
    run = references(noise, weights, master, settings).run
    assert sum(line["score_std"] > 1e-3 for line in metrics(run)[1:]) == STEPS
    assert sum(0 < line["cut"] < 1 for line in metrics(run)[1:]) > STEPS // 2, "all end together"


@references_of(*FROZEN_CASES)
def test_a_frozen_group_stays_as_it_was_and_all_else_moves(
    references: References, noise: str, weights: str, master: str, settings: str, tmp_path: Path
) -> None:
    run = references(noise, weights, master, settings).run
    before, after = replayed(run, tmp_path / "before", "--step", "0"), tensors(run)
    for name, values in before.items():
        assert np.array_equal(values, after[name]) == ("k_proj" in name), name


@EVERY_REFERENCE
def test_the_journal_alone_gives_the_weights(
    references: References, noise: str, weights: str, master: str, settings: str, tmp_path: Path
) -> None:
    reference = references(noise, weights, master, settings)
    journal, out = reference.run / "journal.jsonl", tmp_path / "out"
    assert replay.main([str(journal), "--out", str(out), "--dtype", "fp32"]) == 0
    assert (out / "model.safetensors").read_bytes() == (reference.run / "checkpoint/model.safetensors").read_bytes()
