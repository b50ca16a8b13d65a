"""A worker process: takes one task at a time from its pipe, works on the shared copy of the weights or their stream, answers.

Every task is a pure function of its fields, the weights at its step and θ₀, so one that was lost with its
worker is simply given to another.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from es_lite.algorithm.record import Record
from es_lite.data import Batch
from es_lite.errors import RunError, UserError
from es_lite.runs.origin import Origin
from es_lite.scoring.forward import PerturbedModel
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.perturb import Perturbation
from es_lite.weights import store
from es_lite.weights.layout import Layout
from es_lite.weights.source import Source
from es_lite.weights.stored import Storage
from es_lite.weights.stream import Stream
from es_lite.weights.working import WorkingCopy


@dataclass(frozen=True)
class Setup:
    """What a worker needs once; it is pickled to the new process."""

    origin: Origin
    layout: Layout
    store: Path
    """Directory of the layers' files."""
    weights: Storage
    """What is scored from: "bf16" or "int8"."""
    direct: bool
    """Streamed: past the page cache."""
    compute: str
    """"bf16" or "fp32"."""
    device: str
    """"cpu" or "cuda"."""
    lanes: int
    """Computations side by side in the one worker that a stream has; else 1."""
    threads: int
    """Of a lane."""
    micro_batch: int


@dataclass(frozen=True)
class Score:
    """Score `batch` under each perturbation: mean log-probability of each sample, float64 [members, B]."""

    perturbations: Sequence[Perturbation]
    batch: Batch
    pass_samples: int
    records: Sequence[Record] = ()
    step: int = 0
    """Streamed: the step that the layers are brought to as they pass, by `records`."""


@dataclass(frozen=True)
class Advance:
    """Bring a layer's file, and its part of a working copy, to `step` (weights.store.bring_level)."""

    layer: int
    records: Sequence[Record]
    step: int


@dataclass(frozen=True)
class Check:
    """Read a layer's file and compare its checksum."""

    layer: int


Task = Score | Advance | Check


@dataclass(frozen=True)
class Ready:
    """A worker's first message: it has started."""


@dataclass(frozen=True)
class Progress:
    """Of the task that is being done: so many parameters more have passed."""

    parameters: int


@dataclass(frozen=True)
class Done:
    value: Any


@dataclass(frozen=True)
class Failed:
    """The task cannot be done by any worker; `error` ends the run."""

    error: Exception


class Worker:
    """The state of a worker process: where weights come from and, once they are needed, θ₀ and the model with its doors."""

    def __init__(self, setup: Setup, descriptor: int | None, progress: Callable[[int], None]) -> None:
        """descriptor: the working copy's; None where the weights are streamed."""
        self._setup = setup
        self._lanes = Lanes(setup.lanes, setup.threads)
        self._files = setup.origin.files(setup.store, setup.layout)
        self._working: WorkingCopy | None = None
        self._stream: Stream | None = None
        if descriptor is not None:
            self._working = WorkingCopy(setup.layout, setup.weights, descriptor)
        else:
            self._stream = Stream(self._files, setup.layout, setup.weights, self._lanes.all_threads, setup.direct, progress)
        self._model: PerturbedModel | None = None
        self._source: Source | None = None

    def do(self, task: Task) -> list[np.ndarray] | None:
        if isinstance(task, Score):
            if self._stream:
                self._stream.target(task.records, task.step)
            return self._scoring_model().score(task.perturbations, task.batch, task.pass_samples)
        file = self._files[task.layer]
        if isinstance(task, Advance):
            store.bring_level(file, self._theta_0, task.records, task.step, self._working, self._lanes.all_threads)
        else:
            store.check(file, self._setup.direct)
        return None

    def _theta_0(self) -> Source:
        if self._source is None:
            origin = self._setup.origin
            self._source = origin.source(origin.skeleton()[0], self._setup.layout, self._lanes.all_threads)
        return self._source

    def _scoring_model(self) -> PerturbedModel:
        if self._model is None:
            setup = self._setup
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[setup.compute]
            weights = self._stream or self._working
            assert weights is not None
            self._model = PerturbedModel(setup.origin.skeleton()[0], setup.layout, weights, dtype, self._lanes, setup.micro_batch)
        return self._model


def main(connection: Connection, setup: Setup, descriptor: Any, lock: Any) -> None:
    """Entry of the process. descriptor, lock: the working copy's (or None) and the run directory's, as multiprocessing's DupFd.

    The lock stays held until this process, too, is gone: no other run may begin while it might still write.
    """
    # Ctrl-C and SIGTERM may reach the whole group, and the coordinator decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_coordinator()
    _go_first()
    lock.detach()
    worker = Worker(setup, descriptor.detach() if descriptor else None, lambda parameters: connection.send(Progress(parameters)))
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
    """No worker outlives its coordinator, even one that is killed or stopped in the middle of a task.

    The process that it is forked from ends with the coordinator, and the worker with that one.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    coordinator = multiprocessing.parent_process()
    if coordinator is None or not coordinator.is_alive():  # it died before the request took effect
        os._exit(1)


def _go_first() -> None:
    """Should the kernel have to end a process for memory, then a worker: its task is done again, and nothing is lost."""
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text("1000")
