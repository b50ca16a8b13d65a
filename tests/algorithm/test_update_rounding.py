"""The update of bfloat16 and int8 weights against plain numpy float32 arithmetic, bit for bit; its rounding is unbiased."""

import numpy as np
import plain
import pytest
from plain import EVERY_KIND, same_bits

from es_lite.algorithm import update
from es_lite.algorithm.formats import NO_SCALES
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.place import ROUNDING, Place

PLACE = {"seed": 0xFEDCBA9876543210, "step": 11, "tensor": 290}
PAIRS = np.array([0, 1, 2, 5, 6, 40, 2**32 - 2], np.uint32)
COEFFICIENTS = np.array([1e-4, -3.3e-4, 2.7e-3, 1e-9, -0.11, 5e-5, 0.037], np.float32)
NONE = {"pairs": np.empty(0, np.uint32), "coefficients": np.empty(0, np.float32)}
SUM = {"pairs": PAIRS, "coefficients": COEFFICIENTS}

STARTS = pytest.mark.parametrize("start", [0, 1, 8, 13, 2047, 1_000_003])
LENGTHS = pytest.mark.parametrize("length", [1, 7, 2047, 2048, 2049, 5003])
WIDTHS = pytest.mark.parametrize("width", [1, 7, 64, 129, 2047, 2048, 2049, 5003])
DECAYS = pytest.mark.parametrize("decay", [0.0, 1.7e-3])


def normal(count: int) -> np.ndarray:
    values = 0.05 * np.random.default_rng(count).standard_normal(count, np.float32)
    values[::17] = 0
    return values


def advance(stored: np.ndarray, scales: np.ndarray = NO_SCALES, *, start: int = 0, **changes) -> None:
    """The update of `stored` and `scales` in place; `changes`: other coordinates, pairs, coefficients, decay, noise or shape."""
    given = {**PLACE, **SUM, "decay": 0.0, "noise": gaussian, "shape": (), **changes}
    place = Place(given["seed"], given["step"], 0, given["tensor"])
    moved = given["pairs"], given["coefficients"], given["decay"]
    update.advance(stored, given["noise"], place, *moved, given["shape"], start=start, scales=scales)


def expected(stored: np.ndarray, scales: np.ndarray = NO_SCALES, **changes) -> tuple[np.ndarray, np.ndarray]:
    """Copies of both after the update, by the reference."""
    return plain.advanced(stored, scales, **{**PLACE, **SUM, "decay": 0.0, **changes})


@EVERY_KIND
@STARTS
@LENGTHS
@DECAYS
def test_bf16(noise, start, length, decay):
    stored, given = plain.bf16(normal(length)), {"decay": decay, "start": start, "noise": noise, "shape": (1003, 1009)}
    out = stored.copy()
    advance(out, **given)
    assert same_bits(out, expected(stored, **given)[0])


@EVERY_KIND
@WIDTHS
@DECAYS
@pytest.mark.parametrize(("first", "rows"), [(0, 1), (0, 5), (3, 4), (1001, 2)])
def test_int8(noise, width, decay, first, rows):
    stored, scales = plain.quantised(normal(width * rows), width)
    given = {"decay": decay, "start": first * width, "noise": noise, "shape": (1010, width)}
    out, out_scales = stored.copy(), scales.copy()
    advance(out, out_scales, **given)
    after, scales_after = expected(stored, scales, **given)
    assert same_bits(out, after) and same_bits(out_scales, scales_after)


@EVERY_KIND
@pytest.mark.parametrize(("rows", "width"), [(150, 519), (2, 70_001), (200_001, 1)])
def test_tensors_longer_than_a_block_of_the_sum(noise, rows, width):
    """A block of int8 is whole rows, at least one; a block of low-rank noise is many rows, however long."""
    shape = (rows + 5, width)
    assert rows * width > noise.block(shape) or (noise.RANK and rows == 2)
    few = {"pairs": PAIRS[:2], "coefficients": COEFFICIENTS[4:6], "decay": 1.7e-3, "start": 3 * width}
    few |= {"noise": noise, "shape": shape}
    stored, scales = plain.quantised(normal(width * rows), width)
    bits = plain.bf16(normal(width * rows))
    out, out_scales, out_bits = stored.copy(), scales.copy(), bits.copy()
    advance(out, out_scales, **few)
    advance(out_bits, **few)
    after, scales_after = expected(stored, scales, **few)
    assert same_bits(out, after) and same_bits(out_scales, scales_after)
    assert same_bits(out_bits, expected(bits, **few)[0])


@EVERY_KIND
def test_bf16_divided_anywhere_gets_the_same_bits(noise):
    stored, given = plain.bf16(normal(9001)), {"noise": noise, "shape": (10, 1009)}
    after = expected(stored, start=5, **given)[0]
    for cuts in ([1, 2, 3], [8, 4096], [2047, 2049, 9000], [4500]):
        out = stored.copy()
        for low, high in zip([0, *cuts], [*cuts, 9001], strict=True):
            advance(out[low:high], start=5 + low, **given)
        assert same_bits(out, after)


@EVERY_KIND
@WIDTHS
def test_int8_divided_between_any_rows_gets_the_same_bits(noise, width):
    (stored, scales), given = plain.quantised(normal(width * 9), width), {"noise": noise, "shape": (11, width)}
    after, scales_after = expected(stored, scales, start=2 * width, **given)
    for cuts in ([1], [4, 5], [3, 8], range(1, 9)):
        out, out_scales = stored.copy(), scales.copy()
        for low, high in zip([0, *cuts], [*cuts, 9], strict=True):
            advance(out[low * width : high * width], out_scales[low:high], start=(2 + low) * width, **given)
        assert same_bits(out, after) and same_bits(out_scales, scales_after)


@EVERY_KIND
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_bits_do_not_depend_on_the_threads(noise, count):
    width, rows = 333, 61
    given = {"noise": noise, "shape": (rows, width)}
    bits, (stored, scales) = plain.bf16(normal(width * rows)), plain.quantised(normal(width * rows), width)
    out, out_bits, out_scales = stored.copy(), bits.copy(), scales.copy()
    threads = Threads(count)
    threads.each(bits.size, lambda low, high: advance(out_bits[low:high], start=low, **given), least=1001)
    threads.each(
        rows,
        lambda low, high: advance(out[low * width : high * width], out_scales[low:high], start=low * width, **given),
        least=2,
    )
    after, scales_after = expected(stored, scales, **given)
    assert same_bits(out_bits, expected(bits, **given)[0])
    assert same_bits(out, after) and same_bits(out_scales, scales_after)


def test_nothing_outside_the_slice_is_written():
    bits, (stored, scales) = plain.bf16(normal(700)), plain.quantised(normal(700), 70)
    out, out_bits, out_scales = stored.copy(), bits.copy(), scales.copy()
    advance(out_bits[100:500], start=100)
    advance(out[140:490], out_scales[2:7], start=140)
    assert same_bits(out_bits[:100], bits[:100]) and same_bits(out_bits[500:], bits[500:])
    assert same_bits(out[:140], stored[:140]) and same_bits(out[490:], stored[490:])
    assert same_bits(out_scales[[0, 1, 7, 8, 9]], scales[[0, 1, 7, 8, 9]])


@pytest.mark.parametrize("change", [{"step": 12}, {"tensor": 291}, {"seed": 1}])
def test_each_step_tensor_and_seed_is_rounded_by_other_bits(change):
    """The update has no noise here, so only the rounding can make a difference."""
    bits, (stored, scales) = plain.bf16(normal(5000)), plain.quantised(normal(5000), 50)
    results = []
    for place in ({}, change):
        out, out_bits, out_scales = stored.copy(), bits.copy(), scales.copy()
        advance(out_bits, **NONE, decay=0.01, **place)
        advance(out, out_scales, **NONE, decay=0.01, **place)
        assert same_bits(out_bits, expected(bits, **NONE, decay=0.01, **place)[0])
        results.append((out.tobytes(), out_bits.tobytes()))
    assert results[0][0] != results[1][0] and results[0][1] != results[1][1]


def test_the_rounding_takes_the_bits_of_a_reserved_pair():
    """No member of any population has this pair, antithetic or not."""
    assert ROUNDING == 2**32 - 1
    lanes = plain.random16(**PLACE, start=3, count=1000)
    quantiles = gaussian.table()[lanes].astype(np.float32) / np.float32(gaussian.QUANTUM)
    assert same_bits(quantiles, gaussian.epsilon(Place(**PLACE, pair=ROUNDING), (), 3, 1000))


def test_int8_scales_grow_just_enough_and_never_shrink():
    """By factors of 17/16, one at a time in float32; a row that shrinks keeps its scale."""
    width, rows = 96, 200
    values = normal(width * rows).reshape(rows, width) * np.geomspace(1e-3, 10, rows, dtype=np.float32)[:, None]
    stored, scales = plain.quantised(values.ravel(), width)
    first = scales.copy()
    for step in range(12):
        before = scales.copy()
        moved = expected(plain.dequantised(stored, scales, width), step=step, decay=0.2)[0]
        top = np.abs(moved.reshape(rows, width)).max(axis=1)
        advance(stored, scales, step=step, decay=0.2)
        assert (scales >= before).all() and (scales >= top).all()
        grew = scales > before
        assert (scales[grew] / np.float32(1.0624) < top[grew]).all(), "grown by more factors than needed"
        assert ((top <= before) == ~grew).all()
        assert np.abs(stored).max() <= 127
    growth = np.log(scales.astype(np.float64) / first) / np.log(17 / 16)
    assert np.abs(growth - np.rint(growth)).max() < 1e-4
    assert (growth.round() == 0).any() and (growth.round() > 20).any(), "the rows must be of both kinds"


def test_a_row_of_zeros_gets_its_scale_from_its_first_update():
    """The scale becomes the row's greatest magnitude; without an update the row stays zeros."""
    width = 40
    stored, scales = np.zeros(3 * width, np.int8), np.zeros(3, np.float32)
    advance(stored, scales, **NONE, decay=0.1)
    assert not stored.any() and not scales.any()
    advance(stored, scales)
    total = expected(np.zeros(3 * width, np.float32))[0].reshape(3, width)
    assert same_bits(scales, np.abs(total).max(axis=1))
    assert (np.abs(plain.dequantised(stored, scales, width).reshape(3, width) - total) <= scales[:, None] / 126).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_int8_never_leaves_its_levels(sign):
    """Rounding may lift a row's greatest element times its factor a last bit above 127, and the random bits may reach -128."""
    rows = 2**19
    first = sign * np.exp(np.random.default_rng(3).uniform(-20, 20, rows)).astype(np.float32)
    stored, scales = plain.quantised(first, 1)
    exact = plain.dequantised(stored, scales, 1) * plain.factor(scales).ravel()
    beyond = 0
    for step in range(4):
        random = plain.random16(**PLACE | {"step": step}, start=0, count=rows).astype(np.float32)
        up = (random + np.float32(0.5)) / np.float32(65536)
        beyond += int((np.abs(np.floor(exact + up)) > 127).sum())
        out, out_scales = stored.copy(), scales.copy()
        advance(out, out_scales, step=step, **NONE)
        assert (sign * out.astype(int) >= 126).all() and (np.abs(out.astype(int)) <= 127).all()
    assert sign < 0 or beyond > 0, "nothing had to be clipped"


def coarse_weights(kind: str, rows: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Weights that are coarse compared with the updates below: stored, scales, the width of a row, the elements' resolutions."""
    width = 256
    values = normal(rows * width) + np.float32(0.001)
    if kind == "int8":
        stored, scales = plain.quantised(values, width)
        return stored, scales, width, np.repeat(scales.astype(np.float64) / 127, width)
    stored = plain.bf16(values)
    return stored, NO_SCALES.copy(), width, 2.0 ** (np.floor(np.log2(np.abs(plain.float32(stored)))) - 7)


def unchanged(values: np.ndarray, moved: np.ndarray, resolution: np.ndarray) -> bool:
    """Whether rounding `moved` to nearest gives `values` again."""
    return np.array_equal(np.rint(moved / resolution), np.rint(values / resolution))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_updates_far_below_the_resolution_move_the_weights_as_much_as_they_should(kind):
    """16 updates of 2^20 weights, each about a fiftieth of a weight's resolution s; rounding to nearest would move nothing.

    Stochastic rounding is unbiased, and an update of f·s has the variance f·(1 - f)·s². So the sum of the weights' movements,
    and their product with the updates, must be within five standard deviations of what is expected: about 3 % of the latter.
    """
    stored, scales, width, resolution = coarse_weights(kind, 4096)
    first = plain.as_float32(stored, scales, width).astype(np.float64)
    coefficient = np.float32(0.02 * np.median(resolution))
    wanted, variance = np.zeros(stored.size), np.zeros(stored.size)
    coarse = resolution >= np.median(resolution) / 4  # bfloat16 near zero is fine enough for every update
    one = np.empty(stored.size, np.float32)
    for step in range(16):
        gaussian.fill(one, Place(**PLACE | {"step": step}, pair=step), float(coefficient))
        advance(stored, scales, step=step, pairs=np.array([step], np.uint32), coefficients=np.array([coefficient]))
        wanted += one
        variance += np.abs(one) * resolution
    assert unchanged(first[coarse], (first + one)[coarse], resolution[coarse]), "rounding to nearest would move something too"
    moved = plain.as_float32(stored, scales, width) - first
    difference, direction, variance = (moved - wanted)[coarse], wanted[coarse], variance[coarse]
    deviation = np.sqrt(variance @ direction**2)
    assert abs(difference @ direction) < 5 * deviation < 0.05 * (direction @ direction)
    assert abs(difference.sum()) < 5 * np.sqrt(variance.sum())


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_decay_far_below_the_resolution_shrinks_the_weights_as_much_as_it_should(kind):
    """On average to θ·(1 - d)^n, within five standard deviations as above, though rounding to nearest would lose d entirely.

    Positive and negative weights are checked apart: neither side may drift.
    """
    stored, scales, width, resolution = coarse_weights(kind, 256)
    first = plain.as_float32(stored, scales, width).astype(np.float64)
    decay, steps = 2.0**-12, 100
    assert unchanged(first, first * (1 - decay), resolution), "rounding to nearest would move something too"
    for step in range(steps):
        advance(stored, scales, step=step, **NONE, decay=decay)
    moved = plain.as_float32(stored, scales, width) - first
    wanted = first * ((1 - decay) ** steps - 1)
    variance = steps * decay * np.abs(first) * resolution
    for sign in (1, -1):
        side = np.sign(first) == sign
        deviation = np.sqrt(variance[side].sum())
        assert abs((moved - wanted)[side].sum()) < 5 * deviation < 0.05 * abs(wanted[side].sum())


def test_a_negligible_update_changes_no_bf16_and_int8_not_on_average():
    """A bfloat16 has no bits below its resolution, so the random bits never carry. The level of an int8 is computed in float32
    and may be a last bit off a whole number, so one draw in 65536 may change it by one; on average this cancels."""
    tiny = {"coefficients": COEFFICIENTS * np.float32(1e-30)}
    stored, scales = plain.quantised(normal(2**18), 256)
    bits = plain.bf16(normal(2**18))
    out, out_bits, out_scales = stored.copy(), bits.copy(), scales.copy()
    for step in range(8):
        advance(out_bits, step=step, **tiny)
        advance(out, out_scales, step=step, **tiny)
    values = plain.float32(bits) != 0
    assert same_bits(out_bits[values], bits[values]) and same_bits(out_scales, scales)
    assert abs((out.astype(int) - stored).sum()) < 16
    assert np.abs(out.astype(int) - stored).max() <= 1
