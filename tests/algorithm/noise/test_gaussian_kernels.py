"""The kernels of Gaussian noise on bfloat16 weights against its definition and plain numpy float32 arithmetic, bit for bit."""

import numpy as np
import pytest
from plain import bf16, float32, same_bits

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.place import Place

PLACE = Place(seed=0xFEDCBA9876543210, step=11, pair=4, tensor=290)
SIGMA = 1.2345678e-3
STARTS = pytest.mark.parametrize("start", [0, 1, 8, 13, 2047, 1_000_003])
LENGTHS = pytest.mark.parametrize("length", [1, 7, 2047, 2048, 2049, 5003])
TYPES = pytest.mark.parametrize("dtype", [np.uint16, np.float32])
SIGNS = pytest.mark.parametrize("both", [False, True], ids=["plus", "plus-minus"])


def weights(count: int) -> np.ndarray:
    """bfloat16 bits, some zeros among them, of such a size that σε changes them by a few units in the last place."""
    values = 0.05 * np.random.default_rng(count).standard_normal(count, np.float32)
    values[::17] = 0
    return bf16(values)


def expected(bits: np.ndarray, epsilon: np.ndarray, sigma: float, dtype: type) -> np.ndarray:
    moved = float32(bits) + np.float32(sigma) * epsilon
    return bf16(moved) if dtype is np.uint16 else moved


@STARTS
@LENGTHS
@TYPES
@SIGNS
def test_perturb(start, length, dtype, both):
    base = weights(length)
    plus, minus = np.empty(length, dtype), np.empty(length, dtype)
    gaussian.perturb(plus, minus if both else None, base, PLACE, SIGMA, start=start)
    epsilon = gaussian.epsilon(PLACE, start, length)
    assert same_bits(plus, expected(base, epsilon, SIGMA, dtype))
    if both:
        assert same_bits(minus, expected(base, epsilon, -SIGMA, dtype))


def test_a_fused_multiply_add_would_give_other_bits():
    """So the test above, on these numbers, shows that σε is rounded before it is added."""
    base, epsilon = weights(5003), gaussian.epsilon(PLACE, 0, 5003)
    fused = (float32(base).astype(np.float64) + np.float64(np.float32(SIGMA)) * epsilon).astype(np.float32)
    assert not same_bits(fused, expected(base, epsilon, SIGMA, np.float32))


@TYPES
def test_perturb_writes_nothing_but_its_outputs(dtype):
    base = weights(5003)
    kept, room = base.copy(), np.full(5023, 7, dtype)
    gaussian.perturb(room[10:-10], None, base, PLACE, SIGMA)
    assert same_bits(base, kept)
    assert (room[:10] == 7).all() and (room[-10:] == 7).all()


@TYPES
def test_perturb_accepts_read_only_weights(dtype):
    base, out = weights(100), np.empty(100, dtype)
    base.flags.writeable = False
    gaussian.perturb(out, None, base, PLACE, SIGMA)
    assert same_bits(out, expected(base, gaussian.epsilon(PLACE, 0, 100), SIGMA, dtype))


@pytest.mark.parametrize("sigma", [0.0, -SIGMA, 1e-30, 3.0])
@TYPES
def test_perturb_by_any_sigma(sigma, dtype):
    base, plus, minus = weights(3000), np.empty(3000, dtype), np.empty(3000, dtype)
    gaussian.perturb(plus, minus, base, PLACE, sigma)
    epsilon = gaussian.epsilon(PLACE, 0, 3000)
    for out, signed in ((plus, sigma), (minus, -sigma)):
        assert np.array_equal(out.view(dtype), expected(base, epsilon, signed, dtype))


@pytest.mark.parametrize("width", [1, 7, 64, 2049])
@TYPES
@SIGNS
def test_perturb_rows_equals_perturb_of_those_rows(width, dtype, both):
    matrix = weights(60 * width).reshape(60, width)
    rows = np.array([0, 59, 3, 4, 3], np.int64)
    plus, minus = np.empty((5, width), dtype), np.empty((5, width), dtype)
    gaussian.perturb_rows(plus, minus if both else None, matrix[rows], rows, PLACE, SIGMA)
    epsilon = gaussian.epsilon(PLACE, 0, 60 * width).reshape(60, width)[rows]
    assert same_bits(plus, expected(matrix[rows].ravel(), epsilon.ravel(), SIGMA, dtype).reshape(5, width))
    if both:
        assert same_bits(minus, expected(matrix[rows].ravel(), epsilon.ravel(), -SIGMA, dtype).reshape(5, width))


@STARTS
@LENGTHS
def test_fill(start, length):
    out = np.empty(length, np.float32)
    gaussian.fill(out, PLACE, 0.02, start=start)
    assert same_bits(out, np.float32(0.02) * gaussian.epsilon(PLACE, start, length))


def test_fill_by_one_is_the_noise_itself_at_the_extremes_of_every_coordinate():
    out = np.empty(3001, np.float32)
    for seed in (0, 2**64 - 1):
        for other in (0, 2**31, 2**32 - 1):
            place = Place(seed, other, other, other)
            gaussian.fill(out, place, 1.0, start=2**33 + 5)
            assert same_bits(out, gaussian.epsilon(place, 2**33 + 5, 3001))


@STARTS
@LENGTHS
def test_total(start, length):
    """Σ c_p ε_p in the order given; a coefficient may be 0 and a pair may come twice."""
    pairs, coefficients = np.array([5, 0, 2**32 - 1, 5], np.uint32), np.array([0.3, 0.0, -1e-3, 7.0], np.float32)
    out = np.full(length, np.nan, np.float32)
    gaussian.weighted_sum(out, PLACE, pairs, coefficients, start=start)
    expected_sum = np.zeros(length, np.float32)
    for pair, coefficient in zip(pairs, coefficients, strict=True):
        expected_sum = expected_sum + coefficient * gaussian.epsilon(PLACE._replace(pair=int(pair)), start, length)
    assert same_bits(out, expected_sum)


def test_the_total_of_no_pairs_is_zeros():
    out = np.full(3000, np.nan, np.float32)
    gaussian.weighted_sum(out, PLACE, np.empty(0, np.uint32), np.empty(0, np.float32))
    assert same_bits(out, np.zeros(3000, np.float32))


@pytest.mark.parametrize("count", [2, 3, 5])
@TYPES
def test_the_bits_do_not_depend_on_the_threads(count, dtype):
    size, threads = 50_021, Threads(count)
    base, plus, minus = weights(size), np.empty(size, dtype), np.empty(size, dtype)
    cuts = []

    def work(low, high):
        cuts.append((low, high))
        gaussian.perturb(plus[low:high], minus[low:high], base[low:high], PLACE, SIGMA, start=3 + low)

    threads.each(size, work, least=1001)
    assert len(cuts) == count
    epsilon = gaussian.epsilon(PLACE, 3, size)
    assert same_bits(plus, expected(base, epsilon, SIGMA, dtype))
    assert same_bits(minus, expected(base, epsilon, -SIGMA, dtype))
