"""Tiles: the rows that are multiplied together. Which rows they are depends on the perturbations and the batch alone.

Here they are rows of samples that are scored; `sequences` has those of sequences that are generated.

Shapes: G members of all perturbations, B samples, T the longest sample.
"""

import math
import threading
from collections import UserDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from es_lite.scoring.perturbation import Perturbation


@dataclass(frozen=True)
class PerturbationGroup:
    """Perturbations whose members may share a tile."""

    first: int
    """Number of its first member among the G."""
    perturbations: Sequence[Perturbation]

    @property
    def members(self) -> int:
        return sum(perturbation.members for perturbation in self.perturbations)


@dataclass(frozen=True)
class TileOfMembers:
    """What tiles of samples and of sequences have in common."""

    group: PerturbationGroup
    members: range
    """Numbers in the group: all of them, or some that belong together, or one."""

    @property
    def perturbations(self) -> slice:
        """Which perturbations of the group the members belong to."""
        each = self.group.perturbations[0].members
        return slice(self.members.start // each, -(-self.members.stop // each))

    @property
    def signs(self) -> tuple[int, ...]:
        """The signs of the tile's members of a perturbation: all of them, or that of the only member."""
        signs = self.group.perturbations[0].signs
        return signs if len(self.members) > 1 else (signs[self.members.start % len(signs)],)

    def own(self, left: UserDict) -> UserDict:
        """The tile's part of what blocks leave for later ones (keys and values, in Gemma 3n and 4)."""
        return left.data.setdefault(("tile", *self.numbers()), type(left)())

    def numbers(self) -> tuple[int, ...]:
        """Those of the tile's rows, which tell it from all others of a forward."""
        raise NotImplementedError


@dataclass(frozen=True)
class Tile(TileOfMembers):
    """The samples of one micro-batch for some members of a group, cut to the longest of these samples."""

    samples: slice
    """Which of the B samples."""
    length: int
    """Tokens."""
    batch: tuple[int, int]
    """(G, B)."""
    longest: int
    """T."""
    heads: int
    """Of the model's attention."""

    @property
    def rows(self) -> tuple[slice, slice]:
        """Which of the G members, and which of the B samples."""
        first = self.group.first
        return slice(first + self.members.start, first + self.members.stop), self.samples

    @property
    def count(self) -> int:
        """Rows of the tile: members times samples."""
        return len(self.members) * (self.samples.stop - self.samples.start)

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each member."""
        return (self.samples.stop - self.samples.start,) * len(self.members)

    def place(self, states: torch.Tensor) -> torch.Tensor:
        """The tile's part of the states of all rows, [members, samples, length, ...] of [G, B, T, ...], a view."""
        return states[self.rows][:, :, : self.length]

    def numbers(self) -> tuple[int, ...]:
        return tuple(number for rows in self.rows for number in (rows.start, rows.stop))

    def apart(self) -> Iterator["Tile"]:
        """The tile cut into tiles of one member each."""
        return (replace(self, members=range(member, member + 1)) for member in self.members)

    def cut(self, value: Any, name: str = "") -> Any:
        """The part of a module's argument that belongs to the tile: [rows, ...], member by member.

        Tensors are [G·B or 1, T, ...] states or positions, [T] or [1, 1, T, ...] positions, [G·B or 1, heads or 1, T or 1, T or
        1] masks, or [G·B·heads, T or 1, T] biases of positions; others stay as they are. name: of a keyword argument.
        """
        if isinstance(value, torch.Tensor):
            return self._cut(value, name)
        if isinstance(value, tuple | list):
            return type(value)(self.cut(item, name) for item in value)
        if isinstance(value, dict):
            return {key: self.cut(item, name or str(key)) for key, item in value.items()}
        if isinstance(value, UserDict):
            return self.own(value)
        return value

    def _cut(self, value: torch.Tensor, name: str) -> torch.Tensor:
        longest, rows = self.longest, self.batch[0] * self.batch[1]
        if value.dim() < 2:
            if value.shape == (rows,) and "position" not in name:
                return value.view(self.batch)[self.rows].flatten()
            return value[: self.length] if value.shape == (longest,) else value
        many = value.dim() == 3 and self.heads > 1 and value.shape[0] == rows * self.heads
        biases = many and value.shape[1] in (1, longest) and value.shape[2] == longest
        if biases or (value.shape[0] == rows and not (value.dim() == 3 and value.shape[1] == 1)):  # not biases [heads, 1, T]
            value = value.unflatten(0, (*self.batch, -1))[self.rows].flatten(0, 2)
        if biases or self._is_mask(value):
            if value.shape[-1] == longest and "position_emb" not in name:  # else they may be as wide as there are tokens
                value = value[..., : self.length]
            return value[..., : self.length, :] if value.shape[-2] == longest else value
        # Contiguous, as a model has them: some look at them as another shape.
        return value[:, : self.length].contiguous() if value.shape[1] == longest else value

    def _is_mask(self, value: torch.Tensor) -> bool:
        """Whether positions are its last dimensions; states of four dimensions have them in the second."""
        if value.dim() != 4 or self.longest not in value.shape[2:]:
            return False
        if value.shape[1] == self.longest:  # as many heads as tokens, or states
            return value.shape[1] == self.heads and value.shape[2:] == (self.longest, self.longest)
        return True


@dataclass(frozen=True)
class SampleRows:
    """The rows of samples that are scored: row member * B + sample."""

    members: int
    """G."""
    lengths: np.ndarray
    """Lengths of the samples, int32 [B], longest first."""
    micro_batch: int
    tile_members: int
    """Members that share a tile, if their perturbations are factored: 1, or those of one or more perturbations."""

    heads: int
    """Of the model's attention."""

    @property
    def samples(self) -> int:
        return self.lengths.size

    @property
    def count(self) -> int:
        return self.members * self.samples

    def tiles(self, group: PerturbationGroup, apart: bool) -> Iterator[Tile]:
        """The group's tiles; apart: of one member each."""
        each = 1 if apart or self.tile_members == 1 else group.members
        for low in range(0, self.samples, self.micro_batch):
            high = min(low + self.micro_batch, self.samples)
            for member in range(0, group.members, each):
                members, batch = range(member, member + each), (self.members, self.samples)
                length, longest = int(self.lengths[low]), int(self.lengths[0])
                yield Tile(group, members, slice(low, high), length, batch, longest, self.heads)

    def output(self) -> "Output":
        return Output((self.members, self.samples, int(self.lengths[0])))


class Placed(Protocol):
    """A tile whose part of the states of all rows can be found."""

    @property
    def count(self) -> int:
        """Rows."""
        ...

    def place(self, states: torch.Tensor) -> torch.Tensor:
        """The tile's part of the states of all rows, a view."""
        ...


class Output:
    """The output of a module for all rows, put together from its tiles."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """shape: (G, B, T) or, of sequences, (R, T)."""
        self._shape = shape
        self._making = threading.Lock()
        self._states: torch.Tensor | None = None
        self._others: list[None] | tuple[None, ...] | None = None
        """What follows the states in a block's result that is a list or a tuple."""

    def put(self, tile: Placed, result: Any) -> None:
        """result: the module's states, [rows, length, ...]; [1, length, ...] or [length, ...] if they are the same for all rows;
        or a tuple or list that begins with them, of which nothing else is kept (attention weights, routing).
        """
        if isinstance(result, tuple | list):
            self._others, result = type(result)([None] * (len(result) - 1)), result[0]
        if result.shape[:1] != (tile.count,):
            result = result.expand(tile.count, *result.shape[-2:])
        if result.shape[:2].numel() == math.prod(self._shape) and result.is_contiguous():  # the only tile
            self._states = result.view(*self._shape, *result.shape[2:])
            return
        with self._making:
            if self._states is None:
                self._states = result.new_zeros(*self._shape, *result.shape[2:])
        part = tile.place(self._states)
        part[:] = result.reshape(part.shape)

    def result(self) -> Any:
        assert self._states is not None
        states = self._states.flatten(0, len(self._shape) - 2)
        return states if self._others is None else type(self._others)([states]) + self._others  # type: ignore
