"""Rademacher noise as it is defined: which bit makes an element, pinned elements, and the statistics of what is drawn."""

import math

import numpy as np
import pytest

from es_lite.algorithm.noise import philox, rademacher
from es_lite.algorithm.noise.place import Place

PLACE = Place(seed=0x0123456789ABCDEF, step=3, pair=5, tensor=7)


@pytest.mark.parametrize(
    ("element", "counter", "word", "bit"),
    [
        (0, 0, 0, 0),
        (1, 0, 0, 1),
        (31, 0, 0, 31),
        (32, 0, 1, 0),
        (95, 0, 2, 31),
        (127, 0, 3, 31),
        (128, 1, 0, 0),
        (1000, 7, 3, 8),
        (2**39 - 1, 2**32 - 1, 3, 31),
    ],
)
def test_an_element_is_one_bit_of_one_word(element, counter, word, bit):
    """Checked in 8 places, so that a wrong bit agrees by chance in 1 case of 256."""
    for pair in range(8):
        four = philox.words((counter, PLACE.tensor, pair, PLACE.step), PLACE.key)[0].tolist()
        (found,) = rademacher.epsilon(PLACE._replace(pair=pair), (), element, 1).tolist()
        assert found == (1.0 if four[word] >> bit & 1 else -1.0)


def test_some_elements_are_pinned():
    """Of the words 6627e8d5 e169c58d bc57ac4c 9b00dbd8, which are Random123's known answer for zeros.

    If any of these changes, philox.VERSION must change.
    """
    values = rademacher.epsilon(Place(0, 0, 0, 0), (), 0, 128)
    assert ["".join("-+"[int(value > 0)] for value in part) for part in values.reshape(4, 32)] == [
        "+-+-+-++---+-++++++--+---++--++-",
        "+-++---++-+---+++--+-++-+----+++",
        "--++--+---++-+-++++-+-+---++++-+",
        "---++-++++-++-++--------++-++--+",
    ]


@pytest.mark.parametrize("start", [0, 1, 31, 127, 128, 129, 1001])
@pytest.mark.parametrize("count", [0, 1, 31, 128, 129, 1000])
def test_the_noise_of_a_slice_is_a_slice_of_all_noise_whatever_the_shape(start, count):
    whole = rademacher.epsilon(PLACE, (2048,), 0, 2048)
    part = rademacher.epsilon(PLACE, (32, 64), start, count)
    assert part.dtype == np.float32
    assert np.array_equal(part, whole[start : start + count])


def test_elements_are_1_or_minus_1_about_equally_often_and_independent():
    count = 2**20
    values = rademacher.epsilon(PLACE, (), 0, count).astype(np.float64)
    assert (np.abs(values) == 1).all()
    assert abs(values.mean()) < 4 / math.sqrt(count)
    for lag in (1, 2, 8, 31, 32, 64, 128, 2048):
        assert abs(np.mean(values[:-lag] * values[lag:])) < 4 / math.sqrt(count), lag


def test_every_bit_of_a_counter_is_fair():
    by_bit = rademacher.epsilon(PLACE, (), 0, 128 * 8192).reshape(-1, 128).mean(axis=0)
    assert np.abs(by_bit).max() < 5 / math.sqrt(8192)
