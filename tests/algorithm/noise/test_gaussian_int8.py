"""Perturbing int8 weights equals perturbing their float32 values, bit for bit."""

import numpy as np
import plain
import pytest
from plain import same_bits

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
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


def perturb(stored: np.ndarray, scales: np.ndarray, width: int, dtype: type, both: bool, start: int = 0, sigma: float = SIGMA):
    plus, minus = np.empty(stored.size, dtype), np.empty(stored.size, dtype)
    other = minus if both else None
    gaussian.perturb(plus, other, stored, PLACE, sigma, start=start, scales=scales, width=width)
    return (plus, minus) if both else (plus,)


@WIDTHS
@TYPES
@SIGNS
def test_any_slice(width, dtype, both):
    """Some begin and end in the middle of a row; some are shorter than a row."""
    rows = 9
    stored, scales = weights(rows, width)
    values = plain.dequantised(stored, scales, width)
    epsilon = gaussian.epsilon(PLACE, 0, stored.size)
    starts = {0, 1, 13, width - 1, width, 2 * width + 3, 8 * width}
    for start in sorted(start for start in starts if start < stored.size):
        for count in {1, width, width + 1, 3 * width + 5, stored.size}:
            cut = slice(start, min(start + count, stored.size))
            outs = perturb(stored[cut], scales, width, dtype, both, start)
            for out, sign in zip(outs, (1, -1), strict=False):
                assert same_bits(out, expected(values[cut], epsilon[cut], sign * SIGMA, dtype))


@TYPES
@SIGNS
@pytest.mark.parametrize("width", [1, 7, 64, 2049])
def test_rows(width, dtype, both):
    """In any order, one of them twice, each with its own scale."""
    stored, scales = weights(60, width)
    rows = np.array([0, 59, 3, 4, 3, 57], np.int64)
    some, of_those = stored.reshape(60, width)[rows], scales[rows]
    plus, minus = np.empty((6, width), dtype), np.empty((6, width), dtype)
    gaussian.perturb_rows(plus, minus if both else None, some, rows, PLACE, SIGMA, scales=of_those)
    whole = perturb(stored, scales, width, dtype, both)
    for out, all_rows in zip((plus, minus), whole, strict=False):
        assert same_bits(out, all_rows.reshape(60, width)[rows])


@TYPES
def test_the_bits_do_not_depend_on_the_threads(dtype):
    width = 333
    stored, scales = weights(150, width)
    alone = perturb(stored, scales, width, dtype, True)
    for count in (2, 3, 5):
        plus, minus = np.empty(stored.size, dtype), np.empty(stored.size, dtype)

        def work(low, high, plus=plus, minus=minus):
            cut = slice(low, high)
            at = {"start": low, "scales": scales, "width": width}
            gaussian.perturb(plus[cut], minus[cut], stored[cut], PLACE, SIGMA, **at)

        Threads(count).each(stored.size, work, least=1001)
        assert same_bits(plus, alone[0]) and same_bits(minus, alone[1])


@TYPES
@pytest.mark.parametrize("sigma", [0.0, -SIGMA, 1e-30, 3.0])
def test_any_sigma(sigma, dtype):
    """With a sigma of 0 the outputs are the weights' values; the sign of a zero may differ."""
    stored, scales = weights(20, 150)
    epsilon = gaussian.epsilon(PLACE, 0, 3000)
    values = plain.dequantised(stored, scales, 150)
    for out, signed in zip(perturb(stored, scales, 150, dtype, True, sigma=sigma), (sigma, -sigma), strict=True):
        number = plain.float32(out) if dtype is np.uint16 else out
        reference = expected(values, epsilon, signed, dtype)
        assert np.array_equal(number, plain.float32(reference) if dtype is np.uint16 else reference)


@TYPES
def test_nothing_but_the_outputs_is_written(dtype):
    stored, scales = weights(20, 150)
    kept, kept_scales, room = stored.copy(), scales.copy(), np.full(3020, 7, dtype)
    stored.flags.writeable = scales.flags.writeable = False
    gaussian.perturb(room[10:-10], None, stored, PLACE, SIGMA, scales=scales, width=150)
    assert same_bits(stored, kept) and same_bits(scales, kept_scales)
    assert (room[:10] == 7).all() and (room[-10:] == 7).all()


def test_the_base_is_not_rounded_to_bf16_first():
    """An int8 element's value has more bits than bfloat16; only the sum is rounded."""
    stored, scales = weights(50, 100)
    values = plain.dequantised(stored, scales, 100)
    epsilon = gaussian.epsilon(PLACE, 0, 5000)
    twice = expected(plain.float32(plain.bf16(values)), epsilon, SIGMA, np.uint16)
    (once,) = perturb(stored, scales, 100, np.uint16, False)
    assert same_bits(once, expected(values, epsilon, SIGMA, np.uint16)) and not same_bits(once, twice)


def test_scales_and_width_may_be_left_out_for_bf16_weights():
    bits = plain.bf16(0.05 * np.random.default_rng(1).standard_normal(5003, np.float32))
    outs = [np.empty(5003, np.uint16) for _ in range(2)]
    gaussian.perturb(outs[0], None, bits, PLACE, SIGMA, start=13)
    gaussian.perturb(outs[1], None, bits, PLACE, SIGMA, start=13, scales=np.empty(0, np.float32), width=64)
    epsilon = gaussian.epsilon(PLACE, 13, 5003)
    assert all(same_bits(out, expected(plain.float32(bits), epsilon, SIGMA, np.uint16)) for out in outs)
