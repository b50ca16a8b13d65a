"""Opens what is evaluated: its layers in a temporary folder, and an engine that reads them.

A run's own layer files are used where they are not ahead of the wanted step: each gets a second name (a hard link) in the
temporary folder, so that a training run can go on, and nothing of it is changed. All others are made from θ₀ and the journal.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
from transformers import PretrainedConfig

from es_lite import system
from es_lite.algorithm.jit import Threads
from es_lite.engine.local import LocalEngine
from es_lite.errors import DamagedFile, UserError
from es_lite.evaluation.progress import progress, warn
from es_lite.evaluation.subject import Subject
from es_lite.fitness.base import Fitness, ItemMemory, Items
from es_lite.fitness.logprob import LogProb
from es_lite.fitness.reward import Reward
from es_lite.planning.plan import Plan
from es_lite.quantities import GIB
from es_lite.recipe import Recipe
from es_lite.scoring.perturbation import Perturbation
from es_lite.weights.store import Store

PREFIX = "es_lite-evaluate-"

WINDOW = 256
"""Tokens of the longest sample of a text."""


class Comparison(Reward):
    """The fitness "reward", with memory for the log-probabilities of what was written, and of a text."""

    def memory(self, recipe: Recipe, config: PretrainedConfig, itemsize: int) -> ItemMemory:
        writing = super().memory(recipe, config, itemsize)
        length = max(writing.tokens + writing.new_tokens, WINDOW)
        fitness = replace(recipe.fitness, max_length=length)
        reading = LogProb().memory(replace(recipe, fitness=fitness), config, itemsize)
        return replace(
            writing,
            hidden=max(writing.hidden, reading.hidden),
            activations=max(writing.activations, reading.activations),
        )


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model whose weights are in an engine."""

    engine: LocalEngine
    theta: Perturbation

    def score(self, items: Items, what: str) -> np.ndarray:
        """What `Reward.score` finds for each item: object [items]. what: for the progress."""
        with progress(what) as show:
            return self.engine.score([self.theta], items, show)[0]


@contextlib.contextmanager
def opened(subject: Subject, recipe: Recipe, fitness: Fitness) -> Iterator[Opened]:
    """The subject's weights in an engine, which ends with the block; nothing is left of its folder then.

    recipe: says how the machine is used, and how much is scored at a time. Raises UserError if it does not fit in memory or on
    the disk, if θ₀ is not what the run began with, or if a layer's file is damaged.
    """
    model, layout = subject.skeleton
    with _folder(subject) as (folder, lock):
        recipe = replace(recipe, run=replace(recipe.run, dir=str(folder)))
        store = Store(folder, layout, subject.origin.storage)
        try:
            _link(subject, store)
            if not all(file.exists() for file in store.files) or any(record.anchor for record in subject.records):
                subject.check(subject.origin.source(model, layout, Threads(system.cores())))
            plan = _planned(recipe, fitness, subject)
            plan.rehearse(model, fitness)
            _check_disk(subject, store, plan.execution.processes)
            with LocalEngine(recipe, subject.origin, layout, store, plan.execution, lock, warn) as engine:
                with progress(f"opening {subject.name}") as show:
                    engine.advance(subject.records, show)
                yield Opened(engine, Perturbation(kind=plan.noise.NAME, rank=plan.noise.RANK))
        except DamagedFile as error:
            if subject.folder is None:
                raise
            place = str(error).replace(str(folder), str(subject.folder / recipe.memory.folder))
            raise UserError(
                f"{place}; add --resume --rebuild to the run's training to make it again, or give {subject.journal} alone"
            ) from None


@contextlib.contextmanager
def _folder(subject: Subject) -> Iterator[tuple[Path, IO[str]]]:
    """A new folder, and a lock in it: in the run directory, where files can be linked, or where temporary files are."""
    run = subject.folder
    place = run if run is not None and os.access(run, os.W_OK) else Path(tempfile.gettempdir())
    _remove_abandoned(place)
    try:
        temporary = tempfile.TemporaryDirectory(prefix=PREFIX, dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror}); set TMPDIR to another folder") from None
    with temporary as name, (Path(name) / "unlocked").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks; then abandoned folders stay
            fcntl.flock(lock, fcntl.LOCK_EX)
        (Path(name) / "unlocked").rename(Path(name) / "lock")  # by which others know the folder
        yield Path(name), lock


def _remove_abandoned(place: Path) -> None:
    """Removes the folders of evaluations that were killed."""
    for path in place.glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError), path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if it is in use
            shutil.rmtree(path.parent, ignore_errors=True)


def _link(subject: Subject, store: Store) -> None:
    """Gives the run's layer files that are of use a second name in the store."""
    if subject.folder is None or subject.recipe is None:
        return
    theirs = Store(subject.folder / subject.recipe.memory.folder, subject.skeleton[1], subject.origin.storage)
    for own, other in zip(store.files, theirs.files, strict=True):
        try:
            own.path.hardlink_to(other.path)
        except OSError:  # there is none, or it is on another file system
            continue
        if own.front().step > len(subject.records):
            own.path.unlink()


def _planned(recipe: Recipe, fitness: Fitness, subject: Subject) -> Plan:
    """The plan with the most workers that fit. Raises UserError if none does.

    Only θ is scored, so workers share its items; the members of a population would be shared instead.
    """
    _, layout = subject.skeleton
    matrices = [tensor for tensor in layout.tensors if len(tensor.shape) == 2 and tensor.sigma_factor]
    # Unperturbed, all kinds are the same; low-rank noise computes with the weights themselves.
    noise = replace(recipe.noise, kind="lowrank" if matrices else "gaussian", rank="auto", shared=False)
    recipe = replace(recipe, noise=noise, es=replace(recipe.es, population=2, antithetic=False))

    def planned(recipe: Recipe) -> Plan:
        plan = Plan.of(recipe, fitness, subject.config, layout)
        return replace(plan, disk={})  # see `_check_disk`

    if recipe.workers.count == "auto" and recipe.memory.residency != "streamed" and recipe.workers.device == "cpu":
        memory = replace(recipe.memory, residency="resident")
        useful = -(-recipe.fitness.samples // recipe.fitness.micro_batch)
        counts = range(1, min(system.cores(), useful) + 1)
        plans = [planned(replace(recipe, memory=memory, workers=replace(recipe.workers, count=count))) for count in counts]
        fitting = [plan for plan in plans if not plan.shortfall()]
        if fitting:
            return max(fitting, key=lambda plan: (plan.execution.kept, plan.execution.workers))
    plan = planned(recipe)
    if problem := plan.shortfall():
        raise UserError(f"{subject.name}: {problem}\n\n{plan.parts()}")
    return plan


def _check_disk(subject: Subject, store: Store, processes: int) -> None:
    """Raises UserError if there is no room for the layers that must be written."""
    step, alone = len(subject.records), "give the journal alone and " if subject.folder else ""
    sizes = [file.format.size for file in store.files if not (file.exists() and file.front().step == step)]
    need, free = sum(sizes) + processes * max(sizes, default=0), system.free_disk_bytes(store.folder)
    if need > free:
        raise UserError(
            f"does not fit: the layers take {need / GIB:.2f} GiB of disk in {store.folder.parent} while they are used, "
            f"{free / GIB:.2f} are free; free some, or {alone}set TMPDIR to a folder on a larger disk"
        )
