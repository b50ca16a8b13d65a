"""Steps in which all members score the same are said, and end the run after a few."""

import json
from pathlib import Path

import pytest
from support import train_here, write_recipe, write_reward_recipe

from es_lite.run import TIED_REWARD_STEPS, TIED_STEPS

FROZEN = {"groups": [{"pattern": ".", "sigma": 0.0, "alpha": 0.0}]}


def test_log_probabilities(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, run={"iterations": 20}, es=FROZEN)
    finished = train_here(recipe, tmp_path / "run")
    assert finished.code == 1
    assert finished.err.count("warning: step 1: all members score the same") == 1
    assert f"step {TIED_STEPS}, the last of {TIED_STEPS} in a row: all members score the same" in finished.err
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == TIED_STEPS - 1
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [step["score_std"] for step in steps] == [0] * (TIED_STEPS - 1)


def test_rewards(tmp_path: Path) -> None:
    recipe = write_reward_recipe(tmp_path, run={"iterations": 30}, eval={"every": 0})
    (tmp_path / "nothing.py").write_text("def nothing(completions, **_):\n    return [0.0] * len(completions)\n")
    finished = train_here(recipe, tmp_path / "run", f'reward.functions=["{tmp_path}/nothing.py:nothing"]', "reward.weights=[1.0]")
    assert finished.code == 1
    assert "warning: step 1: all members earn the same (0), so the step moves nothing: take easier prompts" in finished.err
    assert f"the last of {TIED_REWARD_STEPS} in a row: all members earn the same" in finished.err


@pytest.mark.slow
def test_a_step_with_a_difference_begins_the_count_anew(tmp_path: Path) -> None:
    """Here every fourth step has one: the reward counts its own calls."""
    recipe = write_reward_recipe(tmp_path, run={"iterations": 12}, eval={"every": 0})
    counter = tmp_path / "steps"
    counter.write_text("")
    (tmp_path / "some.py").write_text(
        "def some(completions, completion_ids, trainer_state=None, **_):\n"
        "    step = trainer_state.global_step if trainer_state else 0\n"
        "    return [float(sum(ids)) if step % 4 == 3 else 0.0 for ids in completion_ids]\n"
    )
    finished = train_here(recipe, tmp_path / "run", f'reward.functions=["{tmp_path}/some.py:some"]', "reward.weights=[1.0]")
    assert finished.code == 0, finished.err
    assert finished.err.count("all members earn the same") == 3
