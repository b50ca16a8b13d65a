"""Prompts packed for generation: the items of a step or of an evaluation, and where other machines find them by number."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from es_lite.data.batch import HELD_OUT, draw, spread


@dataclass(frozen=True, eq=False)
class Prompts:
    """B prompts, longest first, and when what is written after them ends."""

    rows: np.ndarray
    """int64 [B]: numbers of the rows that the prompts are made of."""
    tokens: Sequence[np.ndarray]
    """int32 [length] each."""
    ends: tuple[int, ...]
    """End tokens of the model."""
    new_tokens: int
    """The most tokens that are written after a prompt."""
    number: int = HELD_OUT
    """Of the items; see `PromptShelf`."""

    @classmethod
    def pack(
        cls, rows: np.ndarray, tokens: Sequence[np.ndarray], ends: tuple[int, ...], new_tokens: int, number: int = HELD_OUT
    ) -> "Prompts":
        """tokens: of all rows. Prompts of equal length keep their order."""
        order = np.argsort([-tokens[row].size for row in rows], kind="stable")
        rows = np.asarray(rows, np.int64)[order]
        return cls(rows, [tokens[row] for row in rows], ends, new_tokens, number)

    def __len__(self) -> int:
        """B."""
        return len(self.tokens)

    @property
    def scored_tokens(self) -> int:
        """Tokens that one member reads and writes, at most."""
        return sum(prompt.size for prompt in self.tokens) + len(self) * self.new_tokens

    def part(self, low: int, high: int) -> "Prompts":
        """Prompts low … high - 1."""
        return Prompts(self.rows[low:high], self.tokens[low:high], self.ends, self.new_tokens, self.number)


@dataclass(frozen=True)
class PromptShelf:
    """All prompts of a run, and which of them a step or an evaluation takes. Picklable: another machine gets it once."""

    tokens: Sequence[np.ndarray]
    """Each row's prompt, int32 [length]: to train on first, then held-out ones."""
    train: int
    """How many of them are to train on."""
    ends: tuple[int, ...]
    new_tokens: int
    samples: int
    """fitness.samples."""
    held_out_samples: int
    seed: int

    def items(self, number: int) -> Prompts:
        """The prompts of a step, a pure function of the seed and the step; number HELD_OUT: those of an evaluation."""
        if number != HELD_OUT:
            rows = draw(self.train, self.samples, self.seed, number)
        else:
            rows = self.train + spread(self.tokens[self.train :], self.held_out_samples)
        return Prompts.pack(rows, self.tokens, self.ends, self.new_tokens, number)
