"""Disks that are too small, or fill up at any moment: a message, nothing half written, and with more space the run continues."""

from pathlib import Path

import pytest
from layers import ALONE
from refusals import STEPS, disk, fill, message_of, refused, remount
from safetensors.numpy import load_file
from support import contents, digest, export_digest, left, leftovers, start, train, train_here
from transformers import AutoTokenizer

from es_lite.errors import RunError
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.recipe import Recipe
from es_lite.runs.export import export
from es_lite.runs.metrics import Metrics
from es_lite.weights.store import Store


def test_a_disk_too_small_for_the_plan_is_said_before_anything_is_made(recipe: Path, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "64k") as place:
        assert "GiB of disk" in refused(recipe, place / "run")
        assert contents(place) == {}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("free", "board", "named"),
    [(8, True, "master"), (230, False, "checkpoint")],
)
def test_a_disk_that_fills_up_ends_the_run_and_with_more_space_it_continues(
    recipe: Path, reference: Path, tmp_path: Path, free: int, board: bool, named: str
) -> None:
    """free: KiB left once the run has begun; named: what cannot be written then."""
    with disk(tmp_path / "disk", "3m") as place:
        run = place / "run"
        with start(recipe, run, f"log.tensorboard={str(board).lower()}", log=tmp_path / "log") as live:
            live.wait_until(lambda: "advancing the weights to the end of the journal" in live.out)
            fill(place, leaving=free)
            finished = live.finish()
            assert left(live.process.pid) == []
        assert finished.code == 1
        assert f"{run}/{named}" in message_of(finished.err)
        assert "No space left on device" in finished.err
        remount(place, "size=6m")
        assert train(recipe, run, resume=True).code == 0
        assert digest(run) == digest(reference)
        assert export_digest(run) == export_digest(reference)
        assert leftovers(run) == []


@pytest.mark.parametrize("free", [0, 4, 8, 12, 16])
def test_a_disk_that_is_full_before_the_first_step_is_said(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """free: KiB left. That is too little for the plan, which is let through, as if the disk had filled up just after it."""
    monkeypatch.setattr(Plan, "shortfall", lambda plan: None)
    with disk(tmp_path / "disk", "1m") as place:
        fill(place, leaving=free)
        finished = train_here(recipe, place / "run")
        assert finished.code in (1, 2)
        message = message_of(finished.err)
        assert f"{place}/run" in message and "No space left on device" in message
        assert not (place / "run/journal.jsonl").exists()


@pytest.mark.parametrize("free", range(96, 140, 4))
def test_an_export_is_whole_or_absent_however_full_the_disk(recipe: Path, reference: Path, tmp_path: Path, free: int) -> None:
    """free: KiB left, from too little for the weights to enough for all files."""
    origin = Origin.of_recipe(Recipe.load(recipe))
    skeleton, layout = origin.skeleton()
    store = Store(reference / "master", layout, origin.storage)
    tokenizer = AutoTokenizer.from_pretrained(reference / "tokenizer")
    with disk(tmp_path / "disk", "1m") as place:
        fill(place, leaving=free)
        try:
            export(
                place / "checkpoint",
                skeleton,
                layout,
                lambda layer: store.reader(layer, [], STEPS, ALONE),
                tokenizer,
                "fp32",
                "card",
                {"step": STEPS},
            )
        except RunError as error:
            assert f"{place}/checkpoint: cannot be written" in str(error)
            assert [path.name for path in place.iterdir()] == ["filler"]
        else:
            assert load_file(place / "checkpoint/model.safetensors")
            assert (place / "checkpoint/es_lite.json").stat().st_size


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_metrics_on_a_full_disk_end_the_run_also_with_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with disk(tmp_path / "disk", "1m") as place:
        metrics = Metrics(place / "metrics.jsonl", tensorboard=True)
        metrics.write({"step": 0, "score_mean": 1.0})
        fill(place, leaving=0)
        with pytest.raises(RunError, match=f"{place}.*cannot be written"):
            for step in range(1, 500):
                metrics.write({"step": step} | dict.fromkeys("abcdefgh", 1.0))
