"""The kernels of every kind of noise on bfloat16 weights against its definition and plain numpy arithmetic, bit for bit."""

import math

import numpy as np
import plain
import pytest
from plain import EVERY_KIND, KINDS, bf16, float32, same_bits

from es_lite.algorithm.jit import CHUNK, Threads
from es_lite.algorithm.noise.lowrank import PANEL, TERMS
from es_lite.algorithm.noise.place import Place

PLACE = Place(seed=0xFEDCBA9876543210, step=11, pair=4, tensor=290)
SIGMA = 1.2345678e-3
TYPES = pytest.mark.parametrize("dtype", [np.uint16, np.float32])
SIGNS = pytest.mark.parametrize("both", [False, True], ids=["plus", "plus-minus"])

SLICES = {
    "one element": ((1, 1), 0, 1),
    "one element within a row": ((40, 64), 1337, 1),
    "nothing": ((40, 64), 641, 0),
    "within a row": ((3, 5003), 5010, 4),
    "one row": ((3, 5003), 5003, 5003),
    "end to beginning": ((6, 5003), 5002, 5005),
    "many narrow rows": ((900, 7), 13, 6001),
    "rows of one element": ((5003, 1), 8, 4990),
    "one column more than a chunk": ((5, CHUNK + 1), CHUNK, 3 * CHUNK),
    "all of it": ((7, PANEL + 513), 0, 7 * (PANEL + 513)),
    "far from the beginning": ((1003, 1009), 1_000_003, 5003),
    "vector": ((9000,), 13, 5003),
    "three dimensions": ((7, 5, 301), 2047, 5003),
    "number": ((), 0, 1),
}
"""A tensor's shape, and a slice: its first element and how many there are."""

EVERY_SLICE = pytest.mark.parametrize(("shape", "start", "count"), SLICES.values(), ids=SLICES)


def weights(count: int) -> np.ndarray:
    """bfloat16 bits, some zeros among them, of such a size that σε changes them by a few units in the last place."""
    values = 0.05 * np.random.default_rng(count).standard_normal(count, np.float32)
    values[::17] = 0
    return bf16(values)


def expected(bits: np.ndarray, epsilon: np.ndarray, sigma: float, dtype: type) -> np.ndarray:
    moved = float32(bits) + np.float32(sigma) * epsilon
    return bf16(moved) if dtype is np.uint16 else moved


@EVERY_KIND
@EVERY_SLICE
@TYPES
@SIGNS
def test_perturb(noise, shape, start, count, dtype, both):
    base = weights(count)
    plus, minus = np.empty(count, dtype), np.empty(count, dtype)
    noise.perturb(plus, minus if both else None, base, PLACE, SIGMA, shape, start=start)
    epsilon = noise.epsilon(PLACE, shape, start, count)
    assert same_bits(plus, expected(base, epsilon, SIGMA, dtype))
    if both:
        assert same_bits(minus, expected(base, epsilon, -SIGMA, dtype))


@EVERY_KIND
def test_perturbed_weights_are_all_different_from_the_weights(noise):
    """Of these sizes, so the tests of this module notice noise that is missing."""
    base, out = weights(5003), np.empty(5003, np.float32)
    noise.perturb(out, None, base, PLACE, SIGMA, (5, 1009))
    assert (out != float32(base)).mean() > 0.99


@pytest.mark.parametrize("name", [name for name in KINDS if name != "rademacher"])
def test_a_fused_multiply_add_would_give_other_bits(name):
    """So the test above, on these numbers, shows that σε is rounded before it is added. (Rademacher noise makes no product.)"""
    base, epsilon = weights(5003), KINDS[name].epsilon(PLACE, (5, 1009), 0, 5003)
    fused = (float32(base).astype(np.float64) + np.float64(np.float32(SIGMA)) * epsilon).astype(np.float32)
    assert not same_bits(fused, expected(base, epsilon, SIGMA, np.float32))


@EVERY_KIND
@TYPES
def test_perturb_writes_nothing_but_its_outputs(noise, dtype):
    base = weights(5003)
    kept, room = base.copy(), np.full(5043, 7, dtype)
    noise.perturb(room[10:5013], room[5023:5023], base, PLACE, SIGMA, (6, 1009), start=13)
    assert same_bits(base, kept)
    assert (room[:10] == 7).all() and (room[5013:] == 7).all()


@EVERY_KIND
@TYPES
def test_perturb_accepts_read_only_weights(noise, dtype):
    base, out = weights(100), np.empty(100, dtype)
    base.flags.writeable = False
    noise.perturb(out, None, base, PLACE, SIGMA, (10, 10))
    assert same_bits(out, expected(base, noise.epsilon(PLACE, (10, 10), 0, 100), SIGMA, dtype))


@EVERY_KIND
@pytest.mark.parametrize("sigma", [0.0, -SIGMA, 1e-30, 3.0])
@TYPES
def test_perturb_by_any_sigma(noise, sigma, dtype):
    base, plus, minus = weights(3000), np.empty(3000, dtype), np.empty(3000, dtype)
    noise.perturb(plus, minus, base, PLACE, sigma, (2, 1500))
    epsilon = noise.epsilon(PLACE, (2, 1500), 0, 3000)
    for out, signed in ((plus, sigma), (minus, -sigma)):
        assert np.array_equal(out, expected(base, epsilon, signed, dtype))


@EVERY_KIND
@pytest.mark.parametrize("width", [1, 7, 64, 2049])
@TYPES
@SIGNS
def test_perturb_rows_equals_perturb_of_those_rows(noise, width, dtype, both):
    matrix = weights(60 * width).reshape(60, width)
    rows = np.array([0, 59, 3, 4, 3], np.int64)
    plus, minus = np.empty((5, width), dtype), np.empty((5, width), dtype)
    noise.perturb_rows(plus, minus if both else None, matrix[rows], rows, PLACE, SIGMA, matrix.shape)
    epsilon = noise.epsilon(PLACE, matrix.shape, 0, matrix.size).reshape(matrix.shape)[rows]
    assert same_bits(plus, expected(matrix[rows].ravel(), epsilon.ravel(), SIGMA, dtype).reshape(5, width))
    if both:
        assert same_bits(minus, expected(matrix[rows].ravel(), epsilon.ravel(), -SIGMA, dtype).reshape(5, width))


@EVERY_KIND
@pytest.mark.parametrize("count", [2, 3, 5])
@TYPES
def test_the_bits_do_not_depend_on_the_threads(noise, count, dtype):
    """Each thread has a slice, which may begin and end anywhere in a row."""
    shape, size, threads = (51, 1009), 50_021, Threads(count)
    base, plus, minus, total = weights(size), np.empty(size, dtype), np.empty(size, dtype), np.empty(size, np.float32)
    pairs, coefficients, cuts = np.array([5, 0], np.uint32), np.array([0.3, -1e-3], np.float32), []

    def work(low, high):
        cuts.append((low, high))
        noise.perturb(plus[low:high], minus[low:high], base[low:high], PLACE, SIGMA, shape, start=3 + low)
        noise.weighted_sum(total[low:high], PLACE, pairs, coefficients, shape, start=3 + low)

    threads.each(size, work, least=1001)
    assert len(cuts) == count
    epsilon = noise.epsilon(PLACE, shape, 3, size)
    assert same_bits(plus, expected(base, epsilon, SIGMA, dtype))
    assert same_bits(minus, expected(base, epsilon, -SIGMA, dtype))
    assert same_bits(total, plain.weighted_sum(noise, PLACE, pairs, coefficients, shape, 3, size))


# The sum of a step


PAIRS = np.array([5, 0, 2**32 - 1, 5, *range(10, 10 + 2 * TERMS + 3)], np.uint32)
COEFFICIENTS = np.array([0.3, 0.0, -1e-3, 7.0, *np.geomspace(1e-9, 0.5, 2 * TERMS + 3)], np.float32)


@EVERY_KIND
@EVERY_SLICE
@pytest.mark.parametrize("pairs", [1, 4, PAIRS.size])
def test_weighted_sum(noise, shape, start, count, pairs):
    """In the order given; a coefficient may be 0 and a pair may come twice."""
    out = np.full(count, np.nan, np.float32)
    some = PAIRS[:pairs], COEFFICIENTS[:pairs]
    noise.weighted_sum(out, PLACE, *some, shape, start=start)
    assert same_bits(out, plain.weighted_sum(noise, PLACE, *some, shape, start, count))


@EVERY_KIND
def test_a_weighted_sum_is_about_that_of_the_definition(noise):
    """In float64, from `epsilon` alone: a low-rank sum multiplies coefficients and factors in another order."""
    shape, out = (31, 1009), np.empty(31 * 1009, np.float32)
    noise.weighted_sum(out, PLACE, PAIRS, COEFFICIENTS, shape)
    exact = sum(
        float(coefficient) * noise.epsilon(PLACE._replace(pair=int(pair)), shape, 0, out.size).astype(np.float64)
        for pair, coefficient in zip(PAIRS, COEFFICIENTS, strict=True)
    )
    assert np.linalg.norm(out - exact) < 1e-6 * math.sqrt(np.square(exact).sum())


@EVERY_KIND
def test_the_sum_of_no_pairs_is_zeros(noise):
    out = np.full(3000, np.nan, np.float32)
    noise.weighted_sum(out, PLACE, np.empty(0, np.uint32), np.empty(0, np.float32), (3, 1000))
    assert same_bits(out, np.zeros(3000, np.float32))


@EVERY_KIND
def test_a_sum_writes_nothing_outside_its_slice_and_leaves_pairs_and_coefficients(noise):
    room, pairs, coefficients = np.full(5043, 7, np.float32), PAIRS.copy(), COEFFICIENTS.copy()
    pairs.flags.writeable = coefficients.flags.writeable = False
    noise.weighted_sum(room[10:5013], PLACE, pairs, coefficients, (6, 1009), start=13)
    assert (room[:10] == 7).all() and (room[5013:] == 7).all() and (room[10:5013] != 7).all()
