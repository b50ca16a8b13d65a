"""The update against plain numpy float32 arithmetic on `noise.gaussian`, bit for bit."""

import numpy as np
import pytest

from es_lite.algorithm import noise, update
from es_lite.algorithm.jit import Threads

PLACE = {"seed": 0xFEDCBA9876543210, "step": 11, "pair": 4, "tensor": 290}
STARTS = pytest.mark.parametrize("start", [0, 1, 8, 13, 2047, 1_000_003])
LENGTHS = pytest.mark.parametrize("length", [1, 7, 2047, 2048, 2049, 5003])
PAIRS = np.array([0, 1, 2, 5, 6, 40, 2**32 - 1], np.uint32)
COEFFICIENTS = np.array([1e-4, -3.3e-4, 2.7e-3, 1e-9, -0.11, 5e-5, 0.037], np.float32)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def advanced(theta: np.ndarray, start: int, pairs, coefficients: np.ndarray, decay: float) -> np.ndarray:
    """What `update.advance` promises, one float32 operation at a time."""
    total = np.zeros(theta.size, np.float32)
    for pair, coefficient in zip(pairs, coefficients, strict=True):
        term = coefficient * noise.gaussian(**PLACE | {"pair": int(pair)}, start=start, count=theta.size)
        assert term.dtype == np.float32
        total = total + term
    shrunk = theta - np.float32(decay) * theta
    return shrunk + total


def run_advance(theta, start=0, pairs=PAIRS, coefficients=COEFFICIENTS, decay=0.0, threads=None, least=1000):
    place = {name: PLACE[name] for name in ("seed", "step", "tensor")}

    def work(low, high):
        part = theta[low:high]
        update.advance(part, **place, pairs=pairs, coefficients=coefficients, decay=decay, start=start + low)

    (threads or Threads(1)).each(theta.size, work, least=least)
    return theta


def thetas(count: int) -> np.ndarray:
    return 0.05 * np.random.default_rng(count + 1).standard_normal(count, np.float32)


@STARTS
@LENGTHS
@pytest.mark.parametrize("decay", [0.0, 1.7e-3])
def test_advance(start, length, decay):
    theta = thetas(length)
    assert same_bits(run_advance(theta.copy(), start, decay=decay), advanced(theta, start, PAIRS, COEFFICIENTS, decay))


def test_advance_sums_in_the_order_given():
    theta = thetas(5003)
    there = run_advance(theta.copy())
    back = run_advance(theta.copy(), pairs=PAIRS[::-1].copy(), coefficients=COEFFICIENTS[::-1].copy())
    assert same_bits(back, advanced(theta, 0, PAIRS[::-1], COEFFICIENTS[::-1], 0))
    assert not same_bits(there, back)
    assert np.allclose(there, back, rtol=0, atol=1e-6)


def test_advance_sums_the_members_before_it_touches_theta():
    theta = thetas(5003)
    one_by_one = theta.copy()
    for i in range(PAIRS.size):
        run_advance(one_by_one, pairs=PAIRS[i : i + 1], coefficients=COEFFICIENTS[i : i + 1])
    assert not same_bits(one_by_one, run_advance(theta.copy()))


def test_advance_is_not_fused():
    """The numbers above would tell a fused multiply-add: here it gives other bits than two roundings."""
    theta, total = thetas(5003), np.zeros(5003, np.float32)
    for pair, coefficient in zip(PAIRS, COEFFICIENTS, strict=True):
        epsilon = noise.gaussian(**PLACE | {"pair": int(pair)}, start=0, count=5003)
        total = (total.astype(np.float64) + np.float64(coefficient) * epsilon).astype(np.float32)
    assert not same_bits(theta + total, advanced(theta, 0, PAIRS, COEFFICIENTS, 0))


def test_advance_without_pairs_only_decays():
    theta = thetas(3000)
    none = np.empty(0, np.uint32), np.empty(0, np.float32)
    assert same_bits(run_advance(theta.copy(), pairs=none[0], coefficients=none[1], decay=0.25), theta - np.float32(0.25) * theta)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_advance_does_not_depend_on_the_threads(count):
    theta = thetas(20_011)
    out = run_advance(theta.copy(), 5, decay=1e-3, threads=Threads(count), least=999)
    assert same_bits(out, advanced(theta, 5, PAIRS, COEFFICIENTS, 1e-3))
