"""Kinds of noise by name."""

import numpy as np
import pytest
import torch

from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.kinds import KNOWN, kind_of
from es_lite.algorithm.noise.place import Place

PLACE = Place(seed=0xFEDCBA9876543210, step=11, pair=4, tensor=290)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'cauchy'.*does not know.*gaussian"):
        kind_of("cauchy")


def test_every_kind_has_the_name_it_is_known_by():
    assert {name: kind.NAME for name, kind in KNOWN.items()} == {"gaussian": "gaussian"}


def test_the_kind_gaussian_is_its_definition():
    assert np.array_equal(
        kind_of("gaussian").epsilon_on_device(torch.arange(16, 80), PLACE).numpy(), gaussian.epsilon(PLACE, 16, 64)
    )


@pytest.mark.parametrize("name", KNOWN)
def test_all_operations_of_a_kind_have_the_same_noise(name):
    """`total` of one pair and `epsilon_on_device` are ε; perturbing zeros by σ = 1 gives ε and -ε; so do rows of a matrix."""
    kind = kind_of(name)
    epsilon = np.empty(64, np.float32)
    kind.weighted_sum(epsilon, PLACE._replace(pair=77), np.array([4], np.uint32), np.ones(1, np.float32), start=16)
    assert np.array_equal(kind.epsilon_on_device(torch.arange(16, 80), PLACE).numpy(), epsilon)

    zeros, none = np.zeros(64, np.uint16), np.empty(0, np.float32)
    plus, minus = np.empty(64, np.float32), np.empty(64, np.float32)
    kind.perturb(plus, minus, zeros, PLACE, 1.0, start=16, scales=none, width=1)
    assert np.array_equal(plus, epsilon) and np.array_equal(minus, -epsilon)

    rows = np.arange(2, 10)  # of 8 elements: 16 … 79
    kind.perturb_rows(plus.reshape(8, 8), minus.reshape(8, 8), zeros.reshape(8, 8), rows, PLACE, 1.0, scales=none)
    assert np.array_equal(plus, epsilon) and np.array_equal(minus, -epsilon)
