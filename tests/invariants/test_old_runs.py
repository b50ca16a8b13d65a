"""Run directories of an earlier version are continued and replayed with the bits that it would have given.

tests/fixtures/old_runs has one for each storage. Its layer files stand at step 4, its journal ends at step 6; digests.json
has the SHA-256 that the earlier version's files had at step 6.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from support import ROOT, assert_same_run, leftovers, train_here

from es_lite import replay

OLD_RUNS = ROOT / "tests/fixtures/old_runs"
DIGESTS: dict[str, dict[str, str]] = json.loads((OLD_RUNS / "digests.json").read_text())
CHECKPOINT = "checkpoint/model.safetensors"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """data.path of the old recipes is relative to the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(params=DIGESTS)
def old(request: pytest.FixtureRequest) -> Path:
    return OLD_RUNS / request.param


def resumed(old: Path, run: Path, *overrides: str) -> Path:
    """A copy of the old run, resumed by the command, with a checkpoint at the end."""
    if not run.exists():
        shutil.copytree(old, run)
    finished = train_here(old / "recipe.toml", run, "run.checkpoint_every=6", *overrides, resume=True)
    assert finished.code == 0, finished.err
    return run


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("workers", [1, 8])  # eight divide the blocks among them
def test_an_old_run_is_brought_to_its_end_with_the_bits_of_its_version(old: Path, workers: int, tmp_path: Path) -> None:
    run = resumed(old, tmp_path / "run", f"workers.count={workers}")
    assert {name: sha256(run / name) for name in DIGESTS[old.name]} == DIGESTS[old.name]
    assert (run / "journal.jsonl").read_bytes() == (old / "journal.jsonl").read_bytes()
    assert leftovers(run) == []


def test_an_old_run_is_streamed_to_the_same_checkpoint(old: Path, tmp_path: Path) -> None:
    run = resumed(old, tmp_path / "run", "memory.residency=streamed")
    assert sha256(run / CHECKPOINT) == DIGESTS[old.name][CHECKPOINT]


def test_an_old_run_without_layer_files_gets_them_again(old: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(old, run, ignore=shutil.ignore_patterns("*.safetensors"))
    resumed(old, run)
    assert {name: sha256(run / name) for name in DIGESTS[old.name]} == DIGESTS[old.name]


def test_an_old_journal_and_tokenizer_are_replayed_to_the_same_weights(old: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(old / "tokenizer", run / "tokenizer")
    shutil.copy(old / "journal.jsonl", run)
    assert replay.main([str(run), "--out", str(out), "--dtype", "fp32"]) == 0
    assert sha256(out / "model.safetensors") == DIGESTS[old.name][CHECKPOINT]
    assert (out / "tokenizer.json").exists()


def test_an_old_run_continues_behind_its_own_lines(old: Path, tmp_path: Path) -> None:
    """Two more steps, the same whatever the residency and the number of workers."""
    more = ("run.iterations=8", "run.checkpoint_every=8")
    ways = {"one": ["workers.count=1"], "eight": ["workers.count=8"], "streamed": ["memory.residency=streamed"]}
    runs = [resumed(old, tmp_path / name, *more, *overrides) for name, overrides in ways.items()]
    lines = (runs[0] / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 9 and b"".join(lines[:7]) == (old / "journal.jsonl").read_bytes()
    assert_same_run(runs[1], runs[0])
    assert (runs[2] / "journal.jsonl").read_bytes() == b"".join(lines)
    assert (runs[2] / CHECKPOINT).read_bytes() == (runs[0] / CHECKPOINT).read_bytes()
