"""Greedy decoding under perturbed weights (Evolution Strategies at Scale, section 3): every member continues every prompt.

One forward of Hugging Face's model reads the prompts and makes the first new token of all sequences, and one more makes each
further token. A sequence ends with one of the model's end tokens, or after a number of tokens; then it leaves its tile, and the
others' products become smaller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from es_lite.scoring.sequences import LEAVE, PADDING, ROUND, KeyValueCache, SequenceTile
from es_lite.scoring.tiles import PerturbationGroup


@dataclass(frozen=True)
class Limits:
    """When a sequence ends."""

    ends: tuple[int, ...]
    """The model's end tokens; the first that is written is the last token of the sequence."""
    new_tokens: int
    """The most tokens that are written."""


Forward = Callable[[Sequence[SequenceTile], np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""The next token of each row, int64 [R]; takes the tiles, tokens int64 [R, T], what is no padding, bool [R, S], and positions
int64 [R, T]."""


class Sequences:
    """The sequences of a tile: prompts of a few members, in the order of the members."""

    def __init__(
        self,
        group: PerturbationGroup,
        members: range,
        first_prompt: int,
        prompts: Sequence[np.ndarray],
        limits: Limits,
        layers: int,
    ) -> None:
        """members: numbers in the group; prompts: int32 [tokens] each; first_prompt: the number of the first one."""
        self.group = group
        self.members = members
        self._prompts = prompts
        self._first_prompt = first_prompt
        self._lengths = np.array([prompt.size for prompt in prompts])
        self._limits = limits
        self.prompt_slots = PADDING + int(self._lengths.max())
        rows = len(members) * len(prompts)
        self._cache = KeyValueCache(rows, self.prompt_slots + limits.new_tokens - 1, layers)
        self.member = np.repeat(np.arange(len(members)), len(prompts))
        """Of each row in the tile: its member's place among `members`."""
        self.prompt = np.tile(np.arange(len(prompts)), len(members))
        """Likewise, its prompt."""
        self._written = np.zeros((rows, limits.new_tokens), np.int32)
        self._count = 0
        """Tokens that each unfinished row has written."""
        self._ended = np.zeros(rows, bool)
        self.finished: dict[tuple[int, int], np.ndarray | None] = {}
        """(member of the group, prompt) → what was written, int32; None if the model's logits were not numbers."""

    @property
    def rows(self) -> int:
        return self.member.size

    @property
    def slots(self) -> int:
        """Slots of the cache that are in use."""
        return self._cache.slots

    def tiles(self, first_row: int, total: int, most_members: int) -> list[SequenceTile]:
        """What is multiplied together in the next forward, in which the tile's rows begin with `first_row`.

        most_members: of a part, while prompts are read, which have many tokens each.
        """
        counts = np.bincount(self.member, minlength=len(self.members)).tolist()
        rows = slice(first_row, first_row + self.rows)
        length = 1 if self.slots else self.prompt_slots
        whole = SequenceTile(self.group, self.members, tuple(counts), rows, length, total, self._cache, slice(0, self.rows))
        if self.slots or most_members >= len(self.members):
            return [whole]
        parts, each = [], len(self._prompts)
        for low in range(0, len(self.members), most_members):
            some = self.members[low : low + most_members]
            first = first_row + low * each
            part = slice(first, first + len(some) * each)
            parts.append(whole.part(some, (each,) * len(some), part, -first_row))
        return parts

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [R, T], what is no padding [R, S], positions [R, T] of the next forward."""
        lengths = self._lengths[self.prompt]
        if self.slots:
            tokens = self._written[:, self._count - 1 : self._count].astype(np.int64)
            positions = lengths[:, None] + self._count - 1
            seen = np.arange(self.slots + 1) >= (self.prompt_slots - lengths)[:, None]
            return tokens, seen, positions
        tokens = np.zeros((self.rows, self.prompt_slots), np.int64)
        for row, prompt in enumerate(self.prompt):
            tokens[row, self.prompt_slots - lengths[row] :] = self._prompts[prompt]
        seen = np.arange(self.prompt_slots) >= (self.prompt_slots - lengths)[:, None]
        return tokens, seen, np.maximum(0, seen.cumsum(axis=1) - 1)

    def wrote(self, tokens: np.ndarray) -> None:
        """Adds the next token of each row, int64; those that end leave."""
        self._cache.slots += 1 if self.slots else self.prompt_slots
        self._written[:, self._count] = tokens
        self._count += 1
        ending = ~self._ended & (np.isin(tokens, self._limits.ends) | (tokens < 0) | (self._count == self._limits.new_tokens))
        for row in np.flatnonzero(ending):
            key = self.members[self.member[row]] + self.group.first, self._first_prompt + int(self.prompt[row])
            self.finished[key] = None if tokens[row] < 0 else self._written[row, : self._count].copy()
        self._ended |= ending
        self._written[tokens < 0, self._count - 1] = 0
        if self._ended.sum() * LEAVE >= self.rows:
            self._leave()

    def _leave(self) -> None:
        writing = np.count_nonzero(~self._ended)
        fill = -writing % ROUND
        stay = np.sort(np.concatenate([np.flatnonzero(~self._ended), np.flatnonzero(self._ended)[: fill if writing else 0]]))
        if stay.size == self.rows:
            return
        self._cache.keep(stay)
        self.member, self.prompt = self.member[stay], self.prompt[stay]
        self._written, self._ended = self._written[stay], self._ended[stay]


def generate(
    groups: Sequence[PerturbationGroup],
    prompts: Sequence[np.ndarray],
    limits: Limits,
    micro_batch: int,
    prompt_members: int,
    layers: int,
    forward: Forward,
) -> np.ndarray:
    """What each member of the groups writes after each prompt: int32 [tokens] or None, in an object array [members, prompts].

    prompts: int32 [tokens] each. micro_batch: prompts of a tile; a tile has all members of a group that share products, else one.
    prompt_members: members of a tile whose prompts are read together.
    """
    everything: list[Sequences] = []
    for group in groups:
        each = group.members if group.perturbations[0].factored else 1
        for first in range(0, group.members, each):
            members = range(first, first + each)
            for low in range(0, len(prompts), micro_batch):
                everything.append(Sequences(group, members, low, prompts[low : low + micro_batch], limits, layers))
    writing = everything
    while writing:
        total, row, tiles = sum(tile.rows for tile in writing), 0, []
        for tile in writing:
            tiles += tile.tiles(row, total, prompt_members)
            row += tile.rows
        inputs = [tile.inputs() for tile in writing]
        tokens, seen, positions = (_aligned([part[i] for part in inputs]) for i in range(3))
        parts = np.split(forward(tiles, tokens, seen, positions), np.cumsum([tile.rows for tile in writing])[:-1])
        for tile, part in zip(writing, parts, strict=True):
            tile.wrote(part)
        writing = [tile for tile in writing if tile.rows]
    results = np.empty((sum(group.members for group in groups), len(prompts)), object)
    for tile in everything:
        for place, tokens_written in tile.finished.items():
            results[place] = tokens_written
    return results


def _aligned(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays [rows, width] one below the other, padded on the left with 0."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (width - part.shape[1], 0))) for part in parts])
