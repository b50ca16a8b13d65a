"""The invariants in the combinations of noise, weights, master and residency: workers, kills, replay, damage.

For each noise, storage and fitness, one undisturbed resident run of one worker is the reference: its journal, layer files and
exports are what all others must have, byte for byte. Undisturbed runs are compared in all combinations; those in which something
is killed, which takes seconds, have one kind of noise for each storage and residency, in turn. Rewards take turns with both.
"""

import itertools
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import (
    FITNESSES,
    NOISES,
    SHARED_TILES,
    TINY,
    assert_same_run,
    digest,
    left,
    metrics,
    outlived,
    records,
    replayed,
    samples,
    start,
    tensors,
    train_here,
)

from es_lite import replay
from es_lite.fitness.kinds import fitness_of
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.recipe import Recipe

pytestmark = pytest.mark.slow

STEPS = 14
KILLS = 2

STORAGES = [(weights, master) for weights in ("bf16", "int8") for master in ("fp32", "none")]
RESIDENCIES = ("resident", "streamed")
KINDS = ("lowrank 1", "gaussian", "rademacher")

Settings = dict[str, dict[str, Any]]

PLAIN: Settings = {"workers": {"compute": "bf16"}}
"""The working copy, if it is bf16, is multiplied as it is under low-rank noise."""
CROWDED: Settings = {
    "workers": {"compute": "fp32"},
    "noise": {"shared": True},
    "es": {
        "antithetic": False,
        "scale": "nes",
        "alpha": 1e-3,
        "weight_decay": 0.5,
        "groups": [{"pattern": "k_proj", "sigma": 0.0, "alpha": 0.0}, {"pattern": "mlp|norm", "sigma": 2.0, "alpha": 0.5}],
    },
}
"""Everything in a recipe that changes what noise does: a frozen group, another with factors, and so on."""

SETTINGS = {
    "plain": ("logprob", PLAIN),
    "crowded": ("logprob", CROWDED),
    "rewards": ("reward", PLAIN),
    "crowded rewards": ("reward", CROWDED),
}
"""A fitness, and tables of the recipe."""


class Reference:
    """A noise, a storage and settings, a recipe with these, and the run to compare with."""

    def __init__(self, folder: Path, noise: str, weights: str, master: str, settings: str) -> None:
        fitness, tables = SETTINGS[settings]
        # Untied if there is no master: the embedding is then a layer that passes by itself, after the head.
        config = TINY | {"tie_word_embeddings": master == "fp32"}
        self.recipe = FITNESSES[fitness](
            folder,
            run={"iterations": STEPS, "checkpoint_every": 5, "checkpoint_dtype": "fp32"},
            model={"config": config},
            memory={"weights": weights, "master": master},
            eval={"every": 7, "samples": 4},
            es=SHARED_TILES | tables.get("es", {}),
            noise=NOISES[noise] | tables.get("noise", {}),
            workers=tables["workers"],
        )
        self.run = folder / "reference"
        assert train_here(self.recipe, self.run, "memory.residency=resident", "workers.count=1").code == 0


References = Callable[[str, str, str, str], Reference]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """The reference of a noise, a storage and settings, made when it is first asked for."""

    @cache
    def reference(noise: str, weights: str, master: str, settings: str) -> Reference:
        return Reference(tmp_path_factory.mktemp("reference"), noise, weights, master, settings)

    return reference


PLAIN_CASES = [(noise, *storage, "plain") for noise in KINDS for storage in STORAGES]
CROWDED_CASES = [(noise, *storage, "crowded") for noise, storage in zip(NOISES, STORAGES, strict=True)]
REWARDS_CASES = [(noise, *storage, "rewards") for noise, storage in zip(itertools.cycle(KINDS), STORAGES, strict=False)]
CROWDED_REWARDS_CASES = [(noise, *storage, "crowded rewards") for noise, storage in zip(NOISES, reversed(STORAGES), strict=True)]
FROZEN_CASES = [case for case in (*CROWDED_CASES, *CROWDED_REWARDS_CASES) if case[2] == "fp32"]
EVERY_REFERENCE = pytest.mark.parametrize(
    ("noise", "weights", "master", "settings"), [*PLAIN_CASES, *CROWDED_CASES, *REWARDS_CASES, *CROWDED_REWARDS_CASES]
)


def in_turn(*ways: tuple) -> list:
    """(noise, weights, master, *way, "plain") for every storage and way; each of these has other kinds of noise in turn."""
    found = []
    for s, storage in enumerate(STORAGES):
        for w, way in enumerate(ways):
            case = (KINDS[(s + w) % len(KINDS)], *storage, *way)
            found.append(pytest.param(*case, "plain", id="-".join(map(str, case))))
    return found


def rewards_in_turn(*ways: tuple) -> list:
    """(noise, weights, master, *way, "rewards") for every storage, with a way in turn."""
    cases = zip(REWARDS_CASES, itertools.cycle(ways), strict=False)
    return [pytest.param(*case[:3], *way, "rewards", id="-".join(map(str, (*case[:3], *way, "rewards")))) for case, way in cases]


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


@pytest.mark.parametrize(("noise", "weights", "master", "settings"), [*REWARDS_CASES, *CROWDED_REWARDS_CASES])
def test_members_write_other_texts_that_end_at_different_times(
    references: References, noise: str, weights: str, master: str, settings: str
) -> None:
    """Or this file would say nothing of sequences that leave a tile before others."""
    run = references(noise, weights, master, settings).run
    assert sum(line["score_std"] > 1e-3 for line in metrics(run)[1:]) == STEPS
    assert sum(0 < line["cut"] < 1 for line in metrics(run)[1:]) > STEPS // 2, "all end together"


@pytest.mark.parametrize(("noise", "weights", "master", "settings"), FROZEN_CASES)
def test_a_frozen_group_stays_as_it_was_and_all_else_moves(
    references: References, noise: str, weights: str, master: str, settings: str, tmp_path: Path
) -> None:
    run = references(noise, weights, master, settings).run
    before, after = replayed(run, tmp_path / "before", "--step", "0"), tensors(run)
    for name, values in before.items():
        assert np.array_equal(values, after[name]) == ("k_proj" in name), name


@pytest.mark.parametrize(
    ("noise", "weights", "master", "residency", "workers", "settings"),
    [
        *in_turn(("resident", 2), ("resident", 5), ("streamed", 2)),
        *rewards_in_turn(("streamed", 2), ("resident", 2), ("resident", 5)),
    ],
)
def test_killing_workers_at_random_moments_changes_no_bit(
    references: References,
    noise: str,
    weights: str,
    master: str,
    residency: str,
    workers: int,
    settings: str,
    tmp_path: Path,
) -> None:
    """What a killed one had half done, such as a layer's file, is done again."""
    reference, moments, kills = references(noise, weights, master, settings), random.Random(1), 0
    with start(reference.recipe, tmp_path / "run", f"memory.residency={residency}", f"workers.count={workers}") as live:
        while kills < KILLS:
            live.wait_for_records(live.records() + 1)  # so that no task loses three workers in a row
            time.sleep(moments.uniform(0, 0.05))
            moments.choice(live.workers()).kill()
            kills += 1
        finished = live.finish()
    assert finished.code == 0, finished.err
    assert finished.err.count("died (exit code -9); a new one repeats its") == kills
    assert_same_run(tmp_path / "run", reference.run)
    assert samples(tmp_path / "run") == samples(reference.run)


@pytest.mark.parametrize(
    ("noise", "weights", "master", "residency", "settings"),
    [*in_turn(("resident",), ("streamed",)), *rewards_in_turn(("resident",), ("streamed",))],
)
def test_a_run_killed_at_random_moments_and_resumed_ends_with_the_same_bits(
    references: References, noise: str, weights: str, master: str, residency: str, settings: str, tmp_path: Path
) -> None:
    """The first kill may fall while the files are made; the part before the last kill is run in the other residency."""
    reference, run = references(noise, weights, master, settings), tmp_path / "run"
    moments = random.Random(f"{weights}-{master} {residency}")
    other = RESIDENCIES[residency == "resident"]
    for kill in range(KILLS):
        now = other if kill == KILLS - 1 else residency
        workers = f"workers.count={1 + kill % 2}"
        with start(reference.recipe, run, f"memory.residency={now}", workers, resume=True) as live:
            if kill or moments.random() < 0.5:
                live.wait_for_records(records(run) + moments.randint(1, 2))
            else:
                live.wait_until(lambda: bool([*run.glob("master/*.next"), *run.glob("weights/*.next"), *run.glob("*/final.*")]))
            time.sleep(moments.uniform(0, 0.06))
            graders = live.graders()
            live.process.kill()
            live.process.wait()
            assert left(live.process.pid) == outlived(graders) == []
    assert records(run) < STEPS
    finished = train_here(reference.recipe, run, f"memory.residency={residency}", resume=True)
    assert finished.code == 0, finished.err
    assert_same_run(run, reference.run)
    # What a kill left without its line in the metrics is written again.
    assert all(sample in samples(reference.run) for sample in samples(run))


@EVERY_REFERENCE
def test_the_journal_alone_gives_the_weights(
    references: References, noise: str, weights: str, master: str, settings: str, tmp_path: Path
) -> None:
    reference = references(noise, weights, master, settings)
    journal, out = reference.run / "journal.jsonl", tmp_path / "out"
    assert replay.main([str(journal), "--out", str(out), "--dtype", "fp32"]) == 0
    assert (out / "model.safetensors").read_bytes() == (reference.run / "checkpoint/model.safetensors").read_bytes()


@pytest.mark.parametrize(("noise", "weights", "master", "residency", "settings"), in_turn(("resident",), ("streamed",)))
def test_damaged_files_are_named_and_made_again(
    references: References, noise: str, weights: str, master: str, residency: str, settings: str, tmp_path: Path
) -> None:
    """A layer file with one bit changed, one that is cut short, and one that is another layer's: refused, then rebuilt."""
    reference = references(noise, weights, master, settings)
    run, overrides = tmp_path / "run", (f"memory.residency={residency}", "run.iterations=3")
    assert train_here(reference.recipe, run, *overrides).code == 0
    files = {path.stem: path for path in (*run.glob("master/*"), *run.glob("weights/*"))}
    whole = files["block-001"].read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 4
    other = files["block-000"].read_bytes()
    before = digest(run)
    for damaged, word in ((bytes(flipped), "checksum"), (whole[:-1], "bytes"), (other, "is not block-001")):
        files["block-001"].write_bytes(damaged)
        refused = train_here(reference.recipe, run, *overrides, resume=True)
        assert (refused.code, refused.out.count("3 of 3")) == (2, 0)
        assert "block-001.safetensors" in refused.err and word in refused.err and "--rebuild" in refused.err
        assert files["block-001"].read_bytes() == damaged
    rebuilt = train_here(reference.recipe, run, *overrides, resume=True, rebuild=True)
    assert rebuilt.code == 0, rebuilt.err
    assert "block-001" in rebuilt.out
    assert digest(run) == before
