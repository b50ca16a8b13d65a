"""Low-rank noise as it is defined: where its factors are drawn, pinned elements, the statistics, and kernels and torch operations
where they divide their work in ways of their own."""

import math

import numpy as np
import plain
import pytest
import torch
from plain import same_bits

from es_lite.algorithm.jit import CHUNK
from es_lite.algorithm.noise import gaussian, on_device, philox
from es_lite.algorithm.noise.lowrank import BLOCK_ROWS, PANEL, TERMS, LowRank
from es_lite.algorithm.noise.place import Place

PLACE = Place(seed=0xFEDCBA9876543210, step=11, pair=4, tensor=290)
SIGMA = 1.2345678e-3
RANKS = pytest.mark.parametrize("rank", [1, 2, 3, 16])
CPU = torch.device("cpu")

NOT_MATRICES = pytest.mark.parametrize("shape", [(), (5003,), (7, 5, 301), (2, 3, 4, 5)], ids=str)


def factor(element: int) -> np.float32:
    """An element of A or B from the words of its counter: the lane's quantile."""
    word = philox.words((element // 8, PLACE.tensor, PLACE.pair, PLACE.step), PLACE.key)[0].tolist()[element % 8 // 2]
    return np.float32(gaussian.table()[word >> 16 if element % 2 else word & 0xFFFF] / 4096)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 6), (4, 0), (2, 3), (4, 6)])
@RANKS
def test_an_element_is_the_product_of_its_rows_and_its_columns_factors(rank, row, column):
    """Of a matrix [5, 7]: A[o, k] is element o·r + k of the place's gaussian noise, B[i, k] element (5 + i)·r + k."""
    root, total = np.float32(1 / math.sqrt(rank)), np.float32(0)
    for k in range(rank):
        total = total + factor(row * rank + k) * root * factor((5 + column) * rank + k)
    found = LowRank(rank).epsilon(PLACE, (5, 7), 7 * row + column, 1)
    assert same_bits(found, np.array([total]))


def test_some_elements_are_pinned():
    """At the place of zeros the factors are 5479, -1048, 3049, 4823, 1836, 2581, 4402 and 1096, each divided by 4096.

    If any of these changes, philox.VERSION must change.
    """
    place = Place(0, 0, 0, 0)
    one = LowRank(1).epsilon(place, (2, 3), 0, 6)
    assert (one * 4096**2).astype(int).tolist() == [5479 * 3049, 26425216, 5479 * 1836, -1048 * 3049, -1048 * 4823, -1048 * 1836]
    two = LowRank(2).epsilon(place, (2, 2), 0, 4)
    assert [hex(bits) for bits in two.view(np.uint32).tolist()] == ["0x3e9eb491", "0x3f77d620", "0x3f42b5da", "0x3f49d939"]


@RANKS
def test_the_noise_of_a_slice_is_a_slice_of_all_noise(rank):
    noise = LowRank(rank)
    whole = noise.epsilon(PLACE, (37, 53), 0, 37 * 53)
    assert whole.dtype == np.float32
    for start, count in ((0, 0), (5, 0), (0, 1), (52, 2), (53, 53), (77, 1000), (37 * 53 - 1, 1)):
        assert same_bits(noise.epsilon(PLACE, (37, 53), start, count), whole[start : start + count])


@RANKS
def test_the_factors_are_those_of_the_definition(rank):
    """A Bᵀ/√r in float64; the definition rounds the product A·(1/√r), each term and each sum to float32."""
    noise, shape = LowRank(rank), (41, 67)
    left, right = (values.astype(np.float64) for values in noise.factors(PLACE, shape))
    assert left.shape == (41, rank) and right.shape == (67, rank)
    found = noise.epsilon(PLACE, shape, 0, 41 * 67).reshape(shape)
    error = np.abs(found - left @ right.T / math.sqrt(rank))
    assert (error <= (rank + 3) * 2.0**-24 * (np.abs(left) @ np.abs(right).T) / math.sqrt(rank)).all()


@RANKS
@pytest.mark.parametrize(("first", "count"), [(0, None), (0, 41), (0, 1), (13, 11), (40, 1)])
def test_the_factors_of_some_rows_are_their_part_of_a_and_all_of_b(rank, first, count):
    noise, shape = LowRank(rank), (41, 67)
    drawn = gaussian.epsilon(PLACE, (), 0, (41 + 67) * rank).reshape(-1, rank)
    left, right = noise.factors(PLACE, shape, first, count)
    assert same_bits(left, drawn[first : 41 if count is None else first + count]) and same_bits(right, drawn[41:])
    there = noise.factors_on_device(PLACE, shape, CPU, first, count)
    assert same_bits(there[0].numpy(), left) and same_bits(there[1].numpy(), right)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_noise_of_a_matrix_has_the_rank_that_it_should(rank):
    values = np.linalg.svd(LowRank(rank).epsilon(PLACE, (60, 90), 0, 5400).reshape(60, 90).astype(np.float64), compute_uv=False)
    assert values[rank - 1] > 10 and values[rank] < 1e-4


def diagonal(rank: int, place: Place, shift: int = 0) -> np.ndarray:
    """E[i, i + shift] of a great square matrix, for many i: elements that have no factor in common. float64."""
    size, count = 2**18, 2**17
    i = torch.arange(count)
    return LowRank(rank).epsilon_on_device(i * size + i + shift, place, (size, size)).numpy().astype(np.float64)


@pytest.mark.parametrize(("rank", "kurtosis"), [(1, 9.0), (3, 5.0), (16, 3.375)])
def test_the_moments_are_those_of_a_mean_of_products(rank, kurtosis):
    """Mean 0 and variance 1 whatever the rank; the fourth moment is 3 + 6/r."""
    values = diagonal(rank, PLACE)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, kurtosis)):
        powers = values**power
        assert abs(powers.mean() - moment) < 4 * powers.std() / math.sqrt(powers.size), power
    assert kurtosis / 1.15 < np.mean(values**4) < kurtosis * 1.15


@RANKS
def test_different_elements_are_uncorrelated(rank):
    """In a row or a column, which have factors in common, and in other pairs and tensors."""
    values = diagonal(rank, PLACE)
    count = values.size
    for other in (
        diagonal(rank, PLACE, 1),  # the next column of each row
        diagonal(rank, PLACE, 1)[:-1],  # E[i, i + 1] and E[i + 1, i + 1]: a column
        diagonal(rank, PLACE._replace(pair=5)),
        diagonal(rank, PLACE._replace(tensor=291)),
    ):
        mine = values[-other.size :]
        assert abs(np.mean(mine * other)) < 5 * np.std(mine * other) / math.sqrt(count)


# What is not a matrix


@NOT_MATRICES
@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_not_a_matrix_has_gaussian_noise(rank, shape):
    noise, size = LowRank(rank), math.prod(shape)
    start, count = (0, 1) if size == 1 else (size // 9, size // 2)
    expected = gaussian.epsilon(PLACE, shape, start, count)
    assert same_bits(noise.epsilon(PLACE, shape, start, count), expected)
    whole = torch.arange(start // 8 * 8, start + count)
    assert same_bits(noise.epsilon_on_device(whole, PLACE, shape).numpy()[start % 8 :][:count], expected)
    assert noise.drawn(shape) == noise.drawn(shape, update=True) == size
    assert noise.block(shape) == gaussian.block(shape)

    base = plain.bf16(np.ones(count, np.float32))
    outs = [[np.empty(count, np.uint16) for _ in range(2)] for _ in range(2)]
    for kind, (plus, minus) in zip((noise, gaussian), outs, strict=True):
        kind.perturb(plus, minus, base, PLACE, 0.5, shape, start=start)
    assert all(same_bits(mine, theirs) for mine, theirs in zip(*outs, strict=True))

    sums = np.empty(count, np.float32), np.empty(count, np.float32)
    for kind, out in zip((noise, gaussian), sums, strict=True):
        kind.weighted_sum(out, PLACE, np.array([3, 9], np.uint32), np.array([0.1, -7], np.float32), shape, start=start)
    assert same_bits(*sums)


# How the kernels divide their work


WIDE = pytest.mark.parametrize(
    ("shape", "start", "count"),
    [
        ((3, 2 * PANEL + 77), 5, 5 * PANEL),
        ((2, 3 * CHUNK + 1), CHUNK, 4 * CHUNK),
        ((70, 211), 300, 70 * 211 - 301),
        ((2, PANEL), 0, 2 * PANEL),
    ],
    ids=str,
)


@pytest.mark.parametrize("rank", [TERMS - 1, TERMS, TERMS + 1, 40, 100])
@WIDE
def test_ranks_of_about_the_terms_that_are_drawn_together_and_above(rank, shape, start, count):
    """At the higher ones panels are narrower, and not multiples of anything."""
    noise, base = LowRank(rank), plain.bf16(0.05 * np.random.default_rng(rank).standard_normal(count, np.float32))
    pairs = np.array([4, 0, 2**32 - 1], np.uint32)
    coefficients = np.array([0.3, -1e-3, 7.0], np.float32)
    total, plus = np.full(count, np.nan, np.float32), np.empty(count, np.float32)
    noise.weighted_sum(total, PLACE, pairs, coefficients, shape, start=start)
    assert same_bits(total, plain.weighted_sum(noise, PLACE, pairs, coefficients, shape, start, count))
    noise.perturb(plus, None, base, PLACE, SIGMA, shape, start=start)
    assert same_bits(plus, plain.float32(base) + np.float32(SIGMA) * noise.epsilon(PLACE, shape, start, count))


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("count", [TERMS - 1, TERMS, TERMS + 1, 3 * TERMS + 2])
def test_pairs_of_about_the_terms_that_are_drawn_together_and_more(rank, count):
    noise, shape, size = LowRank(rank), (9, PANEL + 13), 8 * PANEL
    pairs, coefficients = np.arange(count, dtype=np.uint32), np.random.default_rng(count).standard_normal(count, np.float32)
    out = np.empty(size, np.float32)
    noise.weighted_sum(out, PLACE, pairs, coefficients, shape, start=13)
    assert same_bits(out, plain.weighted_sum(noise, PLACE, pairs, coefficients, shape, 13, size))


def test_neither_a_fused_multiply_add_nor_another_order_of_the_product_would_give_these_bits():
    """So the tests above show how a sum is rounded."""
    noise, shape, size = LowRank(3), (5, 1009), 5045
    pairs, coefficients = np.arange(6, dtype=np.uint32), np.random.default_rng(1).standard_normal(6, np.float32)
    out, root = np.empty(size, np.float32), np.float32(1 / math.sqrt(3))
    noise.weighted_sum(out, PLACE, pairs, coefficients, shape)
    fused, other = np.zeros(shape, np.float32), np.zeros(size, np.float32)
    for pair, coefficient in zip(pairs, coefficients, strict=True):
        place = PLACE._replace(pair=int(pair))
        left, right = noise.factors(place, shape)
        for k in range(3):
            product = (left[:, k, None] * (coefficient * root)).astype(np.float64) * right[:, k]
            fused = (fused + product).astype(np.float32)
        other = other + coefficient * noise.epsilon(place, shape, 0, size)
    assert not same_bits(out, fused.ravel()) and not same_bits(out, other)
    assert np.allclose(out, fused.ravel(), rtol=0, atol=1e-5) and np.allclose(out, other, rtol=0, atol=1e-5)


def test_rows_whose_factors_are_beyond_32_bits():
    """Row 2³¹ - 3 has elements of A from about 6.4·10⁹ on."""
    height, width, rank, row = 2**31, 24, 3, 2**31 - 3
    left = gaussian.epsilon(PLACE, (), row * rank, rank) * np.float32(1 / math.sqrt(3))
    right = gaussian.epsilon(PLACE, (), height * rank, width * rank).reshape(width, rank)
    expected = left[0] * right[:, 0] + left[1] * right[:, 1] + left[2] * right[:, 2]
    noise, zeros, out = LowRank(rank), np.zeros((1, width), np.uint16), np.empty((1, width), np.float32)
    noise.perturb_rows(out, None, zeros, np.array([row]), PLACE, 1.0, (height, width))
    assert same_bits(out[0], expected)
    noise.perturb(out[0], None, zeros[0], PLACE, 1.0, (height, width), start=row * width)
    assert same_bits(out[0], expected)
    there = noise.factors_on_device(PLACE, (height, width), CPU, row, 1)
    assert same_bits(there[0].numpy()[0] * np.float32(1 / math.sqrt(3)), left) and same_bits(there[1].numpy(), right)


def test_a_block_is_whole_rows_and_what_is_drawn_for_it_is_counted():
    noise = LowRank(3)
    assert noise.block((1000, 40)) == BLOCK_ROWS * 40
    assert noise.drawn((1000, 40)) == 3 * (1000 + 40)
    blocks = math.ceil(1000 / BLOCK_ROWS)
    assert noise.drawn((1000, 40), update=True) == 3 * (1000 + blocks * 40)


# By torch operations


@RANKS
@pytest.mark.parametrize("shape", [(3, 27), (64, 8), (41, 67), (300, 1)], ids=str)
def test_torch_has_the_same_bits_for_elements_in_any_order(rank, shape):
    noise, size = LowRank(rank), math.prod(shape)
    order = np.random.default_rng(0).permutation(size)
    found = noise.epsilon_on_device(torch.from_numpy(order), PLACE, shape)
    assert same_bits(found.numpy(), noise.epsilon(PLACE, shape, 0, size)[order])


@pytest.mark.parametrize("shape", [(3, 27), (5, 1)], ids=str)
def test_torch_perturbs_a_matrix_whose_elements_are_not_a_multiple_of_8(shape):
    """The last group of elements that it draws ends beyond the matrix."""
    noise, size = LowRank(2), math.prod(shape)
    out = torch.empty(size)
    on_device.perturb([out], torch.zeros(size, dtype=torch.bfloat16), None, shape, 0, noise.epsilon_on_device, PLACE, 1.0)
    assert same_bits(out.numpy(), noise.epsilon(PLACE, shape, 0, size))
