"""tools/simulate_scale.py: without chance, a step takes what can be computed by hand; with it, longer; a table and a figure."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import numpy as np
import simulate_scale
from simulate_scale import Cluster, Parts, simulate, step_seconds

PARTS = Parts(score=0.5, update=1.0, pair=0.25)
STILL = Cluster(latency=0.125, call=0.01, bandwidth=100.0, spread=0.0, stragglers=0.0, failures=0.0)


def step(hosts: int, pairs: int, cluster: Cluster = STILL, sharded: float = 0.0, seed: int = 0) -> float:
    return step_seconds(hosts, pairs, PARTS, cluster, sharded, np.random.default_rng(seed))[0]


@pytest.mark.parametrize(
    ("hosts", "pairs", "sharded", "seconds"),
    [
        (1, 8, 0.0, 1 + 2 + 8),
        (4, 8, 0.0, 1 + 2 + 2),
        (16, 8, 0.0, 1 + 2 + 1),  # half of them have nothing to score
        (4, 8, 400.0, 1 + 0.5 + 3 + 2),  # a quarter of the update; three quarters of the weights come from others
    ],
)
def test_a_step_without_chance(hosts: int, pairs: int, sharded: float, seconds: float) -> None:
    assert step(hosts, pairs, sharded=sharded) == pytest.approx(seconds + 0.25 + 0.01 * hosts)


def test_what_a_straggler_or_a_lost_host_was_to_score_others_score() -> None:
    usual = step(10, 100)  # 26 s of update and 10 s of scoring for each host
    for changed in (Cluster(0.125, 0.01, 100.0, 0.0, 0.1, 0.0), Cluster(0.125, 0.01, 100.0, 0.0, 0.0, 10.0)):
        late = [step(10, 100, changed, seed=seed) for seed in range(40)]
        assert any(seconds == usual for seconds in late) and any(usual < seconds < 2 * usual for seconds in late)
        assert max(late) < 2.5 * usual  # five times as much without help


def test_efficiency_is_the_share_of_time_that_is_scoring() -> None:
    seconds, efficiency = simulate(4, 8, PARTS, STILL, steps=1)
    assert efficiency == pytest.approx(2 / seconds)


def test_the_command_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert simulate_scale.main(["--steps", "1", "--population", "64", "--out", str(tmp_path / "scale.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(simulate_scale.HOSTS) and "low rank, N = 16 a host" in lines[0]
    assert (tmp_path / "scale.png").stat().st_size > 10_000
