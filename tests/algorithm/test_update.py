"""The update of float32 weights against plain numpy float32 arithmetic, bit for bit."""

import numpy as np
import plain
import pytest
from plain import EVERY_KIND, same_bits

from es_lite.algorithm import update
from es_lite.algorithm.formats import NO_SCALES
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.place import Place

PLACE = Place(seed=0xFEDCBA9876543210, step=11, pair=4, tensor=290)
STARTS = pytest.mark.parametrize("start", [0, 1, 8, 13, 2047, 1_000_003])
LENGTHS = pytest.mark.parametrize("length", [1, 7, 2047, 2048, 2049, 5003])
SHAPE = (1003, 1009)
PAIRS = np.array([0, 1, 2, 5, 6, 40, 2**32 - 1], np.uint32)
COEFFICIENTS = np.array([1e-4, -3.3e-4, 2.7e-3, 1e-9, -0.11, 5e-5, 0.037], np.float32)


def expected(
    theta: np.ndarray,
    start: int = 0,
    pairs: np.ndarray = PAIRS,
    coefficients: np.ndarray = COEFFICIENTS,
    decay: float = 0.0,
    noise: NoiseKind = gaussian,
    shape: tuple[int, ...] = SHAPE,
) -> np.ndarray:
    """theta: elements start … of a tensor of this shape."""
    place = {"seed": PLACE.seed, "step": PLACE.step, "tensor": PLACE.tensor}
    moved = {"pairs": pairs, "coefficients": coefficients, "decay": decay}
    return plain.advanced(theta, NO_SCALES, **place, **moved, start=start, noise=noise, shape=shape)[0]


def advanced(
    theta: np.ndarray,
    start: int = 0,
    pairs: np.ndarray = PAIRS,
    coefficients: np.ndarray = COEFFICIENTS,
    decay: float = 0.0,
    noise: NoiseKind = gaussian,
    shape: tuple[int, ...] = SHAPE,
    threads: Threads | None = None,
    least: int = 1000,
) -> np.ndarray:
    """A copy of `theta` after the update."""
    theta = theta.copy()

    def work(low: int, high: int) -> None:
        update.advance(theta[low:high], noise, PLACE, pairs, coefficients, decay, shape, start=start + low)

    (threads or Threads(1)).each(theta.size, work, least=least)
    return theta


def thetas(count: int) -> np.ndarray:
    return 0.05 * np.random.default_rng(count + 1).standard_normal(count, np.float32)


@EVERY_KIND
@STARTS
@LENGTHS
@pytest.mark.parametrize("decay", [0.0, 1.7e-3])
def test_advance(noise, start, length, decay):
    theta = thetas(length)
    assert same_bits(advanced(theta, start, decay=decay, noise=noise), expected(theta, start, decay=decay, noise=noise))


@EVERY_KIND
@pytest.mark.parametrize("shape", [(1000, 157), (157_000,), (10, 157, 100)], ids=str)
def test_tensors_longer_than_a_block_of_the_sum(noise, shape):
    """The pairs' sum is made in blocks: each must draw the noise of its own elements."""
    theta = thetas(2 * noise.block(shape) + 77)
    some = {"pairs": PAIRS[:3], "coefficients": COEFFICIENTS[:3], "decay": 1e-3, "noise": noise, "shape": shape}
    assert same_bits(advanced(theta, 5, **some), expected(theta, 5, **some))


@EVERY_KIND
def test_the_sum_runs_in_the_order_given(noise):
    theta, reverse = thetas(5003), {"pairs": PAIRS[::-1].copy(), "coefficients": COEFFICIENTS[::-1].copy(), "noise": noise}
    forwards, backwards = advanced(theta, noise=noise), advanced(theta, **reverse)
    assert same_bits(backwards, expected(theta, **reverse))
    assert not same_bits(forwards, backwards)
    assert np.allclose(forwards, backwards, rtol=0, atol=1e-6)


@EVERY_KIND
def test_the_pairs_are_summed_before_theta_changes(noise):
    theta = one_by_one = thetas(5003)
    for i in range(PAIRS.size):
        one_by_one = advanced(one_by_one, pairs=PAIRS[i : i + 1], coefficients=COEFFICIENTS[i : i + 1], noise=noise)
    assert not same_bits(one_by_one, advanced(theta, noise=noise))


def test_a_fused_multiply_add_would_give_other_bits():
    """So the tests above, on these numbers, show that a term's product is rounded before it is added."""
    theta, total = thetas(5003), np.zeros(5003, np.float32)
    for pair, coefficient in zip(PAIRS, COEFFICIENTS, strict=True):
        epsilon = gaussian.epsilon(PLACE._replace(pair=int(pair)), (), 0, 5003)
        total = (total.astype(np.float64) + np.float64(coefficient) * epsilon).astype(np.float32)
    assert not same_bits(theta + total, expected(theta))


@EVERY_KIND
def test_without_pairs_the_weights_only_decay(noise):
    theta = thetas(3000)
    none = {"pairs": np.empty(0, np.uint32), "coefficients": np.empty(0, np.float32), "noise": noise}
    assert same_bits(advanced(theta, **none, decay=0.25), theta - np.float32(0.25) * theta)


@EVERY_KIND
def test_coefficients_of_0_change_nothing(noise):
    theta = thetas(3000)
    assert same_bits(advanced(theta, coefficients=np.zeros(PAIRS.size, np.float32), noise=noise), theta)


@EVERY_KIND
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_bits_do_not_depend_on_the_threads(noise, count):
    theta = thetas(20_011)
    out = advanced(theta, 5, decay=1e-3, noise=noise, threads=Threads(count), least=999)
    assert same_bits(out, expected(theta, 5, decay=1e-3, noise=noise))


@EVERY_KIND
def test_the_places_pair_is_not_used(noise):
    theta = thetas(3000)
    out = theta.copy()
    update.advance(out, noise, PLACE._replace(pair=77), PAIRS, COEFFICIENTS, 0.0, SHAPE)
    assert same_bits(out, expected(theta, noise=noise))
