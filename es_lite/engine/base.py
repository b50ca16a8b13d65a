"""What a run needs of an engine, and how the engine uses the machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from es_lite.algorithm.record import Record
from es_lite.fitness.base import Items
from es_lite.scoring.perturbation import Perturbation

Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 … 1, a few times a second if the engine knows it."""


class Engine(Protocol):
    """Scores perturbed models, and advances the weights; only the engine knows where they are, and at which step.

    A context manager: none of its processes is left when it ends, however it ends.
    """

    @property
    def workers(self) -> int:
        """Worker processes."""
        ...

    @property
    def shortage(self) -> str:
        """Why the run should end after this step although nothing has failed, such as too little memory; "" otherwise."""
        ...

    def score(self, perturbations: Sequence[Perturbation], items: Items, progress: Progress) -> np.ndarray:
        """What the fitness finds for each item and each member of all perturbations, to be graded: [members, items].

        The weights are those after all records that `advance` was given.
        """
        ...

    def advance(self, records: Sequence[Record], progress: Progress) -> None:
        """Applies `records`, which continue those of earlier calls; the first call begins at step 0.

        Weights may be advanced now or when they are next used; records that a layer's file already contains are skipped.
        """
        ...

    def check(self, progress: Progress) -> None:
        """Verifies the layers' files that have not been read yet. Raises DamagedFile."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes of PSS of all processes, this one included: now, and at its peak. It takes milliseconds per GiB."""
        ...

    def traffic(self) -> tuple[int, int]:
        """Bytes that all processes have read from disks, and written to them."""
        ...

    def network(self) -> int:
        """Bytes that have passed, since the last call, between the coordinator and the host with the most; 0 if there is none."""
        ...

    def close(self) -> None:
        """Kills all processes; their tasks can be repeated."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class Execution:
    """How the machine is used, as the plan decides."""

    streamed: bool
    direct: bool
    """Streamed bypassing the page cache, which has no room for the layers."""
    device: str
    """"cpu": the kernels; "cuda": a GPU; "torch": the GPU's code on the CPU."""
    compute: str
    """"bf16" or "fp32"."""
    workers: int
    """Concurrent computations: processes or, if folded, lanes of one process."""
    threads: int
    """Threads of each worker or lane."""
    members: int
    """Members whose hidden states are in memory together."""
    pass_samples: int
    """Items whose hidden states are in memory together, a multiple of fitness.micro_batch."""
    micro_batch: int
    tile_members: int
    """Members whose rows are multiplied together, if the noise is low-rank."""
    prompt_members: int
    """Likewise, while prompts are read, before a generation."""
    kept: bool
    """Weights that are perturbed or converted for a generation stay in memory until its end."""
    group: int
    """Perturbations that a worker scores together, if not folded: those of a tile."""

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
