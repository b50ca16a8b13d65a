"""What passes between the engine and its workers: tasks and answers.

Every task is a pure function of its fields, the weights at its step and θ₀, so a task lost with its worker is given to another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from es_lite.algorithm.record import Record
from es_lite.fitness.base import Items
from es_lite.scoring.perturbation import Perturbation


@dataclass(frozen=True)
class Score:
    """Score `items` under each perturbation: float64 [members, items]."""

    name: ClassVar[str] = "score"
    perturbations: Sequence[Perturbation]
    items: Items
    pass_items: int
    records: Sequence[Record] = ()
    step: int = 0
    """If streamed: bring the layers to this step, by `records`, as they pass."""


@dataclass(frozen=True)
class Advance:
    """Bring a layer's file, and its part of a working copy, to `step`, by `records` (weights.store.advance_layer)."""

    name: ClassVar[str] = "update"
    layer: int
    records: Sequence[Record]
    step: int


@dataclass(frozen=True)
class AdvanceSections:
    """The same for sections low … high - 1 of the layer (weights.store.advance_layer_sections)."""

    name: ClassVar[str] = "update"
    layer: int
    records: Sequence[Record]
    step: int
    low: int
    high: int


@dataclass(frozen=True)
class Finish:
    """Complete a layer after all its `AdvanceSections` (weights.store.finish_layer)."""

    name: ClassVar[str] = "update"
    layer: int
    records: Sequence[Record]
    step: int


@dataclass(frozen=True)
class Check:
    """Read a layer's file and compare its checksum."""

    name: ClassVar[str] = "check"
    layer: int


Task = Score | Advance | AdvanceSections | Finish | Check


@dataclass(frozen=True)
class Ready:
    """A worker's first message: it has started."""


@dataclass(frozen=True)
class Working:
    """This share of the task is done."""

    share: float


@dataclass(frozen=True)
class Done:
    value: Any


@dataclass(frozen=True)
class Failed:
    """No worker can do the task; `error` ends the run."""

    error: Exception


Answer = Ready | Working | Done | Failed
