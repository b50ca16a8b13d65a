"""A worker process: takes one task at a time from its pipe, works on the working copy or a stream, and answers."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from es_lite import system
from es_lite.algorithm.formats import Storage
from es_lite.engine.base import Execution
from es_lite.engine.messages import Advance, AdvanceSections, Check, Done, Failed, Finish, Ready, Score, Task, Working
from es_lite.errors import RunError, UserError
from es_lite.files import Spare
from es_lite.fitness.kinds import fitness_of
from es_lite.model.layout import Layout
from es_lite.model.origin import Origin
from es_lite.model.source import Source
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.model import PerturbedModel
from es_lite.weights import store
from es_lite.weights.store import Store
from es_lite.weights.stream import Stream
from es_lite.weights.working_copy import WorkingCopy

TELL_SECONDS = 0.5
"""Time between a worker's reports of progress."""

DEVICES = {"cpu": None, "cuda": torch.device("cuda"), "torch": torch.device("cpu")}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Setup:
    """What a worker needs once, sent to the new process."""

    origin: Origin
    layout: Layout
    folder: Path
    """Directory of the layers' files."""
    weights: Storage
    """The type of the weights that are scored from: "bf16" or "int8"."""
    fitness: str
    """The kind of fitness."""
    execution: Execution


class Worker:
    """The state of a worker process: where weights come from and, once needed, θ₀ and the perturbed model."""

    def __init__(self, setup: Setup, working_copy: int | None, tell: Callable[[float], None]) -> None:
        """working_copy: its descriptor; None if the weights are streamed. tell: called with the share of a task that is done."""
        self._setup = setup
        self._tell = tell
        self._told = 0.0
        self._lanes = Lanes(setup.execution.lanes, setup.execution.threads)
        self._files = Store(setup.folder, setup.layout, setup.origin.storage).files
        self._spare = Spare(setup.folder)
        self._working: WorkingCopy | None = None
        self._stream: Stream | None = None
        if working_copy is not None:
            self._working = WorkingCopy(setup.layout, setup.weights, working_copy)
        else:
            self._stream = Stream(
                self._files, setup.layout, setup.weights, self._lanes.all_threads, setup.execution.direct, self._theta_0
            )
        self._model: PerturbedModel | None = None
        self._source: Source | None = None

    def do(self, task: Task) -> np.ndarray | None:
        if isinstance(task, Score):
            if self._stream:
                self._stream.advance(task.records, task.step)
            fitness = fitness_of(self._setup.fitness)
            return fitness.score(self._scoring_model(), task.perturbations, task.items, task.pass_items)
        file = self._files[task.layer]
        if isinstance(task, Check):
            file.check(self._setup.execution.direct)
            return None
        made = not file.exists()
        how = self._theta_0, task.records, task.step, self._working, self._lanes.all_threads
        if isinstance(task, Advance):
            store.advance_layer(file, *how, self._spare)
        elif isinstance(task, AdvanceSections):
            store.advance_layer_sections(file, task.low, task.high, *how)
        else:
            assert isinstance(task, Finish)
            store.finish_layer(file, *how)
        if made:
            system.trim_memory()  # drawing θ₀ leaves hundreds of megabytes in it
        return None

    def _theta_0(self) -> Source:
        if self._source is None:
            origin = self._setup.origin
            self._source = origin.source(origin.skeleton()[0], self._setup.layout, self._lanes.all_threads)
        return self._source

    def _scoring_model(self) -> PerturbedModel:
        if self._model is None:
            setup, execution = self._setup, self._setup.execution
            weights = self._stream or self._working
            assert weights is not None
            self._model = PerturbedModel(
                setup.origin.skeleton()[0],
                setup.layout,
                weights,
                DTYPES[execution.compute],
                self._lanes,
                execution.micro_batch,
                execution.tile_members,
                execution.prompt_members,
                execution.kept,
                DEVICES[execution.device],
                self._progress,
            )
        return self._model

    def _progress(self, share: float) -> None:
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self._tell(share)


def main(connection: Connection, setup: Setup, working_copy: Any, lock: Any) -> None:
    """Entry of the process. working_copy, lock: the working copy's descriptor (or None) and the run directory's, as DupFd.

    The lock stays held until this process, too, is gone: no other run may begin while it might still write.
    """
    # They may be sent to the whole process group; the coordinator handles them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_coordinator()
    _prefer_to_be_killed()
    lock.detach()
    descriptor = working_copy.detach() if working_copy else None
    worker = Worker(setup, descriptor, lambda share: connection.send(Working(share)))
    connection.send(Ready())
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        answer: Done | Failed
        try:
            answer = Done(worker.do(task))
        except (UserError, RunError) as error:
            answer = Failed(error)
        except Exception:
            answer = Failed(RunError(f"a worker failed at {type(task).__name__}:\n{traceback.format_exc()}"))
        connection.send(answer)


def _die_with_coordinator() -> None:
    """Ends this process when its coordinator ends, even in the middle of a task.

    The process that it is forked from ends with the coordinator, and this process with that one.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    coordinator = multiprocessing.parent_process()
    if coordinator is None or not coordinator.is_alive():  # it died before the request took effect
        os._exit(1)


def _prefer_to_be_killed() -> None:
    """If memory runs out, the kernel should kill a worker: its task is repeated, and nothing is lost."""
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text("1000")
