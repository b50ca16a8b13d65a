"""The number of workers, and what happens to them, changes no bit of a run."""

import random
import time
from pathlib import Path

import pytest
from support import assert_same_run, finished_run, left, start

KILLS = 20

pytestmark = pytest.mark.slow


def test_one_worker_gives_the_same_bits_as_two(recipe: Path, reference: Path, tmp_path: Path) -> None:
    assert_same_run(finished_run(recipe, tmp_path / "run", "workers.count=1"), reference)


def test_killing_workers_at_random_moments_changes_no_bit(recipe: Path, reference: Path, tmp_path: Path) -> None:
    moments = random.Random(1)
    kills = 0
    with start(recipe, tmp_path / "run") as live:
        while kills < KILLS:
            live.wait_for_records(live.records() + 1)  # so that no task loses three workers in a row
            for worker in live.workers():
                time.sleep(moments.uniform(0, 0.05))
                worker.kill()
                kills += 1
        finished = live.finish()
    assert finished.code == 0, finished.err
    assert finished.err.count("died (exit code -9); a new one repeats its") == kills
    assert_same_run(tmp_path / "run", reference)


def test_a_worker_that_hangs_is_replaced_and_changes_no_bit(recipe: Path, reference: Path, tmp_path: Path) -> None:
    with start(recipe, tmp_path / "run", "workers.deadline=8") as live:
        live.wait_for_records(3)
        worker = live.workers()[0]
        worker.suspend()
        finished = live.finish()
        assert left(live.process.pid) == []
    assert finished.code == 0, finished.err
    assert f"worker {worker.pid} exceeded its deadline and is replaced" in finished.err
    assert_same_run(tmp_path / "run", reference)
