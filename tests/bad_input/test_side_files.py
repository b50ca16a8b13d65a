"""Files of a run that are read but are not the truth: whatever they hold, a run that the journal can continue continues."""

import shutil
from pathlib import Path

import pytest
from support import assert_same_run, digest, train_here, write_recipe

from es_lite.runs.metrics import Metrics

SETTINGS = {"run": {"iterations": 4, "checkpoint_every": 2}, "eval": {"every": 2, "samples": 4, "best": True}}
DAMAGES = {
    "empty": b"",
    "torn": b'{"step": 1, "score_',
    "binary": b"\xff\x00\xfe\n\x80",
    "another kind": b"[]\n7\n",
    "of other types": b'{"step": "two", "eval_score": [], "score_mean": {}}\n',
}
FILES = ["metrics.jsonl", "checkpoint/es_lite.json", "best/es_lite.json", "checkpoint/config.json", "recipe.toml", "lock"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The recipe, its run after two of four steps, and after all."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, **SETTINGS)
    assert train_here(recipe, folder / "half", "run.iterations=2").code == 0
    assert train_here(recipe, folder / "all").code == 0
    return recipe, folder / "half", folder / "all"


def check(run: Path, finished: Path, name: str) -> None:
    """The run is what it would have been; what is in best/ is written again only when a later step is better."""
    if name.startswith("best/"):
        assert digest(run) == digest(finished)
    else:
        assert_same_run(run, finished)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_run_continues(whole: tuple[Path, Path, Path], tmp_path: Path, name: str, damage: str) -> None:
    recipe, half, finished = whole
    run = tmp_path / "run"
    shutil.copytree(half, run)
    assert (run / name).exists()
    (run / name).write_bytes(DAMAGES[damage])
    resumed = train_here(recipe, run, resume=True)
    assert resumed.code == 0, resumed.err
    check(run, finished, name)
    assert {line["step"] for line in Metrics(run / "metrics.jsonl", tensorboard=False).lines()} >= {1, 2, 3, 4}


@pytest.mark.parametrize("name", FILES)
def test_a_run_continues_without_it(whole: tuple[Path, Path, Path], tmp_path: Path, name: str) -> None:
    recipe, half, finished = whole
    run = tmp_path / "run"
    shutil.copytree(half, run)
    (run / name).unlink()
    resumed = train_here(recipe, run, resume=True)
    assert resumed.code == 0, resumed.err
    check(run, finished, name)
