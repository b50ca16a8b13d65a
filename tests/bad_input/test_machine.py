"""A machine that has too little memory, or no GPU, for what the recipe asks; said before anything is made."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import message_of, refused
from support import ROOT

from es_lite.plan import main as plan

AVAILABLE = "0.49 are available (memory.limit of the recipe)"


def test_too_little_memory_is_said_before_anything_is_made(recipe: Path, tmp_path: Path) -> None:
    message = refused(recipe, tmp_path / "run", "memory.limit=500 MiB")
    assert re.search(rf"needs [0-9.]+ GiB of memory, {re.escape(AVAILABLE)}", message)
    assert "workers.count" in message and "coordinator" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("residency", "part"), [("resident", "working copy"), ("streamed", "window"), ("auto", "window")])
def test_the_plan_of_what_does_not_fit_ends_with_exit_code_2(recipe: Path, tmp_path: Path, residency: str, part: str) -> None:
    """By the command in a process of its own. "auto": the plan is to stream, which needs the least."""
    settings = (f"run.dir={tmp_path}/run", "memory.limit=500 MiB", f"memory.residency={residency}")
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "es_lite.plan", str(recipe), *overrides]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 2
    assert part in planned.stdout
    assert f"GiB of memory, {AVAILABLE}" in message_of(planned.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_does_not_exist_is_refused(recipe: Path, tmp_path: Path) -> None:
    assert "torch finds no GPU here" in refused(recipe, tmp_path / "run", "workers.device=cuda")
    assert not (tmp_path / "run").exists()


def test_the_plan_of_a_bad_recipe_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan([str(recipe), "--set", "es.sigma=0"]) == 2
    assert 'es.sigma = 0.0: expected "auto" or a number greater than 0' in message_of(capsys.readouterr().err)
