"""What a run needs of an engine, and how an engine is told to use the machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from es_lite.algorithm.record import Record
from es_lite.fitness.base import Items
from es_lite.scoring.perturbation import Perturbation

Progress = Callable[[float], None]
"""Is told the share of the work that is done, 0 … 1, at least once a second while work is under way."""


@dataclass(frozen=True)
class Usage:
    """What the engine's processes use, this one included."""

    pss_bytes: int
    peak_pss_bytes: int
    read_bytes: int
    """Read from disks since the processes began; likewise written."""
    written_bytes: int


class Engine(Protocol):
    """Scores perturbed models, and advances the weights. Where the weights are, and at which step, only the engine knows.

    A context manager: no process of it is left when it ends, however it ends.
    """

    @property
    def workers(self) -> int:
        """Worker processes."""
        ...

    @property
    def shortage(self) -> str:
        """Why the run should end after this step although nothing has failed, such as too little memory; "" if it need not."""
        ...

    def score(self, perturbations: Sequence[Perturbation], items: Items, progress: Progress) -> np.ndarray:
        """Score of each item for each member of all perturbations: float64 [members, items].

        The weights are those after the records that `advance` was given.
        """
        ...

    def advance(self, records: Sequence[Record], progress: Progress) -> None:
        """Takes the weights through `records`, which follow on from those of the calls before; the first call begins at step 0.

        Weights may be brought to the step now or when they are next used; weights that are ahead already stay as they are.
        """
        ...

    def check(self, progress: Progress) -> None:
        """Raises DamagedFile if a layer's file that has not been read yet is not what was written."""
        ...

    def usage(self) -> Usage: ...

    def close(self) -> None:
        """Ends all processes at once; whatever they were doing can be done again."""
        ...


@dataclass(frozen=True)
class Execution:
    """How the machine is used, as the plan decides."""

    streamed: bool
    direct: bool
    """Streamed past the page cache, which has no room for the layers."""
    device: str
    """"cpu": the kernels; "cuda": a GPU; "torch": the GPU's code on the CPU."""
    compute: str
    """"bf16" or "fp32"."""
    workers: int
    """Members are scored in this many places at once: processes over a resident copy, or lanes of one process."""
    threads: int
    """Threads of each worker or lane."""
    members: int
    """Whose hidden states are in memory together."""
    pass_samples: int
    """Items whose hidden states are in memory together, a multiple of fitness.micro_batch."""
    micro_batch: int

    @property
    def folded(self) -> bool:
        """One process scores all members in one pass."""
        return self.streamed or self.device != "cpu"

    @property
    def processes(self) -> int:
        return 1 if self.folded else self.workers

    @property
    def lanes(self) -> int:
        """Lanes of each process."""
        return self.workers if self.folded else 1
