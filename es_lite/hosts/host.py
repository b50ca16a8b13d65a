"""A host of a run on several machines: a whole `LocalEngine` on files of its own, which follows the journal.

It lives in an actor (`hosts.cluster`), and knows nothing of Ray.
"""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from es_lite import system
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.engine.local import LocalEngine
from es_lite.errors import UserError
from es_lite.files import expanded, remove_unfinished, take_lock
from es_lite.fitness.base import Items, Shelf
from es_lite.fitness.kinds import fitness_of
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.recipe import Recipe
from es_lite.scoring.perturbation import Perturbation
from es_lite.weights.store import Store

MEMORY_SECONDS = 10.0
"""Time between two measurements of the memory, which cost milliseconds per GiB."""

LOCK_SECONDS = 30.0
"""How long a host waits for one that was just killed to let go of its files."""


@dataclass(frozen=True)
class HostSetup:
    """What a host needs once, before its first records."""

    recipe: Recipe
    """Its compute type is the run's, not "auto"."""
    header: dict[str, Any]
    """The journal's."""
    journal: Path
    """For messages."""
    run: str
    """A name that no other run has."""
    shelf: Shelf


@dataclass(frozen=True)
class Report:
    """What a host says of itself when it is ready."""

    versions: dict[str, str]
    capability: str
    """What of the CPU the matrix products use; if it differs, scores may differ in the last bits."""
    plan: str = ""
    """How it uses its machine, in words."""

    @classmethod
    def of_here(cls) -> "Report":
        return cls(system.versions(), f"{torch.backends.cpu.get_cpu_capability()} ({system.box()['cpu_features']})")


@dataclass(frozen=True)
class Status:
    share: float
    """How much of what it does now is done, 0 … 1."""
    pss: int
    peak_pss: int
    read: int
    written: int
    """Bytes, as of `Engine.memory` and `Engine.traffic`."""
    workers: int
    shortage: str
    warnings: tuple[str, ...]
    """New ones."""


class Host:
    """One machine's part of a run. All methods but `status` and `close` are called one at a time, in order."""

    def __init__(self, cores: int, run_dir: Path | None, fresh: bool = False) -> None:
        """cores: that it may use. run_dir: on the coordinator's machine, whose layers' files are the run's own. fresh: removes
        what files it has, which are not to be trusted."""
        system.use_at_most(cores)
        self._run_dir, self._fresh = run_dir, fresh
        self._share = 0.0
        self._engine: LocalEngine | None = None
        self._warnings: list[str] = []
        self._items: Items | None = None
        self._memory, self._measured = (0, 0), float("-inf")

    def open(self, setup: HostSetup) -> Report:
        """Checks the model and the plan, and starts the workers. Raises UserError."""
        recipe = setup.recipe
        fitness = fitness_of(recipe.fitness.kind)
        origin = Origin.of_recipe(recipe).continuing(setup.header, setup.journal)
        model, layout = origin.skeleton()
        folder, self._lock = self._place(recipe, setup.run)
        if self._run_dir is None:  # only the coordinator's machine exports
            run = dataclasses.replace(recipe.run, dir=str(folder), checkpoint_every=0)
            recipe = dataclasses.replace(recipe, run=run, eval=dataclasses.replace(recipe.eval, best=False))
        plan = Plan.of(recipe, fitness, model.config, layout)
        plan.rehearse(model, fitness)
        if problem := plan.shortfall():
            raise UserError(problem)
        theta_0 = origin.source(model, layout, Threads(1))
        origin.check(setup.header, setup.journal, layout, theta_0)
        store = Store(folder / recipe.memory.folder, layout, origin.storage, lambda: theta_0)
        if self._run_dir is None:
            if self._fresh:
                shutil.rmtree(store.folder, ignore_errors=True)
            store.folder.mkdir(parents=True, exist_ok=True)
            self._warnings += [f"it is made again from θ₀ and the journal: {error}" for error in store.remove_damaged()]
        remove_unfinished(store.folder)
        self._store, self._shelf = store, setup.shelf
        self._engine = LocalEngine(recipe, origin, layout, store, plan.execution, self._lock, self._warnings.append)
        return dataclasses.replace(Report.of_here(), plan=plan.parts().splitlines()[0])

    def advance(self, records: Sequence[Record]) -> None:
        """See `Engine.advance`."""
        self._own.advance(records, self._progress)

    def check(self) -> None:
        """See `Engine.check`."""
        self._own.check(self._progress)

    def score(self, perturbations: Sequence[Perturbation], number: int, low: int, high: int) -> np.ndarray:
        """See `Engine.score`; the items are low … high - 1 of those with that number."""
        self._share = 0.0
        if self._items is None or self._items.number != number:
            self._items = self._shelf.items(number)
        return self._own.score(perturbations, self._items.part(low, high), self._progress)

    def checksums(self) -> list[str]:
        """Of each layer, when all are at the step that the last record leads to."""
        self._own.settle(self._progress)
        return [f"{file.front().step}:{file.front().checksum}" for file in self._store.files]

    def status(self) -> Status:
        """Returns at once, whatever else is under way."""
        new = tuple(self._warnings.pop(0) for _ in range(len(self._warnings)))
        engine = self._engine
        if engine is None:
            return Status(0.0, 0, 0, 0, 0, 0, "", new)
        if time.monotonic() - self._measured > MEMORY_SECONDS:
            self._memory, self._measured = engine.memory(), time.monotonic()
        return Status(self._share, *self._memory, *engine.traffic(), engine.workers, engine.shortage, new)

    def close(self) -> None:
        """See `Engine.close`; whatever is under way fails."""
        if self._engine is not None:
            self._engine.close()

    @property
    def _own(self) -> LocalEngine:
        assert self._engine is not None, "a host is opened first"
        return self._engine

    def _progress(self, share: float) -> None:
        self._share = share

    def _place(self, recipe: Recipe, run: str) -> tuple[Path, IO[str]]:
        """The folder of the layers' folder, and its lock. Several hosts on one machine have one each. Raises UserError."""
        if self._run_dir is not None:
            file = (self._run_dir / "host.lock").open("w")
            try:
                take_lock(file, LOCK_SECONDS)
            except BlockingIOError:
                raise UserError(f"{file.name}: another host of this run is still at work; wait for it, or kill it") from None
            except OSError:
                pass  # the file system has no locks, as the run has said
            return self._run_dir, file
        parent = expanded(recipe.workers.host_dir) / run
        try:
            for number in range(1000):
                folder = parent / str(number)
                folder.mkdir(parents=True, exist_ok=True)
                file = (folder / "lock").open("w")
                try:
                    take_lock(file, 0.0)
                    return folder, file
                except BlockingIOError:
                    file.close()
        except OSError as error:
            raise UserError(
                f"{parent}: cannot be written or locked ({error.strerror}); choose another workers.host_dir"
            ) from None
        raise UserError(f"{parent}: is full of other hosts' folders")
