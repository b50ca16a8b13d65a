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
    """What the fitness finds for each item under each perturbation: [members, items]."""

    name: ClassVar[str] = "score"
    perturbations: Sequence[Perturbation]
    items: Items
    pass_items: int
    records: Sequence[Record] = ()
    step: int = 0
    """If streamed: bring the layers to this step, by `records`, as they pass."""


@dataclass(frozen=True)
class Update:
    """What the tasks have in common that bring a layer to `step` by `records`."""

    name: ClassVar[str] = "update"
    layer: int
    records: Sequence[Record]
    step: int


class Advance(Update):
    """All of a layer: its file and its part of a working copy (weights.store.advance_layer)."""


@dataclass(frozen=True)
class AdvanceSections(Update):
    """Sections low … high - 1 of a layer (weights.store.advance_layer_sections)."""

    low: int
    high: int


class Finish(Update):
    """Complete a layer after all its `AdvanceSections` (weights.store.finish_layer)."""


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
