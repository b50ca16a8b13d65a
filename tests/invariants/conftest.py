"""A recipe and undisturbed runs of it, with which tests compare other runs; no test changes them."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from combinations import Reference, References
from support import finished_run, write_recipe, write_reward_recipe

STEPS = 100
REWARD_STEPS = 30


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
def reward_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with rewards, of 30 steps."""
    run = {"iterations": REWARD_STEPS, "checkpoint_every": 3, "checkpoint_dtype": "fp32"}
    return write_reward_recipe(tmp_path_factory.mktemp("reward-recipe"), run=run, eval={"every": 10})


@pytest.fixture(scope="session")
def reward_reference(reward_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run of the recipe of rewards."""
    return finished_run(reward_recipe, tmp_path_factory.mktemp("reward-reference") / "run")


class Undisturbed(NamedTuple):
    """A recipe and its finished run."""

    recipe: Path
    run: Path


@pytest.fixture(params=["logprob", pytest.param("reward", marks=pytest.mark.long)])
def undisturbed(request: pytest.FixtureRequest) -> Undisturbed:
    """Those of each fitness, in turn."""
    of = "reward_" if request.param == "reward" else ""
    return Undisturbed(request.getfixturevalue(f"{of}recipe"), request.getfixturevalue(f"{of}reference"))


@pytest.fixture(scope="session")
def three_steps(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, evaluated and exported at the second and at the end."""
    overrides = ("run.iterations=3", "eval.every=2", "run.checkpoint_every=2")
    return finished_run(recipe, tmp_path_factory.mktemp("three-steps") / "run", *overrides)


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """The reference of a noise, a storage and settings, made when it is first asked for."""

    @cache
    def reference(noise: str, weights: str, master: str, settings: str) -> Reference:
        return Reference(tmp_path_factory.mktemp("reference"), noise, weights, master, settings)

    return reference
