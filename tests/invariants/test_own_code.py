"""An architecture of the user's own, from model.code, through the real command: no exception to anything."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from support import RECIPE, ROOT, TINY, assert_same_run, contents, digest, metrics, replayed, tensors, train_here, write_recipe
from transformers import AutoModelForCausalLM

from es_lite import replay

CONFIG = TINY | {"model_type": "qwen3_binary_features", "tie_word_embeddings": False}


def recipe_of(folder: Path, **tables: dict) -> Path:
    """A tiny recipe whose model is that of recipes/binary_features.py, in a copy of that file."""
    shutil.copy(ROOT / "recipes/binary_features.py", folder / "own.py")
    tables = {"run": {"iterations": 3}, "es": RECIPE["es"] | {"sigma": 0.05}} | tables
    return write_recipe(folder, model={"config": CONFIG, "code": str(folder / "own.py")}, **tables)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    checkpoint = {"iterations": 3, "checkpoint_every": 3, "checkpoint_dtype": "fp32"}
    finished = train_here(recipe_of(tmp_path, run=checkpoint), tmp_path / "run", "workers.count=1")
    assert finished.code == 0, finished.err
    return tmp_path / "run"


def test_it_trains_on_any_number_of_workers_streamed_or_resident_and_resumes(tmp_path: Path, finished: Path) -> None:
    recipe, words = tmp_path / "tiny.toml", ("run.iterations=3", "run.checkpoint_every=3", "run.checkpoint_dtype=fp32")
    assert train_here(recipe, tmp_path / "two", *words, "workers.count=2").code == 0
    assert_same_run(tmp_path / "two", finished)
    assert train_here(recipe, tmp_path / "parts", *words, "run.minutes=1e-6").code == 0
    assert train_here(recipe, tmp_path / "parts", *words, resume=True).code == 0
    assert digest(tmp_path / "parts") == digest(finished)
    streamed = train_here(recipe, tmp_path / "streamed", *words, "memory.residency=streamed")
    assert streamed.code == 0, streamed.err
    assert (tmp_path / "streamed/journal.jsonl").read_bytes() == (finished / "journal.jsonl").read_bytes()
    assert min(line["score_std"] for line in metrics(finished) if line["step"]) > 0


def test_its_journal_is_replayed_and_its_export_is_the_model(tmp_path: Path, finished: Path) -> None:
    found, own = replayed(finished, tmp_path / "replayed"), tensors(finished)
    assert found.keys() == own.keys() and all((found[name] == own[name]).all() for name in own)
    model = AutoModelForCausalLM.from_pretrained(finished / "checkpoint")  # its code has run in this process
    features = model.model(torch.arange(9)[None]).last_hidden_state
    assert type(model).__name__ == "BinaryFeaturesForCausalLM" and set(features.unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_a_file_that_has_changed_is_neither_run_nor_gone_on_with(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is one that a stranger's journal names."""
    own, trace = tmp_path / "own.py", tmp_path / "trace"
    own.write_text(own.read_text() + f"open({str(trace)!r}, 'w').close()\n")
    before = contents(finished)
    for name in [name for name in sys.modules if name.startswith("es_lite model.code")]:
        del sys.modules[name]  # as in a new process
    assert replay.main([str(finished), "--out", str(tmp_path / "out")]) == 2
    assert "has changed since the run began; restore the file" in capsys.readouterr().err
    assert not trace.exists() and not (tmp_path / "out").exists()
    refused = train_here(tmp_path / "tiny.toml", finished, "run.iterations=4", resume=True)
    assert refused.code == 2 and "is not the file that the run began with, or has other contents" in refused.err
    after = contents(finished)
    assert {name: after[name] for name in before if name != "lock"} == {n: v for n, v in before.items() if n != "lock"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "cannot be read (No such file or directory); expected a Python file"),
        ("raise SystemExit('no')", "fails (SystemExit: no)"),
        ("import nothing_of_this_name", "fails (ModuleNotFoundError: No module named 'nothing_of_this_name')"),
        ("1 +", "fails (SyntaxError: invalid syntax"),
        ("pass", "model.config: not a configuration that transformers accepts: Unrecognized model identifier: of_my_own"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, code: str | None, message: str) -> None:
    if code is not None:
        (tmp_path / "own.py").write_text(code)
    recipe = write_recipe(tmp_path, model={"config": TINY | {"model_type": "of_my_own"}, "code": str(tmp_path / "own.py")})
    refused = train_here(recipe, tmp_path / "run")
    assert refused.code == 2 and message in refused.err and not (tmp_path / "run").exists()


def test_the_shipped_recipe_learns_something_in_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # its model.code is relative
    words = "run.iterations=12", "es.population=16", "fitness.samples=8", "eval.every=12", "eval.samples=32", "eval.best=false"
    finished = train_here(ROOT / "recipes/binary_features.toml", tmp_path / "run", *words)
    assert finished.code == 0, finished.err
    first, *_, last = [line["eval_score"] for line in metrics(tmp_path / "run") if line["eval_score"] is not None]
    assert last > first + 0.01
