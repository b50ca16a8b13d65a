"""The run directory: one run's, held by one process at a time, tied to one recipe, and tidied up after a crash."""

import dataclasses
import fcntl
from pathlib import Path

import pytest
from support import contents

from es_lite import files
from es_lite.errors import UserError
from es_lite.recipe import Recipe
from es_lite.runs import directory as module
from es_lite.runs.directory import CHANGEABLE, RunDirectory

CHANGES = {
    "run.iterations": 7,
    "run.minutes": 5.0,
    "run.checkpoint_every": 3,
    "run.checkpoint_dtype": "fp32",
    "data.bos": "never",
    "workers.count": 3,
    "workers.threads": 2,
    "workers.deadline": 60.0,
    "workers.device": "torch",
    "workers.engine": "ray",
    "workers.address": "auto",
    "workers.hosts": 2,
    "workers.host_dir": "elsewhere",
    "run.verify_every": 5,
    "memory.limit": "8 GiB",
    "memory.residency": "streamed",
    "eval.samples": 5,
    "eval.best": False,
    "log.tensorboard": False,
    "reward.seconds": 20.0,
}
"""Another value for each key that may change, except run.dir."""


def recipe_of(path: Path, **changes: object) -> Recipe:
    """A recipe of a run in `path`, all defaults but for `changes`: "table.key" to value."""
    recipe = Recipe()
    for name, value in {"run.dir": str(path), "model.path": "some/model", **changes}.items():
        table, key = name.split(".")
        recipe = dataclasses.replace(recipe, **{table: dataclasses.replace(getattr(recipe, table), **{key: value})})
    return recipe


def begun(path: Path, **changes: object) -> Path:
    """A run directory whose run has begun: it has a journal and the file of a layer."""
    with RunDirectory(recipe_of(path, **changes), resume=False) as run:
        run.journal.write_text("a header\n")
        (run.store / "final.safetensors").write_text("a layer")
    return path


def refused(recipe: Recipe, resume: bool = True) -> str:
    """The message; nothing that was there has changed."""
    path = Path(recipe.run.dir)
    before = contents(path)
    with pytest.raises(UserError) as error:
        RunDirectory(recipe, resume)
    assert contents(path) == before
    return str(error.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs/run"


# A new run


def test_a_new_directory_has_its_recipe_and_a_folder_for_layers(path):
    recipe = recipe_of(path, **{"es.sigma": 0.5})
    with RunDirectory(recipe, resume=False) as run:
        assert run.path == path
        assert (run.store, run.journal, run.metrics) == (path / "master", path / "journal.jsonl", path / "metrics.jsonl")
        assert (run.checkpoint, run.best, run.tokenizer) == (path / "checkpoint", path / "best", path / "tokenizer")
    assert sorted(entry.name for entry in path.iterdir()) == ["lock", "master", "recipe.toml"]
    assert Recipe.load(path / "recipe.toml") == recipe


def test_without_a_master_the_folder_is_named_weights(path):
    with RunDirectory(recipe_of(path, **{"memory.master": "none"}), resume=False) as run:
        assert run.store == path / "weights" and run.store.is_dir()


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with RunDirectory(recipe_of(Path("~/run")), resume=False) as run:
        assert run.path == tmp_path / "run"


def test_there_need_be_nothing_to_resume(path):
    with RunDirectory(recipe_of(path), resume=True) as run:
        assert not run.journal.exists()


def test_a_run_that_was_refused_before_it_began_leaves_no_recipe_or_tokenizer_that_the_next_would_take(path):
    with RunDirectory(recipe_of(path, **{"es.sigma": 0.5}), resume=False) as run:
        run.tokenizer.mkdir()
        (run.tokenizer / "tokenizer.json").write_text("{}")
    with RunDirectory(recipe_of(path, **{"data.vocab_size": 300}), resume=False) as run:
        assert not run.tokenizer.exists()
    assert Recipe.load(path / "recipe.toml") == recipe_of(path, **{"data.vocab_size": 300})


@pytest.mark.parametrize("present", [[], ["master"], ["master", "weights", "lock", "recipe.toml.next"]])
def test_what_a_kill_at_the_very_start_leaves_is_a_run_directory(path, present):
    path.mkdir(parents=True)
    for name in present:
        (path / name).mkdir() if name in ("master", "weights") else (path / name).touch()
    with RunDirectory(recipe_of(path), resume=False):
        assert (path / "recipe.toml").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "journal.jsonl", "checkpoint"])
def test_a_folder_of_something_else_is_refused(path, name):
    path.mkdir(parents=True)
    (path / name).write_text("years of work")
    assert refused(recipe_of(path)) == f"{path}: exists and is not a run directory; choose another run.dir"


def test_a_file_is_refused(path):
    path.parent.mkdir()
    path.write_text("years of work")
    assert refused(recipe_of(path)) == f"{path}: exists and is not a run directory; choose another run.dir"
    assert f"{path}/below: cannot be written (Not a directory); choose another run.dir" in refused(recipe_of(path / "below"))
    assert path.read_text() == "years of work"


# A run that is continued


def test_a_run_is_not_begun_again_by_mistake(path):
    begun(path)
    assert refused(recipe_of(path), resume=False) == (
        f"{path}: holds a run already; add --resume to continue it, or choose another run.dir"
    )
    with RunDirectory(recipe_of(path), resume=True) as run:
        assert run.journal.read_text() == "a header\n"
        assert (run.store / "final.safetensors").read_text() == "a layer"


def test_layers_without_their_journal_are_refused(path):
    (begun(path) / "journal.jsonl").unlink()
    for resume in (False, True):
        message = refused(recipe_of(path), resume)
        assert f"{path}/master: has layer files, but there is no {path}/journal.jsonl; restore it" in message


def test_the_run_of_another_recipe_is_refused_with_all_that_differs(path):
    begun(path)
    assert refused(recipe_of(path, **CHANGES, **{"es.alpha": 0.5, "run.seed": 3})) == (
        f"{path}: belongs to another recipe:\n  run.seed: 0 -> 3\n  es.alpha: 0.0005 -> 0.5\n"
        "Set these back, or choose another run.dir"
    )


def test_what_does_not_change_the_meaning_of_a_step_may_change(path):
    assert {"run.dir", *CHANGES} == set(CHANGEABLE)
    rewards = {"fitness.kind": "reward", "data.path": "builtin:countdown"}  # one of the keys is theirs
    before = (begun(path, **rewards) / "recipe.toml").read_text()
    changed = recipe_of(path, **CHANGES, **rewards)
    with RunDirectory(changed, resume=True) as run:
        assert (path / "recipe.toml").read_text() == before  # until everything else has been found to agree
        run.keep(changed)
    assert Recipe.load(path / "recipe.toml") == changed


def test_a_run_may_be_moved(path, tmp_path):
    moved = begun(path).rename(tmp_path / "moved")
    with RunDirectory(recipe_of(moved), resume=True) as run:
        assert run.path == moved


def test_what_a_crash_left_unfinished_is_completed_or_removed(path):
    begun(path)
    (path / "master/final.safetensors.next").write_text("half a layer")
    for folder, state in (("checkpoint.next", "new"), ("checkpoint", "old"), ("best.old", "old"), ("best.next", "new")):
        (path / folder).mkdir()
        (path / folder / "es_lite.json").write_text(state)
    with RunDirectory(recipe_of(path), resume=True):
        assert [file.name for file in (path / "master").iterdir()] == ["final.safetensors"]
        assert (path / "checkpoint/es_lite.json").read_text() == "old"
        assert (path / "best/es_lite.json").read_text() == "old"
        assert not list(path.glob("*.next")) and not list(path.glob("*.old"))


# The lock


def test_a_directory_in_use_is_refused_and_not_touched(path, monkeypatch):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.0)
    begun(path)
    (path / "master/final.safetensors.next").write_text("being written")
    with (path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for resume in (False, True):
            assert refused(recipe_of(path), resume) == (
                f"{path}: in use by another run; wait for it, stop it, or choose another run.dir"
            )
    with RunDirectory(recipe_of(path), resume=True):
        pass


def test_a_lock_that_is_released_soon_is_waited_for(path, monkeypatch):
    """The workers of a run that was just killed take a moment to end."""
    begun(path)
    with (path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(files.time, "sleep", lambda seconds: fcntl.flock(other, fcntl.LOCK_UN))
        with RunDirectory(recipe_of(path), resume=True):
            pass


@pytest.mark.parametrize("refuse", [False, True], ids=["ended", "refused"])
def test_the_lock_is_released_when_the_run_ends_or_is_refused(path, monkeypatch, refuse):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.0)
    begun(path)
    if refuse:
        refused(recipe_of(path, **{"run.seed": 3}))
    for _ in range(2):
        with RunDirectory(recipe_of(path), resume=True) as run:
            with (path / "lock").open("w") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert not run.lock.closed
