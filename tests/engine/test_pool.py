"""The pool hands tasks to real worker processes and replaces those that die or hang, up to a limit."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from layers import written
from support import TINY

from es_lite.engine.base import Execution
from es_lite.engine.guard import Guard
from es_lite.engine.messages import Check
from es_lite.engine.pool import ATTEMPTS, Pool
from es_lite.engine.worker import Setup
from es_lite.errors import DamagedFile, RunError
from es_lite.model.origin import Origin
from es_lite.weights.working_copy import allocate

ORIGIN = Origin("", TINY, seed=0, groups=(), nes=False, shared_noise=False)
EXECUTION = Execution(
    streamed=False,
    direct=False,
    device="cpu",
    compute="fp32",
    workers=2,
    threads=1,
    members=1,
    pass_samples=2,
    micro_batch=2,
    tile_members=1,
    prompt_members=1,
    kept=False,
    group=1,
)
LAYERS = range(4)


class Deadly:
    """Ends the process that it is sent to."""

    name = "deadly"

    def __reduce__(self) -> tuple:
        return os._exit, (3,)


class Endless:
    """Keeps the process that it is sent to busy."""

    name = "endless"

    def __reduce__(self) -> tuple:
        return time.sleep, (600,)


class DeadlyAtFirst:
    """Ends the first process that it is sent to; in others it is `task`. mark: a file that the first one makes."""

    name = "deadly at first"

    def __init__(self, task: Any, mark: Path) -> None:
        self.task, self.mark = task, mark

    def __reduce__(self) -> tuple:
        code = "task if __import__('os').path.exists(mark) else (open(mark, 'x'), __import__('os')._exit(3))"
        return eval, (code, {"task": self.task, "mark": str(self.mark)})


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """For workers over the layer files of a tiny model."""
    _, layout = ORIGIN.skeleton()
    folder = tmp_path_factory.mktemp("layers") / "master"
    written(folder, layout, "fp32")
    return Setup(ORIGIN, layout, folder, "bf16", "logprob", EXECUTION)


@contextmanager
def pool_of(setup: Setup, warn: Callable[[str], None], deadline_seconds: float = 0, workers: int = 2) -> Iterator[Pool]:
    descriptor, lock = allocate(setup.layout, setup.weights), os.open(os.devnull, os.O_RDONLY)
    try:
        with Pool(setup, descriptor, lock, workers, deadline_seconds, warn, Guard(0, lambda: 0)) as pool:
            yield pool
    finally:
        os.close(descriptor)
        os.close(lock)


def check_all(pool: Pool) -> None:
    """All workers still do what they are told."""
    assert pool.map([Check(layer) for layer in LAYERS], 0, lambda share: None) == [None] * len(LAYERS)


def test_progress_grows_to_the_whole_and_no_process_is_left(setup: Setup) -> None:
    shares: list[float] = []
    with pool_of(setup, pytest.fail) as pool:
        pids = pool.pids
        assert len(pids) == 2
        assert pool.map([Check(layer) for layer in LAYERS], 0, shares.append) == [None] * len(LAYERS)
        assert pool.map([], 0, pytest.fail) == []
    assert shares == sorted(shares) and shares[-1] == 1
    assert not any(map(psutil.pid_exists, pids))


def test_a_task_that_was_lost_with_its_worker_is_done_by_another(setup: Setup, tmp_path: Path) -> None:
    said: list[str] = []
    with pool_of(setup, said.append) as pool:
        (first, second) = pool.pids
        tasks = [Check(0), DeadlyAtFirst(Check(1), tmp_path / "mark"), Check(2)]
        assert pool.map(tasks, 0, lambda share: None) == [None] * 3  # type: ignore[arg-type]
        assert len(pool.pids) == 2 and len({first, second, *pool.pids}) == 3
        check_all(pool)
    (warning,) = said
    assert "died (exit code 3); a new one repeats its deadly at first task" in warning


def test_a_task_that_kills_every_worker_ends_the_run(setup: Setup) -> None:
    said: list[str] = []
    with (
        pool_of(setup, said.append) as pool,
        pytest.raises(RunError, match=rf"{ATTEMPTS} workers in a row died at the same deadly task \(the last with exit code 3"),
    ):
        pool.map([Check(0), Deadly(), Check(1)], 0, lambda share: None)  # type: ignore[list-item]
    assert len(said) == ATTEMPTS - 1


def test_a_task_that_hangs_every_worker_ends_the_run(setup: Setup) -> None:
    said: list[str] = []
    with (
        pool_of(setup, said.append, deadline_seconds=0.2, workers=1) as pool,
        pytest.raises(RunError, match=rf"{ATTEMPTS} workers in a row died at the same endless task"),
    ):
        pool.map([Endless()], 0, lambda share: None)  # type: ignore[list-item]
    assert sum("exceeded its deadline and is replaced" in text for text in said) == ATTEMPTS


def test_workers_that_cannot_start_end_the_run(setup: Setup) -> None:
    said: list[str] = []
    broken = replace(setup, origin=Deadly())  # type: ignore[arg-type]
    with (
        pool_of(broken, said.append, workers=1) as pool,
        pytest.raises(RunError, match=f"{ATTEMPTS} workers in a row died at the same start"),
    ):
        pool.map([Check(0)], 0, lambda share: None)
    assert len(said) == ATTEMPTS - 1


def test_what_a_worker_raises_ends_the_run_and_is_not_repeated(setup: Setup, tmp_path: Path) -> None:
    """An error that has a message for people is raised as it is, any other with its traceback."""
    damaged = replace(setup, folder=tmp_path)
    with pool_of(damaged, pytest.fail, workers=1) as pool, pytest.raises(DamagedFile, match=r"embedding\.safetensors"):
        pool.map([Check(0)], 0, lambda share: None)
    with pool_of(setup, pytest.fail, workers=1) as pool, pytest.raises(RunError, match=r"(?s)failed at Check:.*IndexError"):
        pool.map([Check(99)], 0, lambda share: None)
