"""Bad input through the command: one clear message that names the file or key, exit code 2 or 1, and nothing touched.

What is found before workers start is tested in this process; the rest, and a few of each kind, by the command in a process of
its own.
"""

from pathlib import Path

import pytest
from refusals import STEPS, copy_of
from support import finished_run, write_recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = {"iterations": STEPS, "checkpoint_every": 4, "checkpoint_dtype": "fp32"}
    return write_recipe(tmp_path_factory.mktemp("recipe"), run=run)


@pytest.fixture(scope="session")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test changes."""
    return finished_run(recipe, tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return copy_of(reference, tmp_path / "run")
