"""Batches of samples: which samples a step draws, how they are packed, and where other machines find them by number."""

from collections.abc import Sized
from dataclasses import dataclass

import numpy as np

from es_lite.data.corpus import Corpus
from es_lite.errors import UserError

HELD_OUT = -1
"""The `number` of an evaluation's items; a step's items have the step as theirs."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples, longest first, padded on the right with 0 to T, the length of the longest."""

    tokens: np.ndarray
    """int32 [B, T]."""
    lengths: np.ndarray
    """int32 [B]."""
    number: int = HELD_OUT
    """Of the items; see `SampleShelf`."""

    def __len__(self) -> int:
        """The number of samples, B."""
        return self.lengths.size

    @property
    def scored_tokens(self) -> int:
        """Tokens that are predicted: all but the first of each sample."""
        return int(np.sum(self.lengths - 1))

    def part(self, low: int, high: int) -> "Batch":
        """Samples low … high - 1."""
        return Batch(self.tokens[low:high, : self.lengths[low]], self.lengths[low:high], self.number)


def spread(items: Sized, count: int) -> np.ndarray:
    """Indices of at most `count` evenly spaced items, beginning with the first: int64."""
    count = min(count, len(items))
    return np.arange(count) * len(items) // count


def draw(samples: int, m: int, seed: int, step: int) -> np.ndarray:
    """m distinct indices below `samples`, int64 [m]: a pure function of the arguments, the same on every machine.

    Sorts raw words of the generator: numpy promises only of these that they never change. Raises UserError if m > samples.
    """
    if m > samples:
        raise UserError(f"fitness.samples = {m}: the corpus has only {samples} samples; lower it or give more text")
    counter = np.array([0, 0, 0, step], np.uint64)  # the lowest word counts the blocks within a step
    words = np.random.Philox(key=seed, counter=counter).random_raw(samples)
    return np.argsort(words, kind="stable")[:m]


def pack(corpus: Corpus, indices: np.ndarray, number: int = HELD_OUT) -> Batch:
    """A batch of the samples `indices`, [B], B > 0; samples of equal length keep their order."""
    lengths = corpus.starts[indices + 1] - corpus.starts[indices]
    order = np.argsort(-lengths, kind="stable")
    indices, lengths = indices[order], lengths[order].astype(np.int32)
    tokens = np.zeros((len(lengths), lengths[0]), np.int32)
    tokens[np.arange(lengths[0]) < lengths[:, None]] = np.concatenate([corpus.sample(i) for i in indices])
    return Batch(tokens, lengths, number)


@dataclass(frozen=True)
class SampleShelf:
    """All samples of a run, and which of them a step or an evaluation takes. Picklable: another machine gets it once."""

    train: Corpus
    held_out: Corpus | None
    """None if the recipe asks for no evaluations."""
    samples: int
    """fitness.samples."""
    held_out_samples: int
    seed: int

    def items(self, number: int) -> Batch:
        """The samples of a step, a pure function of the seed and the step; number HELD_OUT: those of an evaluation."""
        if number != HELD_OUT:
            return pack(self.train, draw(len(self.train), self.samples, self.seed, number), number)
        assert self.held_out is not None
        return pack(self.held_out, spread(self.held_out, self.held_out_samples))
