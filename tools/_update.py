"""The update of a step on any number of workers, on paper.

The tasks are those that the engine makes. What a task of each kind takes is measured here, by one thread; then the tasks are
given to workers as the pool does it: in order, each to the first worker that is free. On paper every worker is as fast as
that thread alone: caches, memory and disk are not shared.
"""

import heapq
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _measuring import StepLoad

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.record import Record
from es_lite.algorithm.shaping import utilities
from es_lite.engine.local import divide
from es_lite.engine.messages import Advance, AdvanceSections, Check, Finish, Task
from es_lite.model.layout import Layout
from es_lite.model.origin import Origin
from es_lite.weights import store, working_copy
from es_lite.weights.layer_file import LayerFile
from es_lite.weights.store import SECTION_BYTES, Store
from es_lite.weights.working_copy import WorkingCopy


@dataclass(frozen=True)
class Rates:
    """Seconds for each element of a layer, by kind of task."""

    advance: float
    advance_sections: float
    check: float
    finish: float

    def seconds(self, task: Task, files: Sequence[LayerFile]) -> float:
        """What the task takes."""
        if isinstance(task, Advance):
            return self.advance * files[task.layer].layer.size
        if isinstance(task, AdvanceSections):
            sections = files[task.layer].format.sections(SECTION_BYTES)[task.low : task.high]
            return self.advance_sections * sum(count for section in sections for _, _, count in section.parts)
        if isinstance(task, Check):
            return self.check * files[task.layer].layer.size
        assert isinstance(task, Finish)
        return self.finish * files[task.layer].layer.size


def divided(files: Sequence[LayerFile], workers: int) -> tuple[list[Task], ...]:
    """The tasks that the engine makes of an update, by round: those of the second begin when the first is done."""
    return divide(files, [record_of(0, 2)], 1, workers)


def undivided(layout: Layout) -> list[list[Task]]:
    """One task a layer, largest first."""
    layers = sorted(layout.layers, key=lambda layer: -layer.size)
    return [[Advance(layer.index, (), 1) for layer in layers]]


def seconds_on_paper(rounds: Sequence[Sequence[Task]], files: Sequence[LayerFile], workers: int, rates: Rates) -> float:
    """What the rounds take on that many workers."""
    return sum(makespan([rates.seconds(task, files) for task in tasks], workers) for tasks in rounds)


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last task ends, if each is given, in order, to the first worker that is free."""
    free = [0.0] * workers
    for duration in seconds:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def record_of(step: int, population: int) -> Record:
    """A record in which every member counts."""
    scores = np.random.default_rng(step).standard_normal(population)
    return Record.from_utilities(
        step, utilities(scores, "zscore"), seed=0, noise=gaussian, sigma=1e-3, alpha=5e-4, scale="standard",
        antithetic=True,
    )  # fmt: skip


def measure(load: StepLoad, folder: Path, repeats: int) -> tuple[Layout, list[LayerFile], Rates]:
    """The model's layers, in `folder`, and the rates: of a block that is advanced whole, and of the largest layer in sections."""
    origin = Origin(path="", config=load.config, seed=0, groups=(), nes=False, shared_noise=False)
    model, layout = origin.skeleton()
    threads = Threads(1)
    theta_0 = origin.source(model, layout, threads)
    files = Store(folder, layout, "fp32").files
    descriptor = working_copy.allocate(layout, "bf16")
    copy = WorkingCopy(layout, "bf16", descriptor)
    block = max(files[1:-1], key=lambda file: file.layer.size)
    largest = max(files, key=lambda file: file.layer.size)
    for file in {block.layer.index: block, largest.layer.index: largest}.values():
        store.advance_layer(file, lambda: theta_0, [], 0, copy, threads)
    seconds: dict[str, list[float]] = {"advance": [], "sections": [], "check": [], "finish": []}
    at = dict.fromkeys((block.layer.index, largest.layer.index), 0)

    def timed(kind: str, file: LayerFile, act: Callable[..., None], *section: int) -> None:
        step = at[file.layer.index]
        start = time.perf_counter()
        act(file, *section, lambda: theta_0, [record_of(step, load.population)], step + 1, copy, threads)
        seconds[kind].append((time.perf_counter() - start) / file.layer.size)

    for _ in range(1 + repeats):
        timed("advance", block, store.advance_layer)
        at[block.layer.index] += 1
        timed("sections", largest, store.advance_layer_sections, 0, store.section_count(largest))
        start = time.perf_counter()
        largest.check()
        seconds["check"].append((time.perf_counter() - start) / largest.layer.size)
        timed("finish", largest, store.finish_layer)
        at[largest.layer.index] += 1
    os.close(descriptor)
    # The first ones also warm up.
    return layout, files, Rates(*(statistics.median(values[1:]) for values in seconds.values()))
