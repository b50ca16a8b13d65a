"""tools/plot_run.py: the command."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from support import ROOT

TOOL = ROOT / "tools/plot_run.py"


def plot(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)


def write_run(run: Path, steps: int = 20, **changes: object) -> Path:
    """Writes the metrics of a run of `steps` steps; `changes` replace keys on every line after step 0."""
    run.mkdir()
    lines: list[dict] = [{"step": 0, "eval_score": -9.1, "unigram_score": -6.3, "vocab_size": 8192, "pss_gib": 1.2}]
    for step in range(1, steps + 1):
        mean = -9.0 + step / 10
        lines.append(
            {"step": step, "score_mean": mean, "score_std": 0.1, "score_best": mean + 0.2}
            | {"eval_score": mean - 0.1 if step % 5 == 0 else None, "tokens_per_second": 400.0}
            | {"score_seconds": 9.0, "update_seconds": 1.5, "pss_gib": 1.8, "peak_pss_gib": 2.1}
            | changes
        )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def check_picture(path: Path, colours: int = 1) -> None:
    """It is a PNG of the right size, in which each of the first `colours` run colours is really drawn."""
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1400, 900)
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    for colour in ((0x0B, 0x6E, 0x99), (0xD9, 0x73, 0x0D))[:colours]:
        assert (abs(pixels - colour).max(axis=-1) < 3).sum() > 1000


def test_a_run_is_drawn_into_its_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    result = plot(run)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{run}/plot.png\n", "")
    check_picture(run / "plot.png")


def test_runs_are_overlaid(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", 30, score_mean=-7.0, tokens_per_second=500.0, pss_gib=1.5, peak_pss_gib=2.5)
    result = plot(one, other, "--out", tmp_path / "both.png")
    assert (result.returncode, result.stderr) == (0, "")
    check_picture(tmp_path / "both.png", colours=2)
    assert not (one / "plot.png").exists()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as metrics:
        metrics.write('{"step": 21, "note": "é'.encode()[:-1])
    result = plot(run)
    assert result.returncode == 0
    assert result.stderr == f"plot_run: {run}/metrics.jsonl, line 22 is not complete and is left out\n"
    check_picture(run / "plot.png")


def test_a_key_may_be_null_on_every_line(tmp_path: Path) -> None:
    keys = ("score_mean", "score_std", "update_seconds", "tokens_per_second", "peak_pss_gib", "eval_score")
    result = plot(*(write_run(tmp_path / key, **{key: None}) for key in keys), "--out", tmp_path / "plot.png")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_just_begun(tmp_path: Path, steps: int) -> None:
    result = plot(write_run(tmp_path / "run", steps))
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "run/plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read (No such file or directory); give the folder of a run"), ("", "no step in it yet")],
)
def test_missing_or_empty_metrics(tmp_path: Path, content: str | None, message: str) -> None:
    good, bad = write_run(tmp_path / "good"), tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "metrics.jsonl").write_text(content)
    result = plot(good, bad)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"plot_run: {bad}/metrics.jsonl: {message}\n"
    assert not (good / "plot.png").exists()


def test_an_out_that_cannot_be_written(tmp_path: Path) -> None:
    out = tmp_path / "nowhere/plot.png"
    result = plot(write_run(tmp_path / "run"), "--out", out)
    assert result.returncode == 2
    assert result.stderr == f"plot_run: {out}: cannot be written (No such file or directory)\n"
