"""A run whose coordinator is killed at any moment, or that loses what it can make again, ends with the same bits when resumed."""

import itertools
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from support import (
    FITNESSES,
    NOISES,
    SHARED_TILES,
    Live,
    assert_same_run,
    digest,
    left,
    outlived,
    records,
    start,
    train,
    train_here,
)

KILLS = 5
STEPS = 60


@pytest.mark.long  # test_combinations.py does the same with fewer kills
@pytest.mark.slow
@pytest.mark.parametrize(("noise", "fitness"), zip(NOISES, itertools.cycle(FITNESSES), strict=False))
def test_a_run_killed_at_random_moments_and_resumed_ends_with_the_same_bits(noise: str, fitness: str, tmp_path: Path) -> None:
    exports = {"checkpoint_every": 3, "checkpoint_dtype": "fp32"}
    recipe = FITNESSES[fitness](
        tmp_path, run={"iterations": STEPS} | exports, eval={"every": 10, "samples": 4}, es=SHARED_TILES, noise=NOISES[noise]
    )
    reference, run = tmp_path / "reference", tmp_path / "run"
    assert train_here(recipe, reference).code == 0
    moments = random.Random(noise)
    start_up = 0.0
    for kill in range(KILLS):
        workers = moments.choice((1, 2))  # may differ from one resumption to the next
        with start(recipe, run, f"workers.count={workers}", resume=True) as live:
            if kill % 2:
                # Before a step is done, most of the time; but never so many steps that the run ends here.
                end, enough = time.monotonic() + moments.uniform(0, start_up), records(run) + 3
                while time.monotonic() < end and live.records() < enough:
                    time.sleep(0.002)
            else:
                start_up = seconds_to_records(live, records(run) + moments.randint(1, 3))
                time.sleep(moments.uniform(0, 0.1))
            assert live.process.poll() is None, live.err
            graders = live.graders()
            live.process.kill()
            live.process.wait()
            assert left(live.process.pid) == outlived(graders) == []
    assert records(run) < STEPS
    finished = train_here(recipe, run, resume=True)
    assert finished.code == 0, finished.err
    assert_same_run(run, reference)


def seconds_to_records(live: Live, count: int) -> float:
    began = time.monotonic()
    live.wait_for_records(count)
    return time.monotonic() - began


@pytest.mark.parametrize("present", [["master"], ["master", "lock"], ["master", "lock", "recipe.toml.next"]])
def test_what_a_kill_at_the_very_start_leaves_is_still_a_run_directory(recipe: Path, tmp_path: Path, present: list[str]) -> None:
    run = tmp_path / "run"
    (run / "master").mkdir(parents=True)
    for name in present[1:]:
        (run / name).write_text("")
    # It takes the directory if it gets as far as the draw of samples, which fails.
    finished = train_here(recipe, run, "fitness.samples=1000000", resume=True)
    assert finished.code == 2 and "fitness.samples = 1000000" in finished.err
    assert (run / "recipe.toml").exists()


@pytest.mark.slow
def test_a_lost_master_and_a_torn_record_are_made_again(recipe: Path, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run, ignore=shutil.ignore_patterns("checkpoint", "best"))
    shutil.rmtree(run / "master")
    os.truncate(run / "journal.jsonl", (run / "journal.jsonl").stat().st_size - 20)
    finished = train(recipe, run, resume=True)
    assert finished.code == 0, finished.err
    assert digest(run) == digest(reference)
