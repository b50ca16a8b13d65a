"""tools/gpu_check.py: on the tiny model with the GPU's code on the CPU, and what it says if something is wrong."""

import json
import subprocess
from pathlib import Path

import gpu_check
import pytest
import torch
from _measuring import Finished, StepLoad
from support import ROOT, TINY


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs the command on the tiny model, with a test that passes. Returns its exit code."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "test_pass.py").write_text("def test_pass(): pass\n")
    words = ["--config", tmp_path / "tiny.json", "--length", 32, "--samples", 2, "--micro-batch", 2, "--population", 4]
    words += ["--directory", tmp_path, "--out", tmp_path / "gpu.md", "--device", "torch"]

    def check(*more: object, tests: Path = tmp_path / "test_pass.py") -> int:
        return gpu_check.main([*map(str, [*words, "--tests", tests, *more])])

    return check


@pytest.fixture
def runs(monkeypatch):
    """Replaces the real command by invented runs. Returns their scores and compute types, by device, to be changed."""
    scores: dict[str, list[float | None]] = {"cpu": [-2.0, -4.0], "torch": [-2.0, -4.0]}
    computes = {"cpu": "fp32", "torch": "fp32"}

    def run(load: StepLoad, steps: int, directory: str | None, *, workers: dict, memory: dict) -> Finished:
        seconds = {"cpu": 6.0, "torch": 2.0}[workers["device"]]
        line = {"step_seconds": seconds, "score_seconds": seconds / 2, "peak_pss_gib": 1.5}
        compute = computes[workers["device"]] if workers["compute"] == "auto" else workers["compute"]
        return Finished([line] * steps, [scores[workers["device"]]] * steps, compute)

    monkeypatch.setattr(gpu_check, "run", run)
    return scores, computes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "gpu.md")]) == 2
    error = capsys.readouterr()
    assert error.err == "gpu_check: torch finds no GPU here: run this on a machine with one, with torch installed for it\n"
    assert error.out == "" and list(tmp_path.iterdir()) == []


def test_an_out_that_cannot_be_written_is_refused_first(check, capsys, tmp_path):
    assert check("--out", tmp_path / "nowhere/gpu.md") == 2
    assert capsys.readouterr().err.endswith("nowhere is not a folder\n")


def test_each_comparison_is_written_down_with_its_tolerance(check, runs, tmp_path, capsys):
    scores, computes = runs
    scores["torch"], computes["cpu"] = [-2.0, -4.0008], "bf16"
    assert check() == 1
    text = (tmp_path / "gpu.md").read_text()
    assert "1 passed" in text and "commit " in text and "torch 2" in text and "cores" in text
    for weights in ("bf16", "int8"):
        for residency in ("resident", "streamed"):
            assert f"| {weights}, {residency} | bf16 and fp32 | 6 (6–6) | 2 (2–2) | 3 (3–3) | 3 (3–3) | 1 (1–1) |" in text
            assert f"| {weights}, {residency} | bf16 and fp32 | 2.0e-04 | 2e-03 | agree |" in text
        assert f"| {weights}, resident | fp32 | 2.0e-04 | 1e-04 | **differ** |" in text
    assert "scores differ by more than the tolerance: bf16, resident, fp32; int8, resident, fp32\n" in capsys.readouterr().err
    scores["torch"] = [-2.0, -4.0003]
    assert check() == 0
    assert "| fp32 | 7.5e-05 | 1e-04 | agree |" in (tmp_path / "gpu.md").read_text()


def test_a_score_that_is_not_finite_does_not_agree(check, runs, tmp_path):
    scores, _ = runs
    scores["torch"] = [-2.0, None]
    assert check("--weights", "int8", "--residency", "streamed") == 1
    assert "| int8, streamed | fp32 | inf | 1e-04 | **differ** |" in (tmp_path / "gpu.md").read_text()


def test_a_test_that_fails_is_reported(check, runs, tmp_path, capsys):
    failing = tmp_path / "test_fail.py"
    failing.write_text("def test_fail(): assert False\n")
    assert check(tests=failing) == 1
    assert "gpu_check: tests failed: 1 failed" in capsys.readouterr().err
    assert "Tests that use a GPU: 1 failed" in (tmp_path / "gpu.md").read_text()


def test_a_run_that_fails_ends_it(check, monkeypatch, tmp_path, capsys):
    def run(*_: object, **__: object) -> Finished:
        raise subprocess.CalledProcessError(7, "the command")

    monkeypatch.setattr(gpu_check, "run", run)
    assert check() == 1
    assert "the command failed with exit code 7" in capsys.readouterr().err
    assert not (tmp_path / "gpu.md").exists()


def test_the_tests_that_use_a_gpu_are_found():
    found = {str(path.relative_to(ROOT / "tests")) for path in gpu_check.tests_that_use_a_gpu()}
    assert found >= {"algorithm/noise/test_on_device.py", "scoring/test_device.py"}


@pytest.mark.long
@pytest.mark.slow
def test_with_the_gpus_code_on_the_cpu(check, tmp_path):
    """Streamed for the measured runs, resident for those in fp32: all that `--device cuda` would do but for the other weights."""
    assert check("--weights", "int8", "--residency", "streamed", "--repeats", 1) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "| int8, streamed | " in text and "| int8, resident | fp32 | " in text
    assert text.count("| agree |") == 2 and "GPU: none" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.md", "test_pass.py", "tiny.json"]
