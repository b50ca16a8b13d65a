"""Workers and runs that are killed, in the combinations of noise, weights, master and residency.

They take seconds, so each storage and residency has one kind of noise, in turn.
"""

import random
import time
from pathlib import Path

import pytest
from combinations import STEPS, References, in_turn, rewards_in_turn
from support import assert_same_run, left, outlived, records, samples, start, train_here

pytestmark = [pytest.mark.slow, pytest.mark.long]

KILLS = 2
RESIDENCIES = ("resident", "streamed")


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
