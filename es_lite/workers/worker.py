"""A worker process: takes one task at a time from its pipe, works on the shared copy of the weights, answers.

Every task is a pure function of its fields, the weights at its step and θ₀, so one that was lost with its
worker is simply given to another.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from es_lite.algorithm.kernels import Threads
from es_lite.algorithm.record import Record
from es_lite.data import Batch
from es_lite.errors import RunError, UserError
from es_lite.runs.origin import Origin
from es_lite.scoring.forward import PerturbedModel
from es_lite.scoring.perturb import Perturbation
from es_lite.weights.layout import Layout
from es_lite.weights.master import bring_level
from es_lite.weights.source import Source
from es_lite.weights.working import WorkingCopy


@dataclass(frozen=True)
class Setup:
    """What a worker needs once; it is pickled to the new process."""

    origin: Origin
    layout: Layout
    master: Path
    """Directory of the layers' files."""
    compute: str
    """"bf16" or "fp32"."""
    threads: int
    micro_batch: int


@dataclass(frozen=True)
class Score:
    """Score `batch` under the perturbation: mean log-probability of each sample, float64 [G, B]."""

    perturbation: Perturbation
    batch: Batch
    pass_samples: int


@dataclass(frozen=True)
class Advance:
    """Bring a layer's master file and working copy to `step` (weights.master.bring_level)."""

    layer: int
    records: Sequence[Record]
    step: int


Task = Score | Advance


@dataclass(frozen=True)
class Ready:
    """A worker's first message: it has started."""


@dataclass(frozen=True)
class Done:
    value: Any


@dataclass(frozen=True)
class Failed:
    """The task cannot be done by any worker; `error` ends the run."""

    error: Exception


class Worker:
    """The state of a worker process: the mapped working copy and, once it is needed, the model with its doors."""

    def __init__(self, setup: Setup, descriptor: int) -> None:
        self._setup = setup
        self._threads = Threads(setup.threads)
        self._working = WorkingCopy(setup.layout, descriptor)
        self._model: PerturbedModel | None = None
        self._source: Source | None = None
        torch.set_num_threads(setup.threads)

    def do(self, task: Task) -> np.ndarray | None:
        if isinstance(task, Score):
            return self._scoring_model().score(task.perturbation, task.batch, task.pass_samples)
        setup = self._setup
        layer = setup.layout.layers[task.layer]
        bring_level(setup.master, layer, self._theta_0, task.records, task.step, self._working, self._threads)
        return None

    def _theta_0(self) -> Source:
        if self._source is None:
            origin = self._setup.origin
            self._source = origin.source(origin.skeleton()[0], self._setup.layout)
        return self._source

    def _scoring_model(self) -> PerturbedModel:
        if self._model is None:
            setup = self._setup
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[setup.compute]
            self._model = PerturbedModel(
                setup.origin.skeleton()[0], setup.layout, self._working, dtype, self._threads, setup.micro_batch
            )
        return self._model


def main(connection: Connection, setup: Setup, descriptor: Any, lock: Any, parent: int) -> None:
    """Entry of the process. descriptor, lock: the working copy's and the run directory's, as multiprocessing's DupFd.

    The lock stays held until this process, too, is gone: no other run may begin while it might still write.
    """
    # Ctrl-C and SIGTERM may reach the whole group, and the coordinator decides; until here the pool had it blocked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with(parent)
    lock.detach()
    worker = Worker(setup, descriptor.detach())
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


def _die_with(parent: int) -> None:
    """No worker outlives its coordinator, even one that is killed or stopped in the middle of a task."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request took effect
        os._exit(1)
