"""tools/benchmark.py: the update on paper, and that every sub-command prints its rows."""

import json
import re
import sys
from collections import Counter

import _scoring
import _update
import benchmark
import numpy as np
import pytest
from _measuring import Finished, StepLoad
from _update import Rates, makespan
from support import TINY

from es_lite.engine.messages import Advance, AdvanceSections, Finish
from es_lite.model.layout import Layout
from es_lite.model.origin import Origin
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.perturbation import UNPERTURBED
from es_lite.weights.store import SECTION_BYTES, Store

RATES = Rates(advance=1e-9, advance_sections=2e-9, check=1e-10, finish=1e-10)


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Origin("", "qwen3-0.5b", 0, (), False, False).skeleton()[1]


@pytest.fixture
def files(layout, tmp_path):
    return Store(tmp_path, layout, "fp32").files


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.mark.parametrize(
    ("seconds", "workers", "expected"),
    [
        ([3, 2, 2, 1], 1, 8),
        ([3, 2, 2, 1], 2, 4),
        ([2, 2, 3], 2, 5),  # in the order given, which is not the best one
        ([3, 2, 2, 1], 9, 3),
        ([], 2, 0),
    ],
)
def test_each_task_goes_to_the_first_free_worker(seconds, workers, expected):
    assert makespan(seconds, workers) == expected


@pytest.mark.parametrize("workers", [2, 8, 64])
def test_the_engines_tasks_cover_every_section_of_every_layer_once(layout, files, workers):
    whole, shared = _update.divided(files, workers)
    covered = Counter()
    for task in whole:
        if isinstance(task, AdvanceSections):
            covered.update((task.layer, section) for section in range(task.low, task.high))
    finished = {task.layer for task in shared}
    assert all(isinstance(task, Finish) for task in shared) and {layer for layer, _ in covered} == finished
    sections = {(layer, i) for layer in finished for i in range(len(files[layer].format.sections(SECTION_BYTES)))}
    assert covered == Counter(sections)
    assert sorted([task.layer for task in whole if isinstance(task, Advance)] + list(finished)) == list(range(len(files)))
    assert bool(finished) == any(layer.size > layout.size // workers for layer in layout.layers)


def test_on_one_worker_nothing_is_divided(layout, files):
    rounds, whole = _update.divided(files, 1), _update.undivided(layout)
    assert [task.layer for task in rounds[0]] == [task.layer for task in whole[0]] and rounds[1] == []
    assert [_update.seconds_on_paper(tasks, files, 1, RATES) for tasks in (rounds, whole)] == [
        pytest.approx(layout.size * RATES.advance)
    ] * 2


def test_the_largest_layer_bounds_an_update_that_is_not_divided(layout, files):
    largest = max(layer.size for layer in layout.layers)
    whole = _update.seconds_on_paper(_update.undivided(layout), files, 64, RATES)
    assert whole == pytest.approx(largest * RATES.advance)
    shared = _update.seconds_on_paper(_update.divided(files, 64), files, 64, RATES)
    assert layout.size / 64 * RATES.advance_sections < shared < whole / 2


@pytest.mark.parametrize(("vocab_size", "steps"), [(1001, [2, 2]), (64, [0, 4])], ids=["largest-embedding", "largest-block"])
def test_the_rates_are_measured_on_real_layers(tmp_path, vocab_size, steps):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY | {"vocab_size": vocab_size}))
    layout, files, rates = _update.measure(StepLoad(str(config), 4, 2, 32, 2), tmp_path, 1)
    assert min(rates.advance, rates.advance_sections, rates.finish) > 0
    assert Store(tmp_path, layout, "fp32").steps() == [*steps, 0, 0]  # of the embedding and the first block
    for file in files:
        assert not file.exists() or file.check() is None


def test_plain_inference_is_what_scoring_is_compared_with(config):
    """It computes the same scores from the same weights."""
    loaded = _scoring.Loaded(StepLoad(config, 4, 3, 32, 2), Lanes(1, 1), tile_members=2)
    tokens = loaded.plain()().reshape(3, 31)
    assert np.allclose(tokens.mean(axis=1), loaded.scores([UNPERTURBED])[0], atol=0.02)  # the tensors may be bfloat16


def fake_run(load: StepLoad, steps: int, directory: str | None, **tables: dict) -> Finished:
    """As many seconds as step and workers say, and 3 more with Ray."""
    share = 12.0 / tables["workers"]["count"] + 3.0 * (tables["workers"]["engine"] == "ray")
    names = ("step_seconds", "score_seconds", "update_seconds", "read_gib", "written_gib", "peak_pss_gib", "network_kib")
    lines = [dict.fromkeys(names, share + (100 if step == 0 else step)) for step in range(steps)]
    return Finished(lines, [[-1.0]] * steps, "fp32")


ROWS = {
    "noise": [
        f"{kind}, {what}"
        for kind in ("gaussian", "rademacher", "lowrank")
        for what in ("one perturbation", "an antithetic pair", "update, 4 pairs")
    ],
    "plain": [
        *(f"{name}, 8 members" for name in ("plain inference", "low rank 1", "low rank 4", "gaussian")),
        "members in a tile of low-rank noise",
        *(f"{name}, speed over plain inference" for name in ("low rank 1", "low rank 4", "gaussian")),
    ],
    "tiles": [f"{rows} rows" for rows in (32, 64, 128, 256, 512, 1024, 2048)],
    "kinds": [
        *(
            f"{kind}, {what}"
            for kind in ("gaussian", "rademacher", "lowrank")
            for what in ("scoring", "update", "step", "peak PSS of all processes")
        ),
        *(f"{kind} over gaussian, {what}" for kind in ("rademacher", "lowrank") for what in ("scoring", "update", "step")),
    ],
    "scoring": [
        f"{who}, {what}"
        for who in ("unperturbed", "one member", "an antithetic pair")
        for what in ("256 tokens a member", "share of the GEMM rate (N GFLOP/s)")
    ],
    "workers": ["scores, 1 worker", "scores, 2 workers", "two workers over one"],
    "step": [
        "es_lite, a step",
        "es_lite, its update",
        "es_lite, peak PSS of all processes",
        "the other loop, a step",
        "times as fast",
    ],
    "int8": [
        "bf16, a step",
        "bf16, peak PSS of all processes",
        "int8, a step",
        "int8, peak PSS of all processes",
        "int8 over bf16",
    ],
    "engines": [
        *(f"{engine}, {what}" for engine in ("local", "ray") for what in ("a step", "its update", "peak PSS of all processes")),
        *("ray over local", "ray less local", "ray, over the network"),
    ],
    "streaming": [
        "streamed, a step",
        "streamed, read",
        "streamed, written",
        "its transfers alone, at plain direct rates",
        "resident, a step",
        "streamed over the longer of the two",
    ],
}


@pytest.fixture
def printed(monkeypatch, capsys, config):
    """Runs a sub-command on the tiny model with runs that are not real, and returns what it prints."""
    monkeypatch.setattr(benchmark, "run", fake_run)
    monkeypatch.setattr(benchmark, "disk_rates", lambda folder: (2**30, 2**30))

    def printed(*words: str) -> str:
        assert benchmark.main([*words, "--config", config, "--length", "32", "--repeats", "1"]) == 0
        return capsys.readouterr().out

    return printed


@pytest.mark.parametrize("what", ROWS)
def test_a_sub_command_prints_its_rows(printed, what):
    other = f"{sys.executable} -c \"print('loading'); print('{{\\\"step_seconds\\\": 75}}')\""
    out = printed(what, "--tokens", "256", *(["--against", other] if what == "step" else []))
    assert out.startswith(f"`python tools/benchmark.py {what} ") and "commit " in out and "cores " in out
    head, line, *found = re.findall(r"^\| ?([^|]+?) ?\| ?([^|]+?) ?\|", out, re.MULTILINE)
    assert (head, line) == (("what", "median"), ("---", "---"))
    rows = {re.sub(r"\(\d+ ", "(N ", name): value for name, value in found}
    assert list(rows) == ROWS[what] and all(float(value) > 0 for value in rows.values())
    if what == "workers":  # the first step of a run, which takes 100 s more, is left out
        assert (rows["scores, 1 worker"], rows["scores, 2 workers"]) == ("13.5", "7.5")
    if what == "engines":
        assert (rows["local, a step"], rows["ray, a step"], rows["ray less local"]) == ("8.5", "11.5", "3e+03")
    if what == "step":
        assert (rows["es_lite, a step"], rows["times as fast"]) == ("7.5", "10")


def test_update_is_measured_on_one_and_two_workers_and_on_paper_on_more(printed):
    lines = [line.strip("| ").split(" | ") for line in printed("update").splitlines() if line.startswith("|")]
    assert lines[0][:3] == ["workers", "measured, s", "spread"]
    assert [line[0] for line in lines[2:]] == ["1", "2", "8", "64"]
    assert [line[1] for line in lines[2:4]] == ["13.5", "7.5"]
    assert all(line[1].strip() == "" for line in lines[4:])
    assert all(float(value) > 0 for line in lines[2:] for value in line[3:])


def test_an_unknown_sub_command_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["steps"])
    assert ended.value.code == 2 and "invalid choice: 'steps'" in capsys.readouterr().err
