"""Philox compiled by numba against Philox in numpy, bit for bit."""

import numpy as np
import pytest

from es_lite.algorithm.jit import CHUNK
from es_lite.algorithm.noise import philox
from es_lite.algorithm.noise.kernels import draw_lanes, draw_words, words_buffer, words_of
from es_lite.algorithm.noise.place import Place

PLACES = pytest.mark.parametrize(
    "place",
    [
        Place(0, 0, 0, 0),
        Place(2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
        Place(0xFEDCBA9876543210, 11, 4, 290),
        Place(2**31, 2**31, 2**31, 2**31),
    ],
    ids=["zeros", "ones", "any", "sign-bits"],
)


@PLACES
@pytest.mark.parametrize("first", [0, 5, 2**31 - 2, 2**32 - 7])
def test_words(place, first):
    words = np.empty(4 * 7, np.uint32)
    draw_words(words, first, *words_of(place))
    counters = np.arange(first, first + 7)
    expected = philox.words((counters, place.tensor, place.pair, place.step), place.key)
    assert words.tolist() == expected.ravel().tolist()


@PLACES
@pytest.mark.parametrize("start", [0, 1, 7, 8, 13, 2**33 + 5])
@pytest.mark.parametrize("count", [0, 1, 8, 9, CHUNK - 1, CHUNK])
def test_lanes(place, start, count):
    drawn = draw_lanes(*words_buffer(), start, count, *words_of(place))
    assert drawn.dtype == np.uint16 and drawn.size >= count
    assert drawn[:count].tolist() == philox.lanes(place, start, count).tolist()
