"""How the work of a step is divided among hosts: which of its grains each scores, and how the answers become one.

A grain is one perturbation with all items or, if there is only one perturbation, a micro-batch of items. A host scores a span of
them at once. Which host scores what changes no score, so a span can be given to another host at any time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from es_lite.fitness.base import Items
from es_lite.scoring.perturbation import Perturbation


@dataclass(frozen=True)
class Span:
    """Grains low … high - 1."""

    low: int
    high: int

    def __len__(self) -> int:
        return self.high - self.low

    @property
    def grains(self) -> range:
        return range(self.low, self.high)


def spans_of(grains: Iterable[int]) -> list[Span]:
    """Grains in ascending order as few spans."""
    spans: list[Span] = []
    for grain in grains:
        if spans and spans[-1].high == grain:
            spans[-1] = Span(spans[-1].low, grain + 1)
        else:
            spans.append(Span(grain, grain + 1))
    return spans


def divide(spans: Sequence[Span], speeds: Sequence[float]) -> list[list[Span]]:
    """What each of several hosts gets, so that all of them end at about the same time; nothing for those that are too slow.

    speeds: grains per second of each, or multiples of that, greater than 0.
    """
    count, ends = sum(map(len, spans)), np.cumsum(speeds) / np.sum(speeds)
    bounds = [0, *(round(count * end) for end in ends)]
    return [list(_cut(spans, low, high)) for low, high in pairwise(bounds)]


def _cut(spans: Sequence[Span], low: int, high: int) -> Iterator[Span]:
    """Grains number low … high - 1 of those in the spans."""
    before = 0
    for span in spans:
        first, last = max(low, before), min(high, before + len(span))
        if first < last:
            yield Span(span.low + first - before, span.low + last - before)
        before += len(span)


@dataclass
class Work:
    """A population, or θ, to be scored on the same items, and the answers so far."""

    perturbations: Sequence[Perturbation]
    items: Items
    micro_batch: int
    _answers: dict[int, np.ndarray] = field(default_factory=dict)
    """By grain: [members, items] of it."""

    @property
    def by_items(self) -> bool:
        return len(self.perturbations) == 1

    @property
    def grains(self) -> int:
        return -(-len(self.items) // self.micro_batch) if self.by_items else len(self.perturbations)

    def size(self, span: Span) -> float:
        """What a span takes, in members times tokens."""
        if self.by_items:
            return self.items.scored_tokens * len(span) / self.grains * self.perturbations[0].members
        return self.items.scored_tokens * float(sum(p.members for p in self.perturbations[span.low : span.high]))

    def part(self, span: Span) -> tuple[Sequence[Perturbation], int, int]:
        """The perturbations and the items, low … high - 1, of a span."""
        if self.by_items:
            low, high = span.low * self.micro_batch, span.high * self.micro_batch
            return self.perturbations, low, min(high, len(self.items))
        return self.perturbations[span.low : span.high], 0, len(self.items)

    def answered(self, span: Span, values: np.ndarray) -> None:
        """values: of all members and items of the span. What was answered before stays."""
        at = 0
        for grain in span.grains:
            if self.by_items:
                size, found = self.micro_batch, values[:, at : at + self.micro_batch]
            else:
                size = self.perturbations[grain].members
                found = values[at : at + size]
            at += size
            self._answers.setdefault(grain, found)

    def missing(self, spans: Sequence[Span]) -> list[Span]:
        """What nobody has answered of them."""
        return spans_of(grain for span in spans for grain in span.grains if grain not in self._answers)

    @property
    def done(self) -> int:
        """Grains that are answered."""
        return len(self._answers)

    def values(self) -> np.ndarray:
        """All answers, [members, items]."""
        return np.concatenate([self._answers[grain] for grain in range(self.grains)], axis=1 if self.by_items else 0)
