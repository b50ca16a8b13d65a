"""Run directories that are not ones, belong to another recipe, are in use, or cannot be written."""

from pathlib import Path

import pytest
from refusals import copy_of, disk, refused, refused_untouched, remount
from support import contents, start, train_here


def test_the_run_of_another_recipe_is_refused(recipe: Path, run: Path) -> None:
    message = refused_untouched(recipe, run, "es.alpha=0.5", "run.seed=3")
    assert f"{run}: belongs to another recipe" in message
    assert "es.alpha: 0.02 -> 0.5" in message and "run.seed: 0 -> 3" in message


def test_a_run_of_another_kind_of_noise_or_another_rank_is_refused(recipe: Path, run: Path, tmp_path: Path) -> None:
    message = refused_untouched(recipe, run, "noise.kind=lowrank")
    assert f"{run}: belongs to another recipe" in message and "noise.kind: 'gaussian' -> 'lowrank'" in message
    low_rank, one_step = tmp_path / "low-rank", ("noise.kind=lowrank", "run.iterations=1")
    assert train_here(recipe, low_rank, *one_step, "noise.rank=2").code == 0
    message = refused_untouched(recipe, low_rank, *one_step, "noise.rank=3")
    assert f"{low_rank}: belongs to another recipe" in message and "noise.rank: 2 -> 3" in message


@pytest.mark.slow
def test_the_directory_of_a_live_run_is_refused(recipe: Path, tmp_path: Path) -> None:
    with start(recipe, tmp_path / "run", "run.iterations=100000") as live:
        live.wait_for_records(1)
        for resume in (False, True):
            message = refused(recipe, tmp_path / "run", "run.iterations=100000", resume=resume)
            assert f"{tmp_path}/run: in use by another run" in message
        live.wait_for_records(live.records() + 2)


def test_a_folder_of_something_else_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert f"{tmp_path}/mine: exists and is not a run directory" in refused_untouched(recipe, tmp_path / "mine")


def test_a_folder_with_a_recipe_of_somebodys_own_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine/tokenizer").mkdir(parents=True)
    (tmp_path / "mine/tokenizer/tokenizer.json").write_text("{}")
    (tmp_path / "mine/recipe.toml").write_text("# mine\n")
    assert f"{tmp_path}/mine: exists and is not a run directory" in refused_untouched(recipe, tmp_path / "mine")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_is_not_a_run_directory(recipe: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / place) in refused(recipe, tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("resume", [False, True])
def test_a_read_only_directory_is_named(recipe: Path, reference: Path, tmp_path: Path, resume: bool) -> None:
    with disk(tmp_path / "disk", "8m") as place:
        run = copy_of(reference, place / "run") if resume else place / "run"
        remount(place, "ro")
        before = contents(place)
        message = refused(recipe, run, resume=resume)
        assert f"{run}: cannot be written (Read-only file system); choose another run.dir" in message
        assert contents(place) == before


def test_layers_without_their_journal_are_refused(recipe: Path, run: Path) -> None:
    (run / "journal.jsonl").unlink()
    assert f"there is no {run / 'journal.jsonl'}" in refused_untouched(recipe, run)
