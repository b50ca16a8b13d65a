"""Command lines that are incomplete or ask for something impossible."""

from pathlib import Path

import pytest
from refusals import message_of
from support import contents

from es_lite import plan, replay, train
from es_lite.__main__ import main as es_lite

Capture = pytest.CaptureFixture[str]


def usage_error(capsys: Capture, command, *words: str) -> str:
    """What the command says on standard error, which ends with exit code 2 as argparse does."""
    with pytest.raises(SystemExit) as exit:
        command([*words])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize("name", ["train", "plan"])
def test_a_recipe_is_missing(capsys: Capture, tmp_path: Path, name: str) -> None:
    assert "recipe" in usage_error(capsys, es_lite, name)
    assert es_lite([name, f"{tmp_path}/gone.toml"]) == 2
    assert f"{tmp_path}/gone.toml: no such recipe" in message_of(capsys.readouterr().err)


@pytest.mark.parametrize("command", [train, plan, replay], ids=lambda module: module.__name__)
def test_an_unknown_option_is_named(capsys: Capture, command) -> None:
    assert "--resmue" in usage_error(capsys, command.main, "recipe.toml", "--out", "x", "--resmue")


def test_rebuild_goes_with_resume(recipe: Path, run: Path, capsys: Capture) -> None:
    before = contents(run)
    assert "--rebuild requires --resume" in usage_error(capsys, train.main, str(recipe), "--set", f"run.dir={run}", "--rebuild")
    assert contents(run) == before


# Replay


def replay_refused(capsys: Capture, run: Path, out: Path, *options: str) -> str:
    """The message; `run` is as it was, and `out` was not written."""
    before, existed = contents(run), out.exists()
    assert replay.main([str(run), "--out", str(out), *options]) == 2
    assert contents(run) == before and out.exists() == existed
    return message_of(capsys.readouterr().err)


def test_replay_needs_a_place_for_the_model(capsys: Capture, run: Path) -> None:
    assert "--out" in usage_error(capsys, replay.main, str(run))


@pytest.mark.parametrize("step", ["-1", "13"])
def test_replay_to_a_step_that_does_not_exist_is_refused(run: Path, tmp_path: Path, capsys: Capture, step: str) -> None:
    message = replay_refused(capsys, run, tmp_path / "out", f"--step={step}")
    assert f"--step {step}: {run}/journal.jsonl has steps 0 to 12" in message


def test_replay_overwrites_nothing(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "out").mkdir()
    assert f"{tmp_path}/out: exists already; remove it, or choose another folder" in replay_refused(capsys, run, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["out.old", "out.next"])
def test_replay_removes_nothing_beside_the_model(run: Path, tmp_path: Path, capsys: Capture, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_text("the last one")
    assert f"{tmp_path}/{name}: exists already; remove it" in replay_refused(capsys, run, tmp_path / "out")
    assert (tmp_path / name / "model.safetensors").read_text() == "the last one"


def test_a_command_that_does_not_exist_is_named(capsys: Capture) -> None:
    assert es_lite(["trian", "recipe.toml"]) == 2
    assert capsys.readouterr().err.startswith("es_lite: no such command: trian\n\nusage: es-lite COMMAND")


def test_replay_of_a_random_start_takes_no_model(run: Path, tmp_path: Path, capsys: Capture) -> None:
    message = replay_refused(capsys, run, tmp_path / "out", "--model", str(tmp_path))
    assert f"--model {tmp_path}: this run started from random weights" in message


@pytest.mark.parametrize("name", ["", "gone", "gone.jsonl"])
def test_replay_of_something_that_is_not_a_run_is_refused(tmp_path: Path, capsys: Capture, name: str) -> None:
    assert f"{tmp_path / name}" in replay_refused(capsys, tmp_path / name, tmp_path / "out")
