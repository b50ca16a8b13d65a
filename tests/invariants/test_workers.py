"""The number of workers, and what happens to them, changes no bit of a run."""

import random
import time
from pathlib import Path

import pytest
from support import assert_same_run, finished_run, left, metrics, samples, start

KILLS = 20
GRADER_KILLS = 8

pytestmark = pytest.mark.slow


@pytest.mark.long  # test_combinations.py does the same with four
def test_one_worker_gives_the_same_bits_as_two(undisturbed, tmp_path: Path) -> None:
    run = finished_run(undisturbed.recipe, tmp_path / "run", "workers.count=1")
    assert_same_run(run, undisturbed.run)
    assert samples(run) == samples(undisturbed.run)


def test_killing_workers_at_random_moments_changes_no_bit(undisturbed, tmp_path: Path) -> None:
    moments = random.Random(1)
    kills = 0
    with start(undisturbed.recipe, tmp_path / "run") as live:
        while kills < KILLS:
            live.wait_for_records(live.records() + 1)  # so that no task loses three workers in a row
            for worker in live.workers():
                time.sleep(moments.uniform(0, 0.05))
                worker.kill()
                kills += 1
        finished = live.finish()
    assert finished.code == 0, finished.err
    assert finished.err.count("died (exit code -9); a new one repeats its") == kills
    assert_same_run(tmp_path / "run", undisturbed.run)
    assert samples(tmp_path / "run") == samples(undisturbed.run)


def test_a_worker_that_hangs_is_replaced_and_changes_no_bit(undisturbed, tmp_path: Path) -> None:
    with start(undisturbed.recipe, tmp_path / "run", "workers.deadline=8") as live:
        live.wait_for_records(3)
        worker = live.workers()[0]
        worker.suspend()
        finished = live.finish()
        assert left(live.process.pid) == []
    assert finished.code == 0, finished.err
    assert f"worker {worker.pid} exceeded its deadline and is replaced" in finished.err
    assert_same_run(tmp_path / "run", undisturbed.run)
    assert samples(tmp_path / "run") == samples(undisturbed.run)


@pytest.mark.long
def test_killing_graders_at_random_moments_changes_no_bit(reward_recipe: Path, reward_reference: Path, tmp_path: Path) -> None:
    """The functions take their time, so that graders are killed at work too; another repeats the work."""
    functions = tmp_path / "rewards.py"
    code = (reward_recipe.parent / "rewards.py").read_text().replace("    return", "    time.sleep(0.03)\n    return")
    functions.write_text("import time\n" + code)
    names = f'reward.functions=["{functions}:near", "{functions}:even_format"]'
    moments = random.Random(1)
    with start(reward_recipe, tmp_path / "run", names) as live:
        for _ in range(GRADER_KILLS):
            live.wait_for_records(live.records() + 1)
            time.sleep(moments.uniform(0, 0.3))
            moments.choice(live.graders()).kill()
        assert live.process.poll() is None
        finished = live.finish()
    assert (finished.code, finished.err) == (0, "")
    assert_same_run(tmp_path / "run", reward_reference)
    assert sum(line.get("graders_killed", 0) for line in metrics(tmp_path / "run")) == 0
