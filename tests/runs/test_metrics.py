"""metrics.jsonl and samples.jsonl: an object per line, a torn last line dropped; metrics in TensorBoard if it is installed."""

import json
import sys
from pathlib import Path

import pytest

from es_lite.errors import RunError
from es_lite.runs.metrics import Metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_a_line_is_what_was_written(path):
    metrics = Metrics(path, tensorboard=False)
    assert metrics.lines() == [] and metrics.evaluations() == {} and not path.exists()
    metrics.write({"step": 1, "score_mean": -2.5, "eval_score": None})
    metrics.write({"step": 2, "score_mean": -2.25, "eval_score": -3.5})
    assert path.read_text() == (
        '{"step": 1, "score_mean": -2.5, "eval_score": null}\n{"step": 2, "score_mean": -2.25, "eval_score": -3.5}\n'
    )
    assert [line["step"] for line in metrics.lines()] == [1, 2]


def test_evaluations_are_those_that_were_made(path):
    metrics = Metrics(path, tensorboard=False)
    for line in ({"step": 0, "eval_score": -4.0}, {"step": 1, "eval_score": None}, {"step": 2}, {"step": 3, "eval_score": 0.0}):
        metrics.write(line)
    assert metrics.evaluations() == {0: -4.0, 3: 0.0}


@pytest.mark.parametrize("torn", ['{"step": 3, "sco', '{"step": 3}', "\0\0"])
def test_a_last_line_that_a_crash_tore_is_dropped(path, torn):
    whole = '{"step": 1}\n{"step": 2}\n'
    path.write_text(whole + torn)
    metrics = Metrics(path, tensorboard=False)
    assert path.read_text() == whole
    metrics.write({"step": 3})
    assert path.read_text() == whole + '{"step": 3}\n'


def test_a_file_of_nothing_but_a_torn_line_becomes_empty(path):
    path.write_text('{"ste')
    assert Metrics(path, tensorboard=False).lines() == []
    assert path.read_text() == ""


def test_lines_that_are_not_json_are_left_out(path):
    path.write_text('{"step": 1, "eval_score": -1.0}\n\0\0\0\n{"step"\n{"step": 4, "eval_score": -2.0}\n')
    metrics = Metrics(path, tensorboard=False)
    assert [line["step"] for line in metrics.lines()] == [1, 4]
    assert metrics.evaluations() == {1: -1.0, 4: -2.0}


def test_a_file_that_cannot_be_written_is_an_error_of_the_run(path):
    metrics = Metrics(path, tensorboard=False)
    path.mkdir()
    with pytest.raises(RunError, match=f"{path}: cannot be written .*; the journal has the step: free some space, add --resume"):
        metrics.write({"step": 1})


def test_samples_are_appended_to_a_file_of_their_own(path):
    samples = path.with_name("samples.jsonl")
    metrics = Metrics(path, tensorboard=False)
    metrics.keep_samples([])
    assert not samples.exists()
    metrics.keep_samples([{"step": 0, "completion": "a\n\ud800"}, {"step": 0, "completion": "b"}])
    with samples.open("a") as file:
        file.write('{"step": 1, "comp')  # as a crash leaves it
    Metrics(path, tensorboard=False).keep_samples([{"step": 1, "completion": "c"}])
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["completion"] for line in lines] == ["a\n\ud800", "b", "c"]
    assert not path.exists()


def test_samples_that_cannot_be_written_are_an_error_of_the_run(path):
    metrics = Metrics(path, tensorboard=False)
    path.with_name("samples.jsonl").mkdir()
    with pytest.raises(RunError, match=r"samples\.jsonl: cannot be written .*; the journal has the step: free some space"):
        metrics.keep_samples([{"step": 1}])


def test_tensorboard_gets_the_same_values_but_not_what_is_missing(path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(path, tensorboard=True)
    metrics.write({"step": 1, "score_mean": -2.5, "eval_score": None})
    metrics.write({"step": 2, "score_mean": -2.25, "eval_score": -3.5})
    events = EventAccumulator(str(path.parent / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["score_mean", "eval_score"]
    assert [(event.step, event.value) for event in events.Scalars("score_mean")] == [(1, -2.5), (2, -2.25)]
    assert [(event.step, event.value) for event in events.Scalars("eval_score")] == [(2, -3.5)]


def test_without_the_package_there_is_no_tensorboard(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Metrics(path, tensorboard=True).write({"step": 1, "score_mean": -2.5})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_tensorboard_is_off_unless_asked_for(path):
    Metrics(path, tensorboard=False).write({"step": 1, "score_mean": -2.5})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
