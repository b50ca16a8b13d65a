"""Invariants 1 to 4 in every combination of weights, master and residency, with processes killed at random moments.

For each kind of store, one undisturbed resident run of one worker is the reference: its journal, its layers' files and its
exports are what all others must have, byte for byte.
"""

import random
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from support import (
    TINY,
    digest,
    export_digest,
    finished_run,
    left,
    leftovers,
    records,
    start,
    train,
    write_recipe,
)

from es_lite import replay

pytestmark = pytest.mark.slow

STEPS = 14
KILLS = 4

WEIGHTS = ("bf16", "int8")
MASTERS = ("fp32", "none")
RESIDENCIES = ("resident", "streamed")


class Store:
    """A kind of store, its recipe, and the reference run."""

    def __init__(self, folder: Path, weights: str, master: str) -> None:
        self.folder = folder
        # Untied where the store is the weights themselves: the embedding then passes by itself, after the head.
        config = TINY | {"tie_word_embeddings": master == "fp32"}
        self.recipe = write_recipe(
            folder,
            run={"iterations": STEPS, "checkpoint_every": 5, "checkpoint_dtype": "fp32"},
            model={"config": config},
            memory={"weights": weights, "master": master},
            eval={"every": 7, "samples": 4},
        )
        self.reference = finished_run(self.recipe, folder / "reference", "memory.residency=resident", "workers.count=1")

    def assert_same(self, run: Path) -> None:
        assert digest(run) == digest(self.reference)
        assert export_digest(run) == export_digest(self.reference)
        assert leftovers(run) == []


@pytest.fixture(scope="module", params=[(w, m) for w in WEIGHTS for m in MASTERS], ids="-".join)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("-".join(request.param)), *request.param)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_workers_killed_at_random_moments_change_no_bit(store: Store, residency: str, tmp_path: Path) -> None:
    """Two workers, or two lanes of one; what a killed one had half done, a layer's file among it, is done again."""
    moments, kills = random.Random(1), 0
    with start(store.recipe, tmp_path / "run", f"memory.residency={residency}", "workers.count=2") as live:
        while kills < KILLS:
            live.wait_for_records(live.records() + 1)  # so that no task loses three workers in turn
            time.sleep(moments.uniform(0, 0.05))
            moments.choice(live.workers()).kill()
            kills += 1
        finished = live.finish()
    assert finished.code == 0, finished.err
    assert finished.err.count("died (exit code -9); a new one repeats its") == kills
    store.assert_same(tmp_path / "run")


@pytest.mark.parametrize("residency", [*RESIDENCIES, "either"])
def test_killed_at_random_moments_and_resumed_the_bits_are_the_same(store: Store, residency: str, tmp_path: Path) -> None:
    """Also where a run goes on in the other residency."""
    moments, run = random.Random(2), tmp_path / "run"
    for kill in range(KILLS):
        now = moments.choice(RESIDENCIES) if residency == "either" else residency
        with start(store.recipe, run, f"memory.residency={now}", f"workers.count={1 + kill % 2}", resume=True) as live:
            live.wait_for_records(records(run) + moments.randint(1, 2))
            time.sleep(moments.uniform(0, 0.06))
            live.process.kill()
            live.process.wait()
            assert left(live.process.pid) == []
    assert records(run) < STEPS
    last = "resident" if residency == "either" else residency
    finished = train(store.recipe, run, f"memory.residency={last}", resume=True)
    assert finished.code == 0, finished.err
    store.assert_same(run)


def test_the_journal_alone_gives_the_weights_back(store: Store, tmp_path: Path) -> None:
    assert replay.main([str(store.reference / "journal.jsonl"), "--out", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    expected = (store.reference / "checkpoint" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_damaged_files_are_named_and_made_again(store: Store, residency: str, tmp_path: Path) -> None:
    """One bit of one layer, another layer cut short, and another's file in a third's place: refused, then rebuilt."""
    run = finished_run(store.recipe, tmp_path / "run", f"memory.residency={residency}", "run.iterations=3")
    files = {path.stem: path for path in (*run.glob("master/*"), *run.glob("weights/*"))}
    whole = files["block-001"].read_bytes()
    bits = bytearray(whole)
    bits[-5] ^= 4
    cut, swapped = whole[:-1], files["block-000"].read_bytes()
    before = digest(run)
    for damaged, word in ((bytes(bits), "checksum"), (cut, "bytes"), (swapped, "is not block-001")):
        files["block-001"].write_bytes(damaged)
        refused = train(store.recipe, run, f"memory.residency={residency}", "run.iterations=3", resume=True)
        assert (refused.code, refused.out.count("3 of 3")) == (2, 0)
        assert "block-001.safetensors" in refused.err and word in refused.err and "--rebuild" in refused.err
        assert files["block-001"].read_bytes() == damaged
    mended = train(store.recipe, run, f"memory.residency={residency}", "run.iterations=3", resume=True, rebuild=True)
    assert mended.code == 0, mended.err
    assert "block-001" in mended.out
    assert digest(run) == before


def test_a_streamed_run_leaves_its_update_to_the_next_step(store: Store, tmp_path: Path) -> None:
    """Without an evaluation or a checkpoint at the end, the files stand a step behind the journal, and --resume goes on."""
    quiet = ("memory.residency=streamed", "eval.every=0", "run.checkpoint_every=0")
    run = finished_run(store.recipe, tmp_path / "run", *quiet, "run.iterations=2")
    (folder,) = (path for path in (run / "master", run / "weights") if path.exists())
    steps = {path.name: _step(path) for path in folder.iterdir()}
    assert set(steps.values()) == {1}
    assert train(store.recipe, run, *quiet, "run.iterations=3", resume=True).code == 0
    assert {_step(path) for path in folder.iterdir()} == {2}


def _step(path: Path) -> int:
    with safe_open(path, framework="numpy") as file:
        return int(file.metadata()["step"])
