"""tools/compare_rounding.py: training without a master stays close to training with one; with rounding to nearest it does not."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import compare_rounding


@pytest.mark.long
def test_over_300_steps_the_held_out_score_stays_close_to_the_masters(tmp_path: Path) -> None:
    """At every evaluation; rounded to nearest, int8 learns nothing and bfloat16 less. One seed: every machine finds the same."""
    paths = {way: np.array(runs[0]) for way, runs in compare_rounding.all_paths(1, 300).items()}
    master = paths["fp32 master, bf16 weights"]
    gain = master[-1] - master[0]
    assert gain > 0.2
    for way in ("bf16, stochastic", "int8, stochastic"):
        assert np.abs(paths[way] - master).max() < 0.15 * gain, way
    assert paths["int8, to nearest"][-1] - paths["int8, to nearest"][0] < 0.05 * gain
    assert paths["bf16, to nearest"][-1] - paths["bf16, to nearest"][0] < 0.75 * gain
    compare_rounding.draw({way: [list(path)] for way, path in paths.items()}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
