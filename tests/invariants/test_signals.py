"""Ctrl-C and SIGTERM: once ends the run after the step, twice at once; either way nothing is lost."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from support import assert_same_run, left, metrics, outlived, records, start, train

STOPPING = "\nstopping after this step; press Ctrl-C again to stop now (--resume then repeats this step)\n"

pytestmark = pytest.mark.slow


def test_ctrl_c_or_sigterm_end_the_run_after_the_step_and_resuming_changes_no_bit(undisturbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe, reference = undisturbed
    for number, more in ((signal.SIGINT, 4), (signal.SIGTERM, 3)):
        with start(recipe, run, resume=True) as live:
            live.wait_for_records(records(run) + more)
            graders = live.graders()
            os.killpg(live.process.pid, number)  # as a terminal or a supervisor does
            finished = live.finish()
            assert left(live.process.pid) == outlived(graders) == []
        assert (finished.code, finished.err) == (0, STOPPING)
        assert f"add --resume to continue from step {records(run)}" in finished.out
        assert json.loads((run / "checkpoint/es_lite.json").read_text())["step"] == records(run) < records(reference)
        assert metrics(run)[-1]["step"] == records(run)
        (run / "master/block-001.safetensors").unlink()  # θ₀ and the journal make it again
    assert train(recipe, run, resume=True).code == 0
    assert_same_run(run, reference)


def test_ctrl_c_while_the_workers_start_is_quiet(recipe: Path, tmp_path: Path) -> None:
    with start(recipe, tmp_path / "run") as live:
        live.wait_until(lambda: len(live.workers()) == 2)
        time.sleep(0.5)
        os.killpg(live.process.pid, signal.SIGINT)
        finished = live.finish()
        assert left(live.process.pid) == []
    assert (finished.code, finished.err) == (0, STOPPING)
    assert (tmp_path / "run/checkpoint/model.safetensors").exists()


def test_ctrl_c_twice_ends_at_once(recipe: Path, tmp_path: Path) -> None:
    with start(recipe, tmp_path / "run", "es.population=8192") as live:
        live.wait_until(lambda: "step 0/" in live.out)
        time.sleep(0.5)
        os.killpg(live.process.pid, signal.SIGINT)
        time.sleep(0.5)
        assert live.process.poll() is None
        os.killpg(live.process.pid, signal.SIGINT)
        finished = live.finish()
        assert left(live.process.pid) == []
    assert finished.code == 130
    assert finished.err == STOPPING + "es_lite: stopped immediately; add --resume to continue\n"
    assert records(tmp_path / "run") == 0
