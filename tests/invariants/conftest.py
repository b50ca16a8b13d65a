"""A recipe and undisturbed runs of it, with which tests compare other runs; no test changes them."""

from pathlib import Path

import pytest
from support import finished_run, write_recipe

STEPS = 100


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 100 steps on two workers, with evaluations and exports."""
    run = {"iterations": STEPS, "checkpoint_every": 3, "checkpoint_dtype": "fp32"}
    return write_recipe(tmp_path_factory.mktemp("recipe"), run=run, eval={"every": 10, "samples": 4})


@pytest.fixture(scope="session")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run of the recipe."""
    return finished_run(recipe, tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture(scope="session")
def three_steps(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, evaluated and exported at the second and at the end."""
    overrides = ("run.iterations=3", "eval.every=2", "run.checkpoint_every=2")
    return finished_run(recipe, tmp_path_factory.mktemp("three-steps") / "run", *overrides)
