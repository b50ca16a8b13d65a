"""The invariants in every combination of weights, master and residency: workers, kills, replay, damage.

For each storage, one undisturbed resident run of one worker is the reference: its journal, layer files and exports are
what all others must have, byte for byte.
"""

import random
import time
from pathlib import Path

import pytest
from support import TINY, assert_same_run, digest, left, records, start, train_here, write_recipe

from es_lite import replay

pytestmark = pytest.mark.slow

STEPS = 14
KILLS = 2

WEIGHTS = ("bf16", "int8")
MASTERS = ("fp32", "none")
RESIDENCIES = ("resident", "streamed")


class Reference:
    """A storage, its recipe, and the run to compare with."""

    def __init__(self, folder: Path, weights: str, master: str) -> None:
        self.name = folder.name
        # Untied if there is no master: the embedding is then a layer that passes by itself, after the head.
        config = TINY | {"tie_word_embeddings": master == "fp32"}
        self.recipe = write_recipe(
            folder,
            run={"iterations": STEPS, "checkpoint_every": 5, "checkpoint_dtype": "fp32"},
            model={"config": config},
            memory={"weights": weights, "master": master},
            eval={"every": 7, "samples": 4},
        )
        self.run = folder / "reference"
        assert train_here(self.recipe, self.run, "memory.residency=resident", "workers.count=1").code == 0


@pytest.fixture(scope="module", params=[(w, m) for w in WEIGHTS for m in MASTERS], ids="-".join)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("-".join(request.param)), *request.param)


@pytest.mark.parametrize(("residency", "workers"), [("resident", 2), ("resident", 5), ("streamed", 2)])
def test_killing_workers_at_random_moments_changes_no_bit(
    reference: Reference, residency: str, workers: int, tmp_path: Path
) -> None:
    """What a killed one had half done, such as a layer's file, is done again. Five share the blocks; streamed, two are lanes."""
    moments, kills = random.Random(1), 0
    with start(reference.recipe, tmp_path / "run", f"memory.residency={residency}", f"workers.count={workers}") as live:
        while kills < KILLS:
            live.wait_for_records(live.records() + 1)  # so that no task loses three workers in a row
            time.sleep(moments.uniform(0, 0.05))
            moments.choice(live.workers()).kill()
            kills += 1
        finished = live.finish()
    assert finished.code == 0, finished.err
    assert finished.err.count("died (exit code -9); a new one repeats its") == kills
    assert_same_run(tmp_path / "run", reference.run)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_run_killed_at_random_moments_and_resumed_ends_with_the_same_bits(
    reference: Reference, residency: str, tmp_path: Path
) -> None:
    """The first kill may fall while the files are made; the part before the last kill is run in the other residency."""
    moments, run = random.Random(f"{reference.name} {residency}"), tmp_path / "run"
    other = RESIDENCIES[residency == "resident"]
    for kill in range(KILLS):
        now = other if kill == KILLS - 1 else residency
        workers = f"workers.count={1 + kill % 2}"
        with start(reference.recipe, run, f"memory.residency={now}", workers, resume=True) as live:
            if kill or moments.random() < 0.5:
                live.wait_for_records(records(run) + moments.randint(1, 2))
            else:
                live.wait_until(lambda: bool([*run.glob("master/*.next"), *run.glob("weights/*.next"), *run.glob("*/final.*")]))
            time.sleep(moments.uniform(0, 0.06))
            live.process.kill()
            live.process.wait()
            assert left(live.process.pid) == []
    assert records(run) < STEPS
    finished = train_here(reference.recipe, run, f"memory.residency={residency}", resume=True)
    assert finished.code == 0, finished.err
    assert_same_run(run, reference.run)


def test_the_journal_alone_gives_the_weights(reference: Reference, tmp_path: Path) -> None:
    journal, out = reference.run / "journal.jsonl", tmp_path / "out"
    assert replay.main([str(journal), "--out", str(out), "--dtype", "fp32"]) == 0
    assert (out / "model.safetensors").read_bytes() == (reference.run / "checkpoint/model.safetensors").read_bytes()


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_damaged_files_are_named_and_made_again(reference: Reference, residency: str, tmp_path: Path) -> None:
    """A layer file with one bit changed, one that is cut short, and one that is another layer's: refused, then rebuilt."""
    run, overrides = tmp_path / "run", (f"memory.residency={residency}", "run.iterations=3")
    assert train_here(reference.recipe, run, *overrides).code == 0
    files = {path.stem: path for path in (*run.glob("master/*"), *run.glob("weights/*"))}
    whole = files["block-001"].read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 4
    other = files["block-000"].read_bytes()
    before = digest(run)
    for damaged, word in ((bytes(flipped), "checksum"), (whole[:-1], "bytes"), (other, "is not block-001")):
        files["block-001"].write_bytes(damaged)
        refused = train_here(reference.recipe, run, *overrides, resume=True)
        assert (refused.code, refused.out.count("3 of 3")) == (2, 0)
        assert "block-001.safetensors" in refused.err and word in refused.err and "--rebuild" in refused.err
        assert files["block-001"].read_bytes() == damaged
    rebuilt = train_here(reference.recipe, run, *overrides, resume=True, rebuild=True)
    assert rebuilt.code == 0, rebuilt.err
    assert "block-001" in rebuilt.out
    assert digest(run) == before
