"""What run, engine and plan need of a fitness."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from es_lite.recipe import Recipe
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import Perturbation


class Items(Protocol):
    """The items of a step or of an evaluation, the same for all members, packed for scoring. Must be picklable."""

    def __len__(self) -> int: ...

    @property
    def scored_tokens(self) -> int:
        """Tokens that one member is scored on."""
        ...

    def part(self, low: int, high: int) -> Self:
        """Items low … high - 1."""
        ...


class Dataset(Protocol):
    """A run's items."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def draw(self, step: int) -> Items:
        """The items of a step, a pure function of the seed and the step."""
        ...

    def held_out(self) -> Items:
        """The items of an evaluation; only if the recipe asks for evaluations."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 of all items, which ties a journal to them."""
        ...

    def reference(self) -> dict[str, float]:
        """Metrics to compare with, for the line of step 0."""
        ...


@dataclass(frozen=True)
class ItemMemory:
    """Memory that scoring takes in addition to the weights."""

    tokens: int
    """Tokens of the longest item."""
    hidden: int
    """Bytes of the hidden states of one item for one member."""
    activations: int
    """Bytes of everything else that a micro-batch takes at once."""


class Fitness(Protocol):
    """A kind of fitness, without state."""

    measures: str
    """What a score is, in words."""
    unit: str
    largest_loss: float
    """If the population's mean score is further below the unperturbed model's, σ is too large."""

    def open(self, recipe: Recipe, config: PretrainedConfig, run_dir: Path) -> Dataset:
        """The recipe's items, for a model of this configuration. Raises UserError."""
        ...

    def memory(self, recipe: Recipe, text: PretrainedConfig, itemsize: int) -> ItemMemory:
        """text: the language model's configuration; itemsize: bytes of an element of the compute type."""
        ...

    def score(self, model: PerturbedModel, perturbations: Sequence[Perturbation], items: Items, pass_items: int) -> np.ndarray:
        """Score of each item for each member of all perturbations: float64 [members, items].

        pass_items: items that go through the model at once.
        """
        ...
