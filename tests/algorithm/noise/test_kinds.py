"""Kinds of noise by name, and what is true of all of them."""

import math

import numpy as np
import pytest
import torch
from plain import EVERY_KIND, KINDS

from es_lite.algorithm.noise import gaussian, rademacher
from es_lite.algorithm.noise.kinds import FULL, kind_of
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.algorithm.noise.place import Place

PLACE = Place(seed=0xFEDCBA9876543210, step=11, pair=4, tensor=290)


def test_kinds_by_name_and_rank():
    assert kind_of("gaussian") is gaussian and kind_of("rademacher", 0) is rademacher
    assert kind_of("lowrank", 1) == LowRank(1) and kind_of("lowrank", 16).RANK == 16
    assert {name: kind.NAME for name, kind in FULL.items()} == {"gaussian": "gaussian", "rademacher": "rademacher"}


def test_the_tests_of_every_kind_know_every_kind():
    assert {noise.NAME for noise in KINDS.values()} == {*FULL, LowRank.NAME}


@EVERY_KIND
def test_name_and_rank_give_the_kind_back(noise):
    assert kind_of(noise.NAME, noise.RANK) == noise


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'cauchy'.*does not know \(it knows gaussian, rademacher, lowrank\)"):
        kind_of("cauchy")
    with pytest.raises(ValueError, match=r"'cauchy'.*does not know"):
        kind_of("cauchy", 3)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("gaussian", 1),
        ("rademacher", 4),
        ("gaussian", None),
        ("rademacher", False),
        ("lowrank", 0),
        ("lowrank", -1),
        ("lowrank", 1.0),
        ("lowrank", 1.5),
        ("lowrank", "1"),
        ("lowrank", True),
        ("lowrank", None),
        ("lowrank", [1]),
    ],
)
def test_a_rank_that_the_kind_cannot_have_is_refused(name, rank):
    with pytest.raises(ValueError) as error:
        kind_of(name, rank)
    assert str(error.value) == (
        f"noise of the kind {name!r} with rank {rank!r}: only 'lowrank' has a rank, a whole number of at least 1"
    )


@EVERY_KIND
@pytest.mark.parametrize("shape", [(10, 8), (8, 10), (4, 5, 4), (80,)], ids=str)
def test_all_operations_of_a_kind_have_the_same_noise(noise, shape):
    """`weighted_sum` of one pair and `epsilon_on_device` are ε; perturbing zeros by σ = 1 gives ε and -ε; so do rows of a matrix.

    A sum multiplies low-rank factors in the same order if the coefficient is 1.
    """
    epsilon = np.empty(64, np.float32)
    noise.weighted_sum(epsilon, PLACE._replace(pair=77), np.array([4], np.uint32), np.ones(1, np.float32), shape, start=16)
    assert np.array_equal(noise.epsilon(PLACE, shape, 16, 64), epsilon)
    assert np.array_equal(noise.epsilon_on_device(torch.arange(16, 80), PLACE, shape).numpy(), epsilon)

    zeros, none = np.zeros(64, np.uint16), np.empty(0, np.float32)
    plus, minus = np.empty(64, np.float32), np.empty(64, np.float32)
    noise.perturb(plus, minus, zeros, PLACE, 1.0, shape, start=16, scales=none)
    assert np.array_equal(plus, epsilon) and np.array_equal(minus, -epsilon)

    if shape == (10, 8):
        rows = np.arange(2, 10)  # elements 16 … 79
        plus[:] = minus[:] = np.nan
        noise.perturb_rows(plus.reshape(8, 8), minus.reshape(8, 8), zeros.reshape(8, 8), rows, PLACE, 1.0, shape, scales=none)
        assert np.array_equal(plus, epsilon) and np.array_equal(minus, -epsilon)


@EVERY_KIND
def test_places_that_differ_in_anything_have_uncorrelated_noise(noise):
    places = [PLACE]
    places += [PLACE._replace(**{name: value}) for name, old in PLACE._asdict().items() for value in (old + 1, old ^ 2**31)]
    places.append(PLACE._replace(seed=PLACE.seed ^ 2**63))
    places.append(PLACE._replace(pair=PLACE.tensor, tensor=PLACE.pair))
    places.append(PLACE._replace(step=PLACE.pair, pair=PLACE.step))
    drawn = [noise.epsilon(place, (150, 140), 0, 21000) for place in places]
    correlations = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 6 / math.sqrt(21000)


@EVERY_KIND
@pytest.mark.parametrize("shape", [(1000, 40), (4000,), (4, 10, 100), (), (1, 1)], ids=str)
def test_a_block_is_at_least_an_element_and_whole_rows_or_whole_chunks(noise, shape):
    block = noise.block(shape)
    assert block >= 1 and (block % 2048 == 0 or block % shape[-1] == 0)


@pytest.mark.parametrize("noise", FULL.values(), ids=FULL)
@pytest.mark.parametrize(("shape", "count"), [((), 1), ((7,), 7), ((1000, 40), 40_000), ((4, 10, 100), 4000)], ids=str)
def test_kinds_that_draw_every_element_draw_as_many_as_there_are(noise, shape, count):
    assert noise.drawn(shape) == noise.drawn(shape, update=True) == count
