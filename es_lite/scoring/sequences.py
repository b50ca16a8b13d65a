"""Sequences that are generated: their tiles, and the keys and values that each keeps.

A tile's sequences are prompts of a few members. Prompts are padded on the left, so that the newest tokens of all sequences are in
the same slot of the cache, and a slot's distance from it is the tokens' distance. One more slot of padding than needed is always
there: models treat a batch without padding in another way, and then the bits of a sequence would depend on what else there is.

Shapes: R rows (sequences) of a forward, T tokens of each (a prompt's, or 1), S slots of the cache.
"""

import threading
from collections import UserDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from es_lite.errors import UserError
from es_lite.scoring.attention import keys_of
from es_lite.scoring.tiles import Output, PerturbationGroup, TileOfMembers

PADDING = 1
"""Slots before the longest prompt of a tile."""

LEAVE = 8
"""Ended sequences leave a tile when they are one in so many of its rows, since leaving moves the others' keys and values."""

ROUND = 8
"""A tile that some have left has a multiple of so many rows, a few ended ones among them: oneDNN compiles and keeps a product of
its own, of 0.65 MB, for each number of rows."""


def check_cache(config: PretrainedConfig) -> int:
    """The number of layers that keep keys and values. Raises UserError if the model keeps anything else of earlier tokens."""
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise UserError(
            f"a model of type {config.model_type!r} keeps a state other than keys and values while it writes, which es_lite "
            'cannot do for many members at once; take a model with attention in every layer, or fitness.kind = "logprob"'
        )
    return len(layers)


class KeyValueCache:
    """Keys and values of a tile's sequences, [rows, heads, capacity, width] for each layer."""

    def __init__(self, rows: int, capacity: int, layers: int) -> None:
        self.rows = rows
        self.slots = 0
        """Slots in use."""
        self._capacity = capacity
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers
        self._views: dict[tuple[int, int], Cache] = {}
        """What `view` has made: every block asks for it at every token."""
        self._making = threading.Lock()

    @property
    def layers(self) -> int:
        return len(self._layers)

    def view(self, rows: slice) -> Cache:
        """Some rows, as Hugging Face's modules use them; valid until `keep`."""
        key = rows.start, rows.stop
        if key not in self._views:
            self._views[key] = Cache(layers=[_LayerView(self, layer, rows) for layer in range(self.layers)])
        return self._views[key]

    def put(self, layer: int, rows: slice, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the keys and values of the newest tokens, [rows, heads, T, width]; returns those of all slots."""
        with self._making:  # lanes fill parts of a tile at the same time
            if self._layers[layer] is None:
                shape = self.rows, keys.shape[1], self._capacity
                self._layers[layer] = keys_of(*shape, keys.shape[3], keys), values.new_empty(*shape, values.shape[3])
        all_keys, all_values = self._layers[layer]  # type: ignore[misc]
        end = self.slots + keys.shape[2]
        all_keys[rows, :, self.slots : end] = keys
        all_values[rows, :, self.slots : end] = values
        if not self.slots:
            return keys, values
        return all_keys[rows, :, :end], all_values[rows, :, :end]

    def keep(self, rows: np.ndarray) -> None:
        """Forgets all rows but these, ascending."""
        which = torch.from_numpy(rows)
        for pair in self._layers:
            for tensor in pair or ():
                tensor[: rows.size, :, : self.slots] = tensor[which.to(tensor.device), :, : self.slots]
        self.rows = rows.size
        self._views.clear()


class _LayerView(DynamicLayer):
    """A layer's keys and values of some rows, as Hugging Face's modules use them."""

    def __init__(self, cache: KeyValueCache, layer: int, rows: slice) -> None:
        super().__init__()
        self._cache, self._layer, self._rows = cache, layer, rows
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.put(self._layer, self._rows, key_states, value_states)

    def get_seq_length(self) -> int:
        return self._cache.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.slots + query_length, 0


class _Length(DynamicLayer):
    """What a model asks of a cache before its layers run: how many slots are in use."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self._slots = slots
        self.is_initialized = True

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("only a tile's part has keys and values")

    def get_seq_length(self) -> int:
        return self._slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots + query_length, 0


class AllRows(Cache):
    """The cache that a model is given; its blocks get a tile's part of it (`SequenceTile.cut`)."""

    def __init__(self, slots: int, layers: int) -> None:
        """slots: in use by the longest sequence."""
        super().__init__(layers=[_Length(slots) for _ in range(layers)])


@dataclass(frozen=True)
class SequenceTile(TileOfMembers):
    """Rows of some members of a group that are multiplied together in one forward; see `tiles.Tile`."""

    counts: tuple[int, ...]
    """Rows of each member."""
    rows: slice
    """Which of the forward's rows."""
    length: int
    """T of these rows."""
    total: int
    """R."""
    cache: KeyValueCache
    cached: slice
    """Which rows of the cache."""

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start

    def numbers(self) -> tuple[int, ...]:
        return self.rows.start, self.rows.stop

    def place(self, states: torch.Tensor) -> torch.Tensor:
        """The tile's part of the states of all rows, [rows, length, ...] of [R, T, ...], a view."""
        return states[self.rows, -self.length :]

    def apart(self) -> Iterator["SequenceTile"]:
        """The tile cut into tiles of one member each."""
        first = self.rows.start
        offset = self.cached.start - first
        for member, count in zip(self.members, self.counts, strict=True):
            if count:
                yield self.part(range(member, member + 1), (count,), slice(first, first + count), offset)
            first += count

    def part(self, members: range, counts: tuple[int, ...], rows: slice, offset: int) -> "SequenceTile":
        """The tile's rows of some members. offset: between rows of the forward and of the cache."""
        cached = slice(rows.start + offset, rows.stop + offset)
        return SequenceTile(self.group, members, counts, rows, self.length, self.total, self.cache, cached)

    def cut(self, value: Any) -> Any:
        """The part of a module's argument that belongs to the tile.

        Tensors are [R or 1, T, ...] states or positions, or [R, S] or [R or 1, heads or 1, T, S] masks. Raises UserError for
        others; that is in the first forward, where T is at least 2.
        """
        if isinstance(value, AllRows):
            return self.cache.view(self.cached)
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            positions = value.dim() != 3 or value.shape[1] >= self.length  # else a bias of heads and positions
            if value.shape[0] == self.total and positions:
                value = value[self.rows]
            elif value.shape[0] != 1 or not positions:
                raise UserError(
                    f"this model gives its blocks a tensor of shape {list(value.shape)}; es_lite does not know what belongs "
                    'to which sequence, so it cannot generate with it; take another model, or fitness.kind = "logprob"'
                )
            if value.dim() == 4:
                return value[..., -self.length :, -(self.cache.slots + self.length) :]
            if value.dim() == 2 and value.shape[1] > self.length:
                return value[:, -(self.cache.slots + self.length) :] if self.cache.slots else value[:, -self.length :]
            return value[:, -self.length :]
        if isinstance(value, tuple):
            return tuple(map(self.cut, value))
        if isinstance(value, dict):
            return {name: self.cut(item) for name, item in value.items()}
        if isinstance(value, UserDict):
            return self.own(value)
        return value


@dataclass(frozen=True)
class SequenceRows:
    """The rows of one forward: the tiles' one after the other."""

    all_tiles: Sequence[SequenceTile]

    @property
    def count(self) -> int:
        return self.all_tiles[0].total

    def tiles(self, group: PerturbationGroup, apart: bool) -> Iterator[SequenceTile]:
        """The group's tiles; apart: of one member each."""
        for tile in self.all_tiles:
            before = group.first - tile.group.first  # members of the tile's group before these, which may be a part of it
            if not 0 <= before < tile.group.members:
                continue
            if not apart:
                yield tile
                continue
            for alone in tile.apart():
                member = alone.members.start - before
                if 0 <= member < group.members:
                    yield replace(alone, group=group, members=range(member, member + 1))

    def output(self) -> Output:
        return Output((self.count, max(tile.length for tile in self.all_tiles)))
