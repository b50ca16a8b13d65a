"""θ₀ and the journal give the weights of every step, bit for bit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from support import ROOT, TINY, assert_same_bits, finished_run, replayed, tensors, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from es_lite import replay
from es_lite.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder, as transformers saves it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).save_pretrained(folder)
    return folder


def test_the_journal_alone_gives_the_weights(undisturbed, tmp_path: Path) -> None:
    reference = undisturbed.run
    shutil.copy(reference / "journal.jsonl", tmp_path)
    command = [sys.executable, "-m", "es_lite.replay", str(tmp_path / "journal.jsonl"), "--out", str(tmp_path / "out")]
    subprocess.run([*command, "--dtype", "fp32"], cwd=ROOT, check=True)
    assert_same_bits(load_file(tmp_path / "out/model.safetensors"), tensors(reference))


def test_the_model_has_the_tokenizer_that_the_recipe_names(tmp_path: Path) -> None:
    train_bpe([["another text"]], 260).save_pretrained(tmp_path / "tokenizer")
    run = finished_run(
        write_recipe(tmp_path, model={"config": TINY | {"vocab_size": 260}}),
        tmp_path / "run",
        "run.iterations=1",
        f"data.tokenizer={tmp_path}/tokenizer",
    )
    assert not (run / "tokenizer").exists()
    replayed(run, tmp_path / "out")
    of_model = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert of_model.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab()


@pytest.mark.slow
def test_replay_to_a_step_gives_the_weights_of_a_run_of_that_many_steps(
    reference: Path, three_steps: Path, tmp_path: Path
) -> None:
    assert_same_bits(replayed(reference, tmp_path / "out", "--step", "3"), tensors(three_steps))


@pytest.mark.slow
def test_a_pretrained_model_that_has_moved_is_replayed_and_another_is_refused(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pretrained, model)
    recipe = write_recipe(tmp_path, run={"iterations": 4}, model={"config": "", "path": str(model)})
    run = finished_run(recipe, tmp_path / "run")
    journal, moved = run / "journal.jsonl", model.rename(tmp_path / "moved")
    assert_same_bits(replayed(journal, tmp_path / "out", "--model", str(moved)), tensors(run))

    assert replay.main([str(journal), "--out", str(tmp_path / "gone")]) == 2
    assert str(model) in capsys.readouterr().err
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3c")
    assert replay.main([str(journal), "--out", str(tmp_path / "other"), "--model", str(moved)]) == 2
    assert f"{journal}: this is the journal of another model" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists() and not (tmp_path / "other").exists()
