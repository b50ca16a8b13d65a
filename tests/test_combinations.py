"""Invariants 1 to 4 in every combination of weights, master and residency, with processes killed at random moments.

For each kind of store, one undisturbed resident run of one worker is the reference: its journal, its layers' files and its
exports are what all others must have, byte for byte.
"""

import contextlib
import io
import random
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from support import TINY, Finished, arguments, digest, export_digest, left, leftovers, records, start, write_recipe

from es_lite import replay
from es_lite import train as training

pytestmark = pytest.mark.slow

STEPS = 14
KILLS = 2

WEIGHTS = ("bf16", "int8")
MASTERS = ("fp32", "none")
RESIDENCIES = ("resident", "streamed")


def here(recipe: Path, run: Path, *overrides: str, resume: bool = False, rebuild: bool = False) -> Finished:
    """The command in this process, which spares its imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = training.main(arguments(recipe, run, *overrides, resume=resume, rebuild=rebuild))
    return Finished(code, out.getvalue(), err.getvalue())


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
        self.reference = folder / "reference"
        assert here(self.recipe, self.reference, "memory.residency=resident", "workers.count=1").code == 0

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


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_killed_at_random_moments_and_resumed_the_bits_are_the_same(store: Store, residency: str, tmp_path: Path) -> None:
    """The first kill may fall in the making of the files; the last leg goes on in the other residency."""
    moments, run = random.Random(f"{store.folder.name} {residency}"), tmp_path / "run"
    other = RESIDENCIES[residency == "resident"]
    for kill in range(KILLS):
        now = other if kill == KILLS - 1 else residency
        with start(store.recipe, run, f"memory.residency={now}", f"workers.count={1 + kill % 2}", resume=True) as live:
            if kill or moments.random() < 0.5:
                live.wait_for_records(records(run) + moments.randint(1, 2))
            else:
                live.wait_until(lambda: bool([*run.glob("master/*.next"), *run.glob("weights/*.next"), *run.glob("*/final.*")]))
            time.sleep(moments.uniform(0, 0.06))
            live.process.kill()
            live.process.wait()
            assert left(live.process.pid) == []
    assert records(run) < STEPS
    finished = here(store.recipe, run, f"memory.residency={residency}", resume=True)
    assert finished.code == 0, finished.err
    store.assert_same(run)


def test_the_journal_alone_gives_the_weights_back(store: Store, tmp_path: Path) -> None:
    assert replay.main([str(store.reference / "journal.jsonl"), "--out", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    expected = (store.reference / "checkpoint" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_damaged_files_are_named_and_made_again(store: Store, residency: str, tmp_path: Path) -> None:
    """One bit of one layer, another layer cut short, and another's file in a third's place: refused, then rebuilt."""
    run, place = tmp_path / "run", (f"memory.residency={residency}", "run.iterations=3")
    assert here(store.recipe, run, *place).code == 0
    files = {path.stem: path for path in (*run.glob("master/*"), *run.glob("weights/*"))}
    whole = files["block-001"].read_bytes()
    bits = bytearray(whole)
    bits[-5] ^= 4
    cut, swapped = whole[:-1], files["block-000"].read_bytes()
    before = digest(run)
    for damaged, word in ((bytes(bits), "checksum"), (cut, "bytes"), (swapped, "is not block-001")):
        files["block-001"].write_bytes(damaged)
        refused = here(store.recipe, run, *place, resume=True)
        assert (refused.code, refused.out.count("3 of 3")) == (2, 0)
        assert "block-001.safetensors" in refused.err and word in refused.err and "--rebuild" in refused.err
        assert files["block-001"].read_bytes() == damaged
    mended = here(store.recipe, run, *place, resume=True, rebuild=True)
    assert mended.code == 0, mended.err
    assert "block-001" in mended.out
    assert digest(run) == before


def test_a_streamed_run_leaves_its_update_to_the_next_step(store: Store, tmp_path: Path) -> None:
    """Without an evaluation or a checkpoint at the end, the files stand a step behind the journal, and --resume goes on."""
    quiet = ("memory.residency=streamed", "eval.every=0", "run.checkpoint_every=0")
    run = tmp_path / "run"
    assert here(store.recipe, run, *quiet, "run.iterations=2").code == 0
    (folder,) = (path for path in (run / "master", run / "weights") if path.exists())
    steps = {path.name: _step(path) for path in folder.iterdir()}
    assert set(steps.values()) == {1}
    assert here(store.recipe, run, *quiet, "run.iterations=3", resume=True).code == 0
    assert {_step(path) for path in folder.iterdir()} == {2}


def _step(path: Path) -> int:
    with safe_open(path, framework="numpy") as file:
        return int(file.metadata()["step"])
