"""The engine of this machine: a pool of worker processes over one resident copy of the weights, or one worker that streams
them or computes on a GPU.

Resident weights are advanced immediately, by all workers; streamed weights as they pass in the next `score`. A worker that
streams or uses a GPU scores all members in one pass; the others take groups of perturbations that share tiles, one at a time.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import IO

import numpy as np

from es_lite import system
from es_lite.algorithm.record import Record
from es_lite.engine.base import Execution, Progress
from es_lite.engine.guard import Guard
from es_lite.engine.messages import Advance, AdvanceSections, Check, Finish, Score, Task
from es_lite.engine.pool import Pool, prepare
from es_lite.engine.worker import Setup
from es_lite.files import remove_unfinished
from es_lite.fitness.base import Items
from es_lite.model.layout import Layer, Layout
from es_lite.model.origin import Origin
from es_lite.recipe import Recipe
from es_lite.scoring.perturbation import Perturbation
from es_lite.watching import PeakPss
from es_lite.weights import store, working_copy
from es_lite.weights.layer_file import LayerFile
from es_lite.weights.store import Store

SLOWEST_FLOPS, SLOWEST_NOISE = 5e9, 2e7
"""FLOP and noise elements per second of a worker on the slowest machine; a task that takes longer counts as hung."""


class LocalEngine:
    """See `Engine`."""

    def __init__(
        self,
        recipe: Recipe,
        origin: Origin,
        layout: Layout,
        files: Store,
        execution: Execution,
        lock: IO[str],
        warn: Callable[[str], None],
    ) -> None:
        """lock: the run directory's; it stays held until the last worker is gone. warn: called for each lost worker."""
        self._layout = layout
        self._files = files.files
        self._folder = files.folder
        self._execution = execution
        self._records: list[Record] = []
        self._at = min(files.steps())
        """Every layer is at this step or later."""
        self._unchecked = {file.layer.index for file in self._files if file.exists()}
        """Layers whose files have not been read since the engine began."""
        system.trim_memory()  # reading the text and the model has left some 50 MB in it
        setup = Setup(origin, layout, files.folder, recipe.memory.weights, recipe.fitness.kind, execution)
        copy = None if execution.streamed else working_copy.allocate(layout, recipe.memory.weights)
        with ExitStack() as opened:
            if copy is not None:
                opened.callback(os.close, copy)
            self._pss = opened.enter_context(PeakPss(system.family))
            guard = opened.enter_context(Guard(recipe.memory.limit_bytes, lambda: self._pss.last_bytes))
            self._pool = opened.enter_context(
                Pool(setup, copy, lock.fileno(), execution.processes, recipe.workers.deadline, warn, guard)
            )
            self._opened = opened.pop_all()

    @property
    def workers(self) -> int:
        return len(self._pool.pids)

    @property
    def shortage(self) -> str:
        return self._pool.shortage

    @staticmethod
    def prepare() -> None:
        """Optional: starts the process that workers are forked from, while the caller does something else."""
        prepare()

    def score(self, perturbations: Sequence[Perturbation], items: Items, progress: Progress) -> np.ndarray:
        members = sum(perturbation.members for perturbation in perturbations)
        work_seconds = 2 * members * items.scored_tokens * self._layout.size / SLOWEST_FLOPS
        if self._execution.folded:
            return self._score_folded(perturbations, items, members, work_seconds, progress)
        # The perturbations of a tile are a task; if there is only one, its items are divided among all workers.
        execution, share = self._execution, len(items)
        if len(perturbations) == 1:
            share = -(-share // (execution.micro_batch * self.workers)) * execution.micro_batch
        parts = [items.part(low, min(low + share, len(items))) for low in range(0, len(items), share)]
        groups = [perturbations[low : low + execution.group] for low in range(0, len(perturbations), execution.group)]
        tasks = [Score(group, part, execution.pass_samples) for group in groups for part in parts]
        values = self._pool.map(tasks, work_seconds, progress)
        count = len(parts)
        return np.concatenate([np.concatenate(values[i : i + count], axis=1) for i in range(0, len(values), count)])

    def advance(self, records: Sequence[Record], progress: Progress) -> None:
        self._records += records
        step = len(self._records)
        assert [record.step for record in records] == list(range(step - len(records), step)), "records are out of order"
        history = self._records[self._at :]
        if self._execution.streamed:  # advanced as they pass; but a layer needs a file to pass
            layers = [file.layer for file in self._files if not file.exists()]
        else:
            layers = list(self._layout.layers)
        if layers:
            self._advance(layers, history, step, progress)
        if not self._execution.streamed:
            self._at = step

    def settle(self, progress: Progress) -> None:
        """Brings the files of streamed layers, too, to the step that the last record leads to."""
        if self._at < (step := len(self._records)):
            self._advance(self._layout.layers, self._records[self._at :], step, progress)
            self._at = step

    def check(self, progress: Progress) -> None:
        self._each([Check(layer) for layer in sorted(self._unchecked)], [], progress)
        self._unchecked.clear()

    def memory(self) -> tuple[int, int]:
        return self._pss.sample(), self._pss.peak_bytes

    def traffic(self) -> tuple[int, int]:
        return system.io_bytes([os.getpid(), *self._pool.pids])

    def network(self) -> int:
        return 0

    def close(self) -> None:
        try:
            self._opened.close()
        finally:
            with contextlib.suppress(OSError):  # the next run removes them too
                remove_unfinished(self._folder)

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score_folded(
        self, perturbations: Sequence[Perturbation], items: Items, members: int, work_seconds: float, progress: Progress
    ) -> np.ndarray:
        """The whole population at once, in one task; streamed layers are advanced as they pass."""
        execution, records = self._execution, self._records[self._at :]
        micro_batches = execution.pass_samples * execution.members // members // execution.micro_batch
        pass_items = max(1, micro_batches) * execution.micro_batch
        passes = -(-len(items) // pass_items)
        drawn = self._layout.size * (passes * (members + 1) + sum(len(record.coefficients) for record in records))
        task = Score(perturbations, items, pass_items, records, len(self._records))
        (values,) = self._pool.map([task], work_seconds + drawn / SLOWEST_NOISE, progress)
        if execution.streamed:
            self._at = len(self._records)
        return values

    def _advance(self, layers: Sequence[Layer], history: Sequence[Record], step: int, progress: Progress) -> None:
        """Brings layers to `step`."""
        first, second = divide([self._files[layer.index] for layer in layers], history, step, self._execution.processes)
        done = len(first) / (len(first) + len(second))
        self._each(first, history, lambda value: progress(done * value))
        self._each(second, history, lambda value: progress(done + (1 - done) * value))
        self._unchecked -= {layer.index for layer in layers}

    def _each(self, tasks: Sequence[Task], history: Sequence[Record], progress: Progress) -> None:
        """Does tasks that concern one layer each."""
        members = sum(len(record.coefficients) for record in history)
        drawn = (1 + members) * max(layer.size for layer in self._layout.layers)
        self._pool.map(tasks, drawn / SLOWEST_NOISE, progress)


def divide(files: Sequence[LayerFile], history: Sequence[Record], step: int, processes: int) -> tuple[list[Task], list[Task]]:
    """The tasks that bring layers to `step`, in two rounds, largest layer first.

    A layer larger than a process's share is divided into ranges of sections, about four per share; the second round completes it.
    """
    first: list[Task] = []
    second: list[Task] = []
    share = sum(file.layer.size for file in files) // processes
    for file in sorted(files, key=lambda file: -file.layer.size):
        layer, sections = file.layer.index, store.section_count(file)
        if file.layer.size <= share or sections <= 1:
            first.append(Advance(layer, history, step))
            continue
        count = -(-sections * share // (4 * file.layer.size))
        if file.exists():
            first.append(Check(layer))  # the old file, before it is replaced
        for low in range(0, sections, count):
            first.append(AdvanceSections(layer, history, step, low, min(low + count, sections)))
        second.append(Finish(layer, history, step))
    return first, second
