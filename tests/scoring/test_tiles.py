"""Which rows are multiplied together: perturbations in groups, groups in tiles, and the rows of arguments and results."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import BOTH, PLUS, of_kind
from plain import KINDS

from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.scoring.perturbation import UNPERTURBED, Perturbation
from es_lite.scoring.proxies import ScoringState
from es_lite.scoring.tiles import Output, PerturbationGroup, SampleRows, Tile

LOW = of_kind(BOTH, LowRank(1))
ALONE = replace(LOW, signs=(-1,))


def state_of(perturbations: Sequence[Perturbation], tile_members: int, micro_batch: int = 2) -> ScoringState:
    """Three samples of 9, 7 and 4 tokens."""
    state = ScoringState(None, None, None, micro_batch, tile_members, perturbations)
    state.rows = SampleRows(state.members, np.array([9, 7, 4], np.int32), micro_batch, tile_members, heads=2)
    return state


def pairs(count: int, perturbation: Perturbation = LOW) -> list[Perturbation]:
    return [replace(perturbation, pair=pair) for pair in range(count)]


def tile_of(members: range, samples: slice = slice(1, 3), first: int = 1) -> Tile:
    """Of a group of two pairs, the first of whose members is number `first` of 6, each with 4 samples."""
    return Tile(PerturbationGroup(first, pairs(2)), members, samples, length=3, batch=(6, 4), longest=5, heads=2)


# Groups


@pytest.mark.parametrize(
    ("tile_members", "perturbations", "expected"),
    [
        (1, pairs(3), [1, 1, 1]),
        (2, pairs(3), [1, 1, 1]),
        (4, pairs(5), [2, 2, 1]),  # the last has fewer
        (10, pairs(5), [5]),
        (4, [*pairs(3), UNPERTURBED], [2, 1, 1]),
        (3, pairs(5, ALONE), [3, 2]),
        (8, [*pairs(2), *pairs(2, replace(LOW, rank=2)), *pairs(2)], [2, 2, 2]),
        (8, [*pairs(1), *pairs(2, ALONE), *pairs(1, of_kind(PLUS, LowRank(1)))], [1, 2, 1]),
        (8, pairs(2, replace(LOW, sigma=0.0)), [1, 1]),  # θ itself has nothing to correct
        (8, [of_kind(BOTH, noise) for noise in KINDS.values()], [1, 1, 1, 1]),
        (8, pairs(3, BOTH), [1, 1, 1]),  # the noise of "gaussian" has no factors
        (8, pairs(3, of_kind(BOTH, KINDS["rademacher"])), [1, 1, 1]),
        (8, [LOW, BOTH, LOW], [1, 1, 1]),  # they keep their order
        (4, [], []),
    ],
)
def test_perturbations_of_the_same_signs_and_rank_share_tiles(tile_members, perturbations, expected):
    groups = list(state_of(perturbations, tile_members).groups())
    assert [len(group.perturbations) for group in groups] == expected
    assert [perturbation for group in groups for perturbation in group.perturbations] == perturbations
    assert [group.first for group in groups] == [sum(g.members for g in groups[:i]) for i in range(len(groups))]
    assert sum(group.members for group in groups) == sum(perturbation.members for perturbation in perturbations)


# Tiles


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("tile_members", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("perturbations", [[*pairs(3), UNPERTURBED, *pairs(3, ALONE)], [BOTH, BOTH]], ids=["lowrank", "gaussian"])
def test_tiles_cover_every_row_once(perturbations, micro_batch, tile_members, apart):
    state = state_of(perturbations, tile_members, micro_batch)
    found = [tile for group in state.groups() for tile in state.rows.tiles(group, apart)]
    rows = np.zeros((state.members, state.rows.samples), int)
    for tile in found:
        rows[tile.rows] += 1
        members, samples = tile.rows
        assert tile.batch == rows.shape
        assert tile.count == rows[members, samples].size <= len(tile.members) * micro_batch
        assert tile.length == state.rows.lengths[tile.samples].max()
    assert (rows == 1).all()


def test_a_tile_has_all_members_of_its_group_or_one():
    state = state_of([*pairs(3), UNPERTURBED], tile_members=4)
    found = [[(tile.members, tile.samples) for tile in state.rows.tiles(group, apart=False)] for group in state.groups()]
    first, last = slice(0, 2), slice(2, 3)
    assert found == [
        [(range(4), first), (range(4), last)],
        [(range(2), first), (range(2), last)],
        [(range(1), first), (range(1), last)],
    ]
    group = next(state.groups())
    alone = [(range(member, member + 1), samples) for samples in (first, last) for member in range(4)]
    assert [(tile.members, tile.samples) for tile in state.rows.tiles(group, apart=True)] == alone
    one = state_of([LOW], tile_members=1)  # both members of a pair are a group, but share no tile
    assert [tile.members for group in one.groups() for tile in one.rows.tiles(group, apart=False)] == 2 * [range(1), range(1, 2)]


def test_a_tile_knows_whose_rows_it_has():
    whole, minus, plus = tile_of(range(4)), tile_of(range(1, 2)), tile_of(range(2, 3))
    assert [tile.perturbations for tile in (whole, minus, plus)] == [slice(0, 2), slice(0, 1), slice(1, 2)]
    assert [tile.signs for tile in (whole, minus, plus)] == [(1, -1), (-1,), (1,)]
    assert [tile.rows[0] for tile in (whole, minus, plus)] == [slice(1, 5), slice(2, 3), slice(3, 4)]
    assert [tile.rows[1] for tile in (whole, minus, plus)] == 3 * [slice(1, 3)]
    assert [tile.count for tile in (whole, minus, plus)] == [8, 2, 2]
    single = Tile(PerturbationGroup(0, pairs(3, ALONE)), range(3), slice(0, 4), length=3, batch=(3, 4), longest=5, heads=2)
    assert (single.perturbations, single.signs) == (slice(0, 3), (-1,))


# Arguments


@pytest.mark.parametrize("members", [range(4), range(2, 3)], ids=["several", "one"])
def test_an_argument_is_cut_to_the_rows_of_a_tile(members):
    tile = tile_of(members)
    rows = [4 * (1 + member) + sample for member in members for sample in (1, 2)]
    states = torch.arange(24 * 5 * 2).view(24, 5, 2)
    assert torch.equal(tile.cut(states), states[rows, :3])
    ids = torch.arange(24)
    assert torch.equal(tile.cut(ids), ids[rows])
    positions = torch.arange(5)[None]
    assert torch.equal(tile.cut(positions), positions[:, :3])  # the same for all samples
    mask = torch.arange(24 * 5 * 5).view(24, 1, 5, 5)
    assert torch.equal(tile.cut(mask), mask[rows, :, :3, :3])
    assert torch.equal(tile.cut(mask[:1]), mask[:1, :, :3, :3])
    nested = tile.cut({"rotary": (positions, states), "cache": None, "scale": torch.tensor(2.0), "flag": True})
    assert torch.equal(nested["rotary"][0], positions[:, :3]) and torch.equal(nested["rotary"][1], states[rows, :3])
    assert (nested["cache"], nested["scale"], nested["flag"]) == (None, torch.tensor(2.0), True)


# Results


@pytest.mark.parametrize("as_tuple", [False, True])
def test_an_output_is_put_together_from_tiles(as_tuple):
    """In any order; what is beyond a tile's longest sample is 0, and a tuple's other values are nobody's."""
    state = state_of([*pairs(3), UNPERTURBED], tile_members=4)
    tiles = [tile for group in state.groups() for tile in state.rows.tiles(group, apart=False)]
    states = torch.randn(7 * 3, 9, 5)
    output = Output((7, 3, 9))
    for tile in tiles[::-1]:
        part = tile.cut(states)
        output.put(tile, (part, "attention") if as_tuple else part)
    expected = states.clone().unflatten(0, (7, 3))
    expected[:, 2, 4:] = 0
    result = output.result()
    if as_tuple:
        assert type(result) is tuple
        result, nothing = result
        assert nothing is None
    assert torch.equal(result, expected.flatten(0, 1))


def test_an_output_has_the_type_of_its_parts():
    output = Output((6, 4, 3))
    output.put(tile_of(range(4)), torch.ones(8, 3, 2, dtype=torch.bfloat16))
    assert output.result().dtype == torch.bfloat16 and output.result().sum() == 8 * 3 * 2
