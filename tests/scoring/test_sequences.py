"""Tiles of sequences: which rows of an argument they get, and the keys and values that each sequence keeps."""

import numpy as np
import pytest
import torch
from architectures import BOTH, of_kind
from transformers import AutoConfig, Cache

from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.errors import UserError
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.sequences import AllRows, KeyValueCache, SequenceRows, SequenceTile, check_cache
from es_lite.scoring.tiles import PerturbationGroup

LOW = of_kind(BOTH, LowRank(1))
GROUP = PerturbationGroup(2, [LOW, Perturbation(1, 0, 1, 0.1, (1, -1), "lowrank", 1)])
HEADS, WIDTH, CAPACITY, LAYERS = 2, 3, 8, 2
TOTAL = 9


def tile_of(counts: tuple[int, ...], length: int = 3, first: int = 2, slots: int = 0, cached: int = 0) -> SequenceTile:
    """Of the first members of a group, whose rows begin with `first` of TOTAL and with `cached` of the cache."""
    rows = sum(counts)
    cache = KeyValueCache(cached + rows, CAPACITY, LAYERS)
    cache.slots = slots
    where = slice(first, first + rows), slice(cached, cached + rows)
    return SequenceTile(GROUP, range(len(counts)), counts, where[0], length, TOTAL, cache, where[1])


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(float(np.prod(shape))).view(*shape)


# Keys and values


def test_all_slots_are_returned_after_each_token():
    cache, keys, values = KeyValueCache(4, CAPACITY, LAYERS), numbered(4, HEADS, 7, WIDTH), -numbered(4, HEADS, 7, WIDTH)
    for low, high in ((0, 5), (5, 6), (6, 7)):
        for layer in range(LAYERS):
            new = (keys + layer)[:, :, low:high], (values + layer)[:, :, low:high]
            found = cache.put(layer, slice(0, 4), *new)
            assert torch.equal(found[0], (keys + layer)[:, :, :high]) and torch.equal(found[1], (values + layer)[:, :, :high])
        cache.slots = high


def test_parts_of_a_tile_have_their_own_rows():
    """In any order, in each layer; each gets its own back."""
    cache, keys, values = KeyValueCache(5, CAPACITY, LAYERS), numbered(5, HEADS, 4, WIDTH), -numbered(5, HEADS, 4, WIDTH)
    for low, high in ((0, 3), (3, 4)):
        for rows in (slice(3, 5), slice(0, 1), slice(1, 3)):
            found = cache.put(1, rows, keys[rows, :, low:high], values[rows, :, low:high])
            assert torch.equal(found[0], keys[rows, :, :high]) and torch.equal(found[1], values[rows, :, :high])
        cache.slots = high


@pytest.mark.parametrize("stay", [[0, 2, 5], [3, 4, 5], [5], [0, 1, 2, 3, 4], [1, 2, 4]], ids=str)
def test_rows_that_stay_keep_their_keys_and_values(stay):
    """In the memory that they have; the next token goes to the rows that are left."""
    cache, keys, values = KeyValueCache(6, CAPACITY, LAYERS), numbered(6, HEADS, 5, WIDTH), -numbered(6, HEADS, 5, WIDTH)
    for layer in range(LAYERS):
        cache.put(layer, slice(0, 6), (keys + layer)[:, :, :3], (values + layer)[:, :, :3])
    cache.slots = 3
    places = {layer: cache.put(layer, slice(0, 6), keys[:, :, 3:4], values[:, :, 3:4])[0].data_ptr() for layer in range(LAYERS)}
    cache.keep(np.array(stay))
    assert cache.rows == len(stay)
    rows = slice(0, len(stay))
    for layer in range(LAYERS):
        found = cache.put(layer, rows, (keys + layer)[stay, :, 3:4], (values + layer)[stay, :, 3:4])
        assert torch.equal(found[0], (keys + layer)[stay, :, :4]) and torch.equal(found[1], (values + layer)[stay, :, :4])
        assert found[0].data_ptr() == places[layer]
    cache.slots = 4
    cache.keep(np.arange(1))  # and once more
    found = cache.put(0, slice(0, 1), keys[stay[:1], :, 4:], values[stay[:1], :, 4:])
    assert torch.equal(found[0], keys[stay[:1]]) and torch.equal(found[1], values[stay[:1]])


def test_a_cache_from_which_all_rows_have_gone_is_empty():
    cache = KeyValueCache(2, CAPACITY, LAYERS)
    cache.put(0, slice(0, 2), numbered(2, HEADS, 1, WIDTH), numbered(2, HEADS, 1, WIDTH))
    cache.slots = 1
    cache.keep(np.zeros(0, np.int64))
    assert cache.rows == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_models_with_attention_alone_have_a_layer_of_keys_and_values_for_each_block(name):
    assert check_cache(AutoConfig.for_model(name, num_hidden_layers=3)) == 3


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_models_that_keep_another_state_are_refused(name):
    with pytest.raises(UserError, match=f"a model of type '{name}' keeps a state other than keys and values"):
        check_cache(AutoConfig.for_model(name))


# Arguments


@pytest.mark.parametrize("slots", [0, 4])
def test_an_argument_is_cut_to_the_rows_and_the_newest_tokens_of_a_tile(slots):
    """Longer tiles of the same forward make it wider on the left: with more tokens, or with more slots in use."""
    length, wide = (3, 5) if not slots else (1, 1)
    tile, more = tile_of((2, 3), length, slots=slots), slots + length + 2
    rows = slice(2, 7)
    states = numbered(TOTAL, wide, 4)
    assert torch.equal(tile.cut(states), states[rows, wide - length :])
    positions = numbered(TOTAL, wide)
    assert torch.equal(tile.cut(positions), positions[rows, wide - length :])
    assert torch.equal(tile.cut(positions[:1]), positions[:1, wide - length :])
    assert torch.equal(tile.cut(states[:1]), states[:1, wide - length :])
    seen = numbered(TOTAL, more)
    assert torch.equal(tile.cut(seen), seen[rows, more - (slots + length) :])
    mask = numbered(TOTAL, 1, wide, more)
    expected = mask[rows, :, wide - length :, more - (slots + length) :]
    assert torch.equal(tile.cut(mask), expected)
    assert torch.equal(tile.cut(mask.expand(-1, 2, -1, -1)), expected.expand(-1, 2, -1, -1))
    assert torch.equal(tile.cut(mask[:1]), mask[:1, :, wide - length :, more - (slots + length) :])
    nested = tile.cut({"rotary": (states, positions), "none": None, "flag": True, "number": torch.tensor(2.0)})
    assert torch.equal(nested["rotary"][0], tile.cut(states)) and torch.equal(nested["rotary"][1], tile.cut(positions))
    assert (nested["none"], nested["flag"], nested["number"]) == (None, True, torch.tensor(2.0))


@pytest.mark.parametrize("shape", [(TOTAL - 1, 5, 4), (2, 5), (5, 5, 4), (4, 1, 5), (TOTAL, 1, 5)], ids=str)
def test_a_tensor_that_belongs_to_no_rows_is_refused(shape):
    """The last two are biases of heads and positions, even if there are as many heads as rows."""
    with pytest.raises(UserError, match=r"a tensor of shape \[\d.*es_lite does not know what belongs to which sequence"):
        tile_of((2, 3)).cut(numbered(*shape))


def test_a_tile_puts_its_keys_in_its_part_of_the_cache():
    """Through the cache that Hugging Face's modules are given, which counts the tile's own slots."""
    tile = tile_of((1, 2), length=2, cached=1)
    view = tile.cut(AllRows(6, LAYERS))
    assert isinstance(view, Cache) and len(view.layers) == LAYERS
    keys, values = numbered(3, HEADS, 3, WIDTH), -numbered(3, HEADS, 3, WIDTH)
    assert view.get_seq_length() == 0 and view.get_mask_sizes(2, 0) == (2, 0)
    view.update(keys[:, :, :2], values[:, :, :2], 1)
    tile.cache.slots = 2
    assert view.get_seq_length() == 2 and view.get_mask_sizes(1, 0) == (3, 0)
    found = view.update(keys[:, :, 2:], values[:, :, 2:], 1)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    tile.cache.slots = 3
    whole = tile.cache.put(1, slice(0, 4), numbered(4, HEADS, 1, WIDTH), numbered(4, HEADS, 1, WIDTH))
    assert torch.equal(whole[0][1:, :, :3], keys)


def test_the_models_own_cache_says_how_many_slots_are_in_use_and_holds_nothing():
    cache = AllRows(6, LAYERS)
    assert cache.get_seq_length() == 6 and cache.get_mask_sizes(1, 0) == (7, 0)
    with pytest.raises(AssertionError):
        cache.update(numbered(1, 1, 1, 1), numbered(1, 1, 1, 1), 0)


# Members apart


def test_a_tile_is_cut_into_tiles_of_one_member_each():
    """Those that have rows left; rows of the forward and of the cache begin at different numbers."""
    tile = tile_of((2, 0, 3, 1), length=1, first=2, slots=4, cached=1)
    parts = list(tile.apart())
    assert [part.members for part in parts] == [range(0, 1), range(2, 3), range(3, 4)]
    assert [part.counts for part in parts] == [(2,), (3,), (1,)]
    assert [part.rows for part in parts] == [slice(2, 4), slice(4, 7), slice(7, 8)]
    assert [part.cached for part in parts] == [slice(1, 3), slice(3, 6), slice(6, 7)]
    assert [part.count for part in parts] == [2, 3, 1]
    assert [part.signs for part in parts] == [(1,), (1,), (-1,)]
    assert [part.perturbations for part in parts] == [slice(0, 1), slice(1, 2), slice(1, 2)]
    assert all((part.length, part.total, part.cache.layers) == (1, TOTAL, LAYERS) and part.cache is tile.cache for part in parts)
    assert (tile.signs, tile.perturbations, tile.count) == ((1, -1), slice(0, 2), 6)


def test_what_tiles_make_apart_or_together_is_put_together():
    """In any order; shorter tiles end with the others' newest token, and what is before theirs is 0."""
    first, second = tile_of((2, 1), length=2, first=0), tile_of((1, 0, 4, 1), length=4, first=3)
    rows = SequenceRows([first, second])
    assert rows.count == TOTAL
    assert list(rows.tiles(GROUP, apart=False)) == [first, second]
    assert list(rows.tiles(PerturbationGroup(0, [LOW]), apart=False)) == []
    apart = list(rows.tiles(GROUP, apart=True))
    assert [tile.count for tile in apart] == [2, 1, 1, 4, 1]
    states = numbered(TOTAL, 4, 5) + 1
    expected = states.clone()
    expected[:3, :2] = 0
    for tiles in ([second, first], apart[::-1]):
        output = rows.output()
        for tile in tiles:
            output.put(tile, tile.cut(states))
        assert torch.equal(output.result(), expected)
    output = rows.output()
    for tile in apart:
        output.put(tile, (tile.cut(states).bfloat16(), "attention"))
    result, nothing = output.result()
    assert nothing is None
    assert result.dtype == torch.bfloat16 and torch.equal(result, expected.bfloat16())
