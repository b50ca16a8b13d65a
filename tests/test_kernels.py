"""The kernels against plain numpy float32 arithmetic on `noise.gaussian`, bit for bit."""

import numpy as np
import pytest
import torch

from es_lite.algorithm import formats, kernels, noise
from es_lite.algorithm.jit import Threads

PLACE = {"seed": 0xFEDCBA9876543210, "step": 11, "pair": 4, "tensor": 290}
SIGMA = 1.2345678e-3
STARTS = pytest.mark.parametrize("start", [0, 1, 8, 13, 2047, 1_000_003])
LENGTHS = pytest.mark.parametrize("length", [1, 7, 2047, 2048, 2049, 5003])
TYPES = pytest.mark.parametrize("dtype", [np.uint16, np.float32])
SIGNS = pytest.mark.parametrize("both", [False, True], ids=["plus", "plus-minus"])


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def weights(count: int) -> np.ndarray:
    """bfloat16 bits, of the size that σε moves by a few units in the last place, among them zeros."""
    values = 0.05 * np.random.default_rng(count).standard_normal(count, np.float32)
    values[::17] = 0
    return bf16_bits(values)


def expected(bits: np.ndarray, epsilon: np.ndarray, sigma: float, dtype: type) -> np.ndarray:
    moved = float32(bits) + np.float32(sigma) * epsilon
    return bf16_bits(moved) if dtype is np.uint16 else moved


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@STARTS
@LENGTHS
@TYPES
@SIGNS
def test_perturb(start, length, dtype, both):
    base = weights(length)
    plus, minus = np.empty(length, dtype), np.empty(length, dtype)
    kernels.perturb(plus, minus if both else None, base, **PLACE, sigma=SIGMA, start=start)
    epsilon = noise.gaussian(**PLACE, start=start, count=length)
    assert same_bits(plus, expected(base, epsilon, SIGMA, dtype))
    if both:
        assert same_bits(minus, expected(base, epsilon, -SIGMA, dtype))


def test_the_perturbation_is_not_fused():
    """The numbers above would tell a fused multiply-add: here it gives other bits than two roundings."""
    base, epsilon = weights(5003), noise.gaussian(**PLACE, start=0, count=5003)
    fused = (float32(base).astype(np.float64) + np.float64(np.float32(SIGMA)) * epsilon).astype(np.float32)
    assert not same_bits(fused, expected(base, epsilon, SIGMA, np.float32))


@TYPES
def test_perturb_writes_nothing_but_its_outputs(dtype):
    base = weights(5003)
    kept, room = base.copy(), np.full(5023, 7, dtype)
    kernels.perturb(room[10:-10], None, base, **PLACE, sigma=SIGMA)
    assert same_bits(base, kept)
    assert (room[:10] == 7).all() and (room[-10:] == 7).all()


@TYPES
def test_perturb_takes_read_only_weights(dtype):
    base, out = weights(100), np.empty(100, dtype)
    base.flags.writeable = False
    kernels.perturb(out, None, base, **PLACE, sigma=SIGMA)
    assert same_bits(out, expected(base, noise.gaussian(**PLACE, start=0, count=100), SIGMA, dtype))


@pytest.mark.parametrize("sigma", [0.0, -SIGMA, 1e-30, 3.0])
@TYPES
def test_perturb_by_any_sigma(sigma, dtype):
    base, plus, minus = weights(3000), np.empty(3000, dtype), np.empty(3000, dtype)
    kernels.perturb(plus, minus, base, **PLACE, sigma=sigma)
    epsilon = noise.gaussian(**PLACE, start=0, count=3000)
    for out, signed in ((plus, sigma), (minus, -sigma)):
        assert np.array_equal(out.view(dtype), expected(base, epsilon, signed, dtype))


@pytest.mark.parametrize("width", [1, 7, 64, 2049])
@TYPES
@SIGNS
def test_perturb_rows_is_perturb_of_those_rows(width, dtype, both):
    matrix = weights(60 * width).reshape(60, width)
    rows = np.array([0, 59, 3, 4, 3], np.int64)
    plus, minus = np.empty((5, width), dtype), np.empty((5, width), dtype)
    kernels.perturb_rows(plus, minus if both else None, matrix[rows], rows, **PLACE, sigma=SIGMA)
    epsilon = noise.gaussian(**PLACE, start=0, count=60 * width).reshape(60, width)[rows]
    assert same_bits(plus, expected(matrix[rows].ravel(), epsilon.ravel(), SIGMA, dtype).reshape(5, width))
    if both:
        assert same_bits(minus, expected(matrix[rows].ravel(), epsilon.ravel(), -SIGMA, dtype).reshape(5, width))


@STARTS
@LENGTHS
def test_fill(start, length):
    out = np.empty(length, np.float32)
    kernels.fill(out, **PLACE, scale=0.02, start=start)
    assert same_bits(out, np.float32(0.02) * noise.gaussian(**PLACE, start=start, count=length))


def test_fill_by_one_is_the_noise_itself_at_the_ends_of_every_coordinate():
    out = np.empty(3001, np.float32)
    for seed in (0, 2**64 - 1):
        for other in (0, 2**31, 2**32 - 1):
            place = {"seed": seed, "step": other, "pair": other, "tensor": other}
            kernels.fill(out, **place, scale=1.0, start=2**33 + 5)
            assert same_bits(out, noise.gaussian(**place, start=2**33 + 5, count=3001))


@LENGTHS
def test_to_bf16_of_any_length(length):
    values = 0.05 * np.random.default_rng(length).standard_normal(length, np.float32)
    out = np.empty(length, np.uint16)
    formats.to_bf16(out, values)
    assert same_bits(out, bf16_bits(values))


@pytest.mark.parametrize("count", [2, 3, 5])
@TYPES
def test_the_bits_do_not_depend_on_the_threads(count, dtype):
    size, threads = 50_021, Threads(count)
    base, plus, minus = weights(size), np.empty(size, dtype), np.empty(size, dtype)
    cuts = []

    def work(low, high):
        cuts.append((low, high))
        kernels.perturb(plus[low:high], minus[low:high], base[low:high], **PLACE, sigma=SIGMA, start=3 + low)

    threads.each(size, work, least=1001)
    assert len(cuts) == count
    epsilon = noise.gaussian(**PLACE, start=3, count=size)
    assert same_bits(plus, expected(base, epsilon, SIGMA, dtype))
    assert same_bits(minus, expected(base, epsilon, -SIGMA, dtype))
