"""Philox4x32-10 in numpy: the authors' known answers, and how elements take their 16 bits from it."""

import numpy as np
import pytest

from es_lite.algorithm.noise import philox
from es_lite.algorithm.noise.place import Place

PLACE = Place(seed=0x0123456789ABCDEF, step=3, pair=5, tensor=7)


def parsed(*words: str) -> list[int]:
    return [int(word, 16) for word in words]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, tests/kat_vectors, philox4x32 10
        (parsed("0", "0", "0", "0"), parsed("0", "0"), parsed("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
        (parsed(*["ffffffff"] * 4), parsed(*["ffffffff"] * 2), parsed("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd")),
        (
            parsed("243f6a88", "85a308d3", "13198a2e", "03707344"),
            parsed("a4093822", "299f31d0"),
            parsed("d16cfe09", "94fdcceb", "5001e420", "24126ea1"),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, expected):
    assert philox.words(tuple(counter), tuple(key)).tolist() == [expected]


def test_many_counters_at_once_give_the_words_of_each():
    many = philox.words((np.arange(20), 7, np.arange(20) * 3, 2**32 - 1), (1, 2))
    assert many.dtype == np.uint32
    for i, row in enumerate(many):
        assert np.array_equal(philox.words((i, 7, 3 * i, 2**32 - 1), (1, 2))[0], row)


def test_element_i_takes_lane_i_mod_8_of_counter_i_div_8_low_halves_first():
    four = philox.words((2, PLACE.tensor, PLACE.pair, PLACE.step), PLACE.key)[0].tolist()
    assert philox.lanes(PLACE, 16, 8).tolist() == [half for word in four for half in (word & 0xFFFF, word >> 16)]


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 63, 1001])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_the_lanes_of_a_slice_are_a_slice_of_all_lanes(start, count):
    part = philox.lanes(PLACE, start, count)
    assert part.dtype == np.uint32
    assert np.array_equal(part, philox.lanes(PLACE, 0, 2048)[start : start + count])


def test_the_version_is_the_one_in_existing_journals():
    assert philox.VERSION == "philox4x32-10/table16/1"
