"""workers.device = "torch", which runs the GPU's code on the CPU, through the real command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import FITNESSES, NOISES, SHARED_TILES, digest, export_digest, leftovers, records, samples, train_here

from es_lite import replay

STEPS = 4
TORCH = "workers.device=torch"


class Runs:
    """Runs of one recipe: on the device, resident and streamed, and two steps with the CPU's kernels."""

    def __init__(self, folder: Path, fitness: str, noise: str, weights: str, master: str) -> None:
        self.recipe = FITNESSES[fitness](
            folder,
            run={"iterations": STEPS, "checkpoint_every": STEPS, "checkpoint_dtype": "fp32"},
            memory={"weights": weights, "master": master},
            workers={"compute": "fp32"},
            es=SHARED_TILES,
            noise=NOISES[noise],
            eval={"every": 2, "samples": 4},
        )
        self.resident = self.run(folder / "resident", TORCH, "memory.residency=resident")
        self.streamed = self.run(folder / "streamed", TORCH, "memory.residency=streamed")
        self.cpu = self.run(folder / "cpu", "run.iterations=2")

    def run(self, run: Path, *overrides: str, resume: bool = False) -> Path:
        finished = train_here(self.recipe, run, *overrides, resume=resume)
        assert finished.code == 0, finished.err
        assert (TORCH in overrides) == ("on torch" in finished.out)
        return run


CASES = [
    *(("logprob", "gaussian", "bf16", "fp32"), ("logprob", "gaussian", "int8", "none")),
    *(("logprob", "rademacher", "bf16", "none"), ("logprob", "rademacher", "int8", "fp32")),
    *(("logprob", "lowrank 1", "bf16", "fp32"), ("logprob", "lowrank 1", "int8", "none")),
    *(("logprob", "lowrank 3", "bf16", "none"), ("logprob", "lowrank 3", "int8", "fp32")),
    *(("reward", "gaussian", "int8", "fp32"), ("reward", "rademacher", "bf16", "fp32")),
    *(("reward", "lowrank 1", "bf16", "none"), ("reward", "lowrank 3", "int8", "none")),
]
"""Fitness, noise, weights and master: log-probability of every kind with both weights, of every storage with two kinds; rewards
of every kind and every storage."""


SOON = (CASES[1], CASES[4], CASES[9])
"""Every kind of noise, every storage but one and both fitnesses are among these; the others are long."""

IN_TURN = [case if case in SOON else pytest.param(case, marks=pytest.mark.long) for case in CASES]


@pytest.fixture(scope="module", params=IN_TURN, ids=["-".join(case) for case in CASES])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), *request.param)


def scores(run: Path, step: int) -> np.ndarray:
    return np.array(json.loads((run / "journal.jsonl").read_text().splitlines()[1 + step])["scores"])


def test_streamed_and_resident_give_the_same_bits(runs: Runs) -> None:
    assert digest(runs.streamed) == digest(runs.resident)
    assert export_digest(runs.streamed) == export_digest(runs.resident)
    assert leftovers(runs.streamed) == leftovers(runs.resident) == []
    assert samples(runs.streamed) == samples(runs.resident)


def test_the_first_scores_agree_with_those_of_the_cpus_kernels(runs: Runs) -> None:
    on_device, on_cpu = scores(runs.resident, 0), scores(runs.cpu, 0)
    assert np.ptp(on_cpu) > 1e-3  # they tell members apart
    np.testing.assert_allclose(on_device, on_cpu, rtol=0, atol=2e-6)


def test_the_journal_gives_the_checkpoint(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert replay.main([str(runs.streamed), "--out", str(out), "--dtype", "fp32"]) == 0
    assert (out / "model.safetensors").read_bytes() == (runs.streamed / "checkpoint/model.safetensors").read_bytes()


def test_a_run_stopped_on_the_device_and_resumed_has_the_same_bits(runs: Runs, tmp_path: Path) -> None:
    run = runs.run(tmp_path / "run", TORCH, "run.iterations=2", "memory.residency=streamed", "run.checkpoint_every=0")
    runs.run(run, TORCH, "memory.residency=resident", resume=True)
    assert digest(run) == digest(runs.resident)
    assert samples(run) == samples(runs.resident)


def test_a_run_of_the_cpu_continues_on_the_device(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.cpu, run)
    runs.run(run, TORCH, resume=True)
    before, after = ((folder / "journal.jsonl").read_bytes() for folder in (runs.cpu, run))
    assert after.startswith(before) and (records(runs.cpu), records(run)) == (2, STEPS)
    assert json.loads((run / "checkpoint/es_lite.json").read_text())["step"] == STEPS
