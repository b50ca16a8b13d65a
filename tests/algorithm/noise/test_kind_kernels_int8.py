"""Perturbing int8 weights, by every kind of noise, equals perturbing their float32 values, bit for bit."""

import numpy as np
import plain
import pytest
from plain import EVERY_KIND, same_bits

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.place import Place

PLACE = Place(seed=0xFEDCBA9876543210, step=11, pair=4, tensor=290)
SIGMA = 1.2345678e-3
WIDTHS = pytest.mark.parametrize("width", [1, 7, 64, 2047, 2048, 2049, 5003])
TYPES = pytest.mark.parametrize("dtype", [np.uint16, np.float32])
SIGNS = pytest.mark.parametrize("both", [False, True], ids=["plus", "plus-minus"])


def weights(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 and scales: rows of many magnitudes, and some rows of zeros."""
    values = 0.05 * np.random.default_rng(width).standard_normal((rows, width), np.float32)
    values *= np.geomspace(0.1, 10, rows, dtype=np.float32)[:, None]
    values[::5] = 0
    return plain.quantised(values.ravel(), width)


def expected(values: np.ndarray, epsilon: np.ndarray, sigma: float, dtype: type) -> np.ndarray:
    moved = values + np.float32(sigma) * epsilon
    assert moved.dtype == np.float32
    return plain.bf16(moved) if dtype is np.uint16 else moved


def perturb(
    noise: NoiseKind,
    stored: np.ndarray,
    scales: np.ndarray,
    width: int,
    dtype: type,
    both: bool,
    start: int = 0,
    sigma: float = SIGMA,
) -> tuple[np.ndarray, ...]:
    """stored: elements start … of a matrix with these scales."""
    plus, minus = np.empty(stored.size, dtype), np.empty(stored.size, dtype)
    other = minus if both else None
    noise.perturb(plus, other, stored, PLACE, sigma, (scales.size, width), start=start, scales=scales)
    return (plus, minus) if both else (plus,)


@EVERY_KIND
@WIDTHS
@TYPES
@SIGNS
def test_any_slice(noise, width, dtype, both):
    """Some begin and end in the middle of a row; some are shorter than a row."""
    rows = 9
    stored, scales = weights(rows, width)
    values = plain.dequantised(stored, scales, width)
    epsilon = noise.epsilon(PLACE, (rows, width), 0, stored.size)
    starts = {0, 1, 13, width - 1, width, 2 * width + 3, 8 * width}
    for start in sorted(start for start in starts if start < stored.size):
        for count in {1, width, width + 1, 3 * width + 5, stored.size}:
            cut = slice(start, min(start + count, stored.size))
            outs = perturb(noise, stored[cut], scales, width, dtype, both, start)
            for out, sign in zip(outs, (1, -1), strict=False):
                assert same_bits(out, expected(values[cut], epsilon[cut], sign * SIGMA, dtype))


@EVERY_KIND
@TYPES
@SIGNS
@pytest.mark.parametrize("width", [1, 7, 64, 2049])
def test_rows(noise, width, dtype, both):
    """In any order, one of them twice, each with its own scale."""
    stored, scales = weights(60, width)
    rows = np.array([0, 59, 3, 4, 3, 57], np.int64)
    some, of_those = stored.reshape(60, width)[rows], scales[rows]
    plus, minus = np.empty((6, width), dtype), np.empty((6, width), dtype)
    noise.perturb_rows(plus, minus if both else None, some, rows, PLACE, SIGMA, (60, width), scales=of_those)
    whole = perturb(noise, stored, scales, width, dtype, both)
    for out, all_rows in zip((plus, minus), whole, strict=False):
        assert same_bits(out, all_rows.reshape(60, width)[rows])


@EVERY_KIND
@TYPES
def test_the_bits_do_not_depend_on_the_threads(noise, dtype):
    width = 333
    stored, scales = weights(150, width)
    alone = perturb(noise, stored, scales, width, dtype, True)
    for count in (2, 3, 5):
        plus, minus = np.empty(stored.size, dtype), np.empty(stored.size, dtype)

        def work(low, high, plus=plus, minus=minus):
            cut = slice(low, high)
            noise.perturb(plus[cut], minus[cut], stored[cut], PLACE, SIGMA, (150, width), start=low, scales=scales)

        Threads(count).each(stored.size, work, least=1001)
        assert same_bits(plus, alone[0]) and same_bits(minus, alone[1])


@EVERY_KIND
@TYPES
@pytest.mark.parametrize("sigma", [0.0, -SIGMA, 1e-30, 3.0])
def test_any_sigma(noise, sigma, dtype):
    """With a sigma of 0 the outputs are the weights' values; the sign of a zero may differ."""
    stored, scales = weights(20, 150)
    epsilon = noise.epsilon(PLACE, (20, 150), 0, 3000)
    values = plain.dequantised(stored, scales, 150)
    for out, signed in zip(perturb(noise, stored, scales, 150, dtype, True, sigma=sigma), (sigma, -sigma), strict=True):
        number = plain.float32(out) if dtype is np.uint16 else out
        reference = expected(values, epsilon, signed, dtype)
        assert np.array_equal(number, plain.float32(reference) if dtype is np.uint16 else reference)


@EVERY_KIND
@TYPES
def test_nothing_but_the_outputs_is_written(noise, dtype):
    stored, scales = weights(20, 150)
    kept, kept_scales, room = stored.copy(), scales.copy(), np.full(3020, 7, dtype)
    stored.flags.writeable = scales.flags.writeable = False
    noise.perturb(room[10:-10], None, stored, PLACE, SIGMA, (20, 150), scales=scales)
    assert same_bits(stored, kept) and same_bits(scales, kept_scales)
    assert (room[:10] == 7).all() and (room[-10:] == 7).all()


@EVERY_KIND
def test_the_base_is_not_rounded_to_bf16_first(noise):
    """An int8 element's value has more bits than bfloat16; only the sum is rounded."""
    stored, scales = weights(50, 100)
    values = plain.dequantised(stored, scales, 100)
    epsilon = noise.epsilon(PLACE, (50, 100), 0, 5000)
    twice = expected(plain.float32(plain.bf16(values)), epsilon, SIGMA, np.uint16)
    (once,) = perturb(noise, stored, scales, 100, np.uint16, False)
    assert same_bits(once, expected(values, epsilon, SIGMA, np.uint16)) and not same_bits(once, twice)


@EVERY_KIND
def test_a_tensor_of_three_dimensions_has_a_scale_for_each_row_of_its_last_one(noise):
    """Such as the experts of one layer in one tensor."""
    shape = (4, 15, 150)
    stored, scales = weights(60, 150)
    values, epsilon = plain.dequantised(stored, scales, 150), noise.epsilon(PLACE, shape, 0, 9000)
    for cut in (slice(0, 9000), slice(2233, 6001)):
        out = np.empty(cut.stop - cut.start, np.float32)
        noise.perturb(out, None, stored[cut], PLACE, SIGMA, shape, start=cut.start, scales=scales)
        assert same_bits(out, expected(values[cut], epsilon[cut], SIGMA, np.float32))
