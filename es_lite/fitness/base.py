"""What run, engine and plan need of a fitness."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from es_lite.algorithm.shaping import means
from es_lite.recipe import Recipe
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import Perturbation


class Items(Protocol):
    """The items of a step or of an evaluation, the same for all members, packed for scoring. Must be picklable."""

    @property
    def number(self) -> int:
        """Theirs on the shelf that they are from (`Shelf.items`)."""
        ...

    def __len__(self) -> int: ...

    @property
    def scored_tokens(self) -> int:
        """Tokens that one member is scored on, at most."""
        ...

    def part(self, low: int, high: int) -> Self:
        """Items low … high - 1."""
        ...


class Shelf(Protocol):
    """All items of a run, by number. Must be picklable: another machine gets it once, and then numbers."""

    def items(self, number: int) -> Items:
        """The items of the step `number`; of an evaluation if it is HELD_OUT (`data.batch`)."""
        ...


@dataclass(frozen=True)
class GradedCompletion:
    """A completion and what it was worth."""

    prompt: str | list[dict[str, str]]
    completion: str
    rewards: dict[str, float | None]
    """By reward function; None: not counted."""
    score: float | None
    cut: bool
    """It had not ended after generation.max_new_tokens."""


@dataclass(frozen=True)
class Graded:
    """The engine's answers as scores, with what is reported of them."""

    scores: np.ndarray
    """float64 [members, items]; NaN: not counted."""
    figures: dict[str, float] = field(default_factory=dict)
    """Metrics of the work: tokens, seconds."""
    described: dict[str, float] = field(default_factory=dict)
    """Metrics of what was written."""
    samples: Sequence[GradedCompletion] = ()
    """The first member's."""
    warnings: Sequence[str] = ()

    def means(self) -> np.ndarray:
        """Each member's score, the mean over the items that count; NaN if none does: float64 [members]."""
        return means(self.scores)


class Dataset(Protocol):
    """A run's items."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def shelf(self) -> Shelf: ...

    def description(self) -> str:
        """What there is, for people: how many items, and how they begin and end."""
        ...

    def draw(self, step: int) -> Items:
        """The items of a step, a pure function of the seed and the step."""
        ...

    def held_out(self) -> Items:
        """The items of an evaluation; only if the recipe asks for evaluations."""
        ...

    def grade(self, answers: np.ndarray, items: Items, step: int) -> Graded:
        """What `Fitness.score` found for the items, [members, items], as scores. Raises UserError, RunError."""
        ...

    def close(self) -> None:
        """Ends what it has started."""
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
    new_tokens: int = 0
    """Tokens that are written after the item, at most. The rest is 0 if none are."""
    cache: int = 0
    """Bytes of the keys and values of one item for one member."""
    decoding: int = 0
    """Bytes that one item takes in addition while its next token is made."""
    graders: int = 0
    """Bytes of all processes that grade."""
    text: int = 0
    """Bytes of all samples in the coordinator, and of what making them takes, beyond those of a small corpus."""


class Fitness(Protocol):
    """A kind of fitness, without state."""

    measures: str
    """What a score is, in words."""
    unit: str
    largest_loss: float
    """If the population's mean score is further below the unperturbed model's, σ is too large."""
    generates: bool
    """It scores what the model writes after an item."""

    def open(self, recipe: Recipe, config: PretrainedConfig, generation: GenerationConfig | None, run_dir: Path) -> Dataset:
        """The recipe's items, for a model of this configuration. Raises UserError."""
        ...

    def memory(self, recipe: Recipe, config: PretrainedConfig, itemsize: int) -> ItemMemory:
        """config: the model's; itemsize: bytes of an element of the compute type. Raises UserError if it cannot be used so."""
        ...

    def score(self, model: PerturbedModel, perturbations: Sequence[Perturbation], items: Items, pass_items: int) -> np.ndarray:
        """What `Dataset.grade` makes scores of, for each item and each member of all perturbations: [members, items].

        pass_items: items that go through the model at once.
        """
        ...
