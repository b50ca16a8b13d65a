"""Prompts packed for generation: the items of a step or of an evaluation, as workers get them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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

    @classmethod
    def pack(cls, rows: np.ndarray, tokens: Sequence[np.ndarray], ends: tuple[int, ...], new_tokens: int) -> "Prompts":
        """tokens: of all rows. Prompts of equal length keep their order."""
        order = np.argsort([-tokens[row].size for row in rows], kind="stable")
        rows = np.asarray(rows, np.int64)[order]
        return cls(rows, [tokens[row] for row in rows], ends, new_tokens)

    def __len__(self) -> int:
        """B."""
        return len(self.tokens)

    @property
    def scored_tokens(self) -> int:
        """Tokens that one member reads and writes, at most."""
        return sum(prompt.size for prompt in self.tokens) + len(self) * self.new_tokens

    def part(self, low: int, high: int) -> "Prompts":
        """Prompts low … high - 1."""
        return Prompts(self.rows[low:high], self.tokens[low:high], self.ends, self.new_tokens)
