"""tools/plot_run.py: the command."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import _examples
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


def write_reward_run(run: Path, steps: int = 20) -> Path:
    """The same for a run with rewards, which writes on two prompts in every fifth step."""
    write_run(run, steps, generated_tokens=900, length=50.0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = []
    for line in lines:
        if line.get("eval_score") is not None:
            line |= {"eval_accuracy": 0.5, "eval_format": 0.75, "eval_length": 80.0 - line["step"], "eval_cut": 0.25}
            asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How\nmany?"}]
            written = f"After step {line['step']}: about $5 and $6, \t\x00 家 " + "a long story " * 60
            samples.append({"step": line["step"], "prompt": asked, "completion": written, "score": -9.5, "cut": True})
            samples.append({"step": line["step"], "prompt": "Which one?", "completion": "", "score": None, "cut": False})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return run


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    return struct.unpack(">II", path.read_bytes()[16:24])


def check_picture(path: Path, colours: int = 1) -> None:
    """It is a PNG of the right size, in which each of the first `colours` run colours is really drawn."""
    assert size(path) == (1400, 1200)
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


def test_a_run_with_rewards_has_examples_below_its_panels(tmp_path: Path) -> None:
    run = write_reward_run(tmp_path / "run")
    result = plot(run, "--out", tmp_path / "with.png")
    assert (result.returncode, result.stderr) == (0, "")
    (run / "samples.jsonl").unlink()
    assert plot(run, "--out", tmp_path / "without.png").returncode == 0
    assert size(tmp_path / "without.png") == (1400, 1500)
    width, height = size(tmp_path / "with.png")
    assert width == 1400 and height == pytest.approx(
        1500 + 100 * _examples.read(write_reward_run(tmp_path / "same"), "").height, abs=1
    )
    below = matplotlib.image.imread(tmp_path / "with.png")[1510:, :, :3]
    assert all((column.min(axis=-1) < 0.5).sum() > 1000 for column in (below[:, :460], below[:, 470:930], below[:, 940:])), "text"


def test_runs_with_and_without_rewards_are_overlaid(tmp_path: Path) -> None:
    result = plot(write_run(tmp_path / "text"), write_reward_run(tmp_path / "rewards"), "--out", tmp_path / "both.png")
    assert (result.returncode, result.stderr) == (0, "")
    assert size(tmp_path / "both.png")[1] > 1300, "with the examples of the second run"


def test_examples_are_of_the_start_the_middle_and_the_end(tmp_path: Path) -> None:
    run = write_reward_run(tmp_path / "run")
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 20, "prompt": "Which one?", "completion": "again", "score": 1, "cut": false}\n')
        file.write('[]\n{"step": 20, "prompt": []}\n{"step": 25, "prom')
    first, second = _examples.read(run, "run").examples
    assert first.prompt == "How many?"
    assert [heading for heading, _ in first.completions] == [f"step {step}, reward -9.5, cut off" for step in (0, 10, 20)]
    for step, (_, lines) in zip((0, 10, 20), first.completions, strict=True):
        assert lines[0].startswith(f"After step {step}: about $5 and $6, ") and "\\x00 家" in " ".join(lines)
        assert len(lines) == _examples.LINES and lines[-1] == "…" and max(map(len, lines)) <= _examples.COLUMNS
    assert second.completions == [("step 0", []), ("step 10", []), ("step 20, reward 1", ["again"])]


@pytest.mark.parametrize(("evaluations", "steps"), [(1, [0]), (2, [0, 5])])
def test_examples_of_a_run_with_few_evaluations(tmp_path: Path, evaluations: int, steps: list[int]) -> None:
    run = write_reward_run(tmp_path / "run", 5 * (evaluations - 1))
    headings = [heading for heading, _ in _examples.read(run, "run").examples[1].completions]
    assert headings == [f"step {step}" for step in steps]
    assert plot(run).returncode == 0


def test_there_are_no_examples_without_samples(tmp_path: Path) -> None:
    assert _examples.read(tmp_path, "run") is None
    (tmp_path / "samples.jsonl").write_text("")
    assert _examples.read(tmp_path, "run") is None
