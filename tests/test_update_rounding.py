"""The update of bfloat16 and int8 weights against plain numpy float32 arithmetic, bit for bit; and that its rounding is fair."""

import numpy as np
import plain
import pytest
from plain import same_bits

from es_lite.algorithm import kernels, noise, update
from es_lite.algorithm.formats import NO_SCALES
from es_lite.algorithm.jit import Threads

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


def advance(stored: np.ndarray, scales: np.ndarray | None = None, **changes) -> None:
    update.advance(stored, **{**PLACE, **SUM, "decay": 0.0, "scales": scales, **changes})


def expected(stored: np.ndarray, scales: np.ndarray = NO_SCALES, **changes) -> tuple[np.ndarray, np.ndarray]:
    return plain.advanced(stored, scales, **{**PLACE, **SUM, "decay": 0.0, **changes})


@STARTS
@LENGTHS
@DECAYS
def test_bf16(start, length, decay):
    stored = plain.bf16(normal(length))
    out = stored.copy()
    advance(out, decay=decay, start=start)
    assert same_bits(out, expected(stored, decay=decay, start=start)[0])


@WIDTHS
@DECAYS
@pytest.mark.parametrize(("first", "rows"), [(0, 1), (0, 5), (3, 4), (1001, 2)])
def test_int8(width, decay, first, rows):
    stored, scales = plain.quantised(normal(width * rows), width)
    out, out_scales = stored.copy(), scales.copy()
    advance(out, out_scales, decay=decay, start=first * width)
    after, scales_after = expected(stored, scales, decay=decay, start=first * width)
    assert same_bits(out, after) and same_bits(out_scales, scales_after)


def test_bf16_cut_anywhere_has_the_same_bits():
    stored = plain.bf16(normal(9001))
    after = expected(stored, start=5)[0]
    for cuts in ([1, 2, 3], [8, 4096], [2047, 2049, 9000], [4500]):
        out = stored.copy()
        for low, high in zip([0, *cuts], [*cuts, 9001], strict=True):
            advance(out[low:high], start=5 + low)
        assert same_bits(out, after)


@WIDTHS
def test_int8_cut_between_any_rows_has_the_same_bits(width):
    stored, scales = plain.quantised(normal(width * 9), width)
    after, scales_after = expected(stored, scales, start=2 * width)
    for cuts in ([1], [4, 5], [3, 8], range(1, 9)):
        out, out_scales = stored.copy(), scales.copy()
        for low, high in zip([0, *cuts], [*cuts, 9], strict=True):
            advance(out[low * width : high * width], out_scales[low:high], start=(2 + low) * width)
        assert same_bits(out, after) and same_bits(out_scales, scales_after)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_threads_change_no_bit(count):
    width, rows = 333, 61
    bits, (stored, scales) = plain.bf16(normal(width * rows)), plain.quantised(normal(width * rows), width)
    out, out_bits, out_scales = stored.copy(), bits.copy(), scales.copy()
    threads = Threads(count)
    threads.each(bits.size, lambda low, high: advance(out_bits[low:high], start=low), least=1001)
    threads.each(
        rows,
        lambda low, high: advance(out[low * width : high * width], out_scales[low:high], start=low * width),
        least=2,
    )
    after, scales_after = expected(stored, scales)
    assert same_bits(out_bits, expected(bits)[0])
    assert same_bits(out, after) and same_bits(out_scales, scales_after)


def test_nothing_beside_the_slice_is_written():
    bits, (stored, scales) = plain.bf16(normal(700)), plain.quantised(normal(700), 70)
    out, out_bits, out_scales = stored.copy(), bits.copy(), scales.copy()
    advance(out_bits[100:500], start=100)
    advance(out[140:490], out_scales[2:7], start=140)
    assert same_bits(out_bits[:100], bits[:100]) and same_bits(out_bits[500:], bits[500:])
    assert same_bits(out[:140], stored[:140]) and same_bits(out[490:], stored[490:])
    assert same_bits(out_scales[[0, 1, 7, 8, 9]], scales[[0, 1, 7, 8, 9]])


@pytest.mark.parametrize("change", [{"step": 12}, {"tensor": 291}, {"seed": 1}])
def test_each_step_tensor_and_seed_rounds_otherwise(change):
    """With no noise in the update, only the rounding can tell them apart."""
    bits, (stored, scales) = plain.bf16(normal(5000)), plain.quantised(normal(5000), 50)
    results = []
    for place in ({}, change):
        out, out_bits, out_scales = stored.copy(), bits.copy(), scales.copy()
        advance(out_bits, **NONE, decay=0.01, **place)
        advance(out, out_scales, **NONE, decay=0.01, **place)
        assert same_bits(out_bits, expected(bits, **NONE, decay=0.01, **place)[0])
        results.append((out.tobytes(), out_bits.tobytes()))
    assert results[0][0] != results[1][0] and results[0][1] != results[1][1]


def test_the_rounding_is_no_members_noise():
    """Its lanes are those of a pair that an antithetic or plain population of any size has not."""
    assert update.ROUNDING == 2**32 - 1
    lanes = plain.random16(**PLACE, start=3, count=1000)
    quantiles = noise.table()[lanes].astype(np.float32) / np.float32(noise.QUANTUM)
    assert same_bits(quantiles, noise.gaussian(**PLACE, pair=update.ROUNDING, start=3, count=1000))


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
        assert (scales[grew] / np.float32(1.0624) < top[grew]).all(), "more factors than it takes"
        assert ((top <= before) == ~grew).all()
        assert np.abs(stored).max() <= 127
    growth = np.log(scales.astype(np.float64) / first) / np.log(17 / 16)
    assert np.abs(growth - np.rint(growth)).max() < 1e-4
    assert (growth.round() == 0).any() and (growth.round() > 20).any(), "rows of both kinds were there"


def test_a_row_of_zeros_takes_its_first_update():
    """Its scale is then its greatest magnitude; without an update it stays what it was."""
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
    """A row's greatest element times its factor may come out a last bit beyond 127, and the random bits as far as -128."""
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
    assert sign < 0 or beyond > 0, "nothing was there to be clipped"


def far_below_a_step(kind: str, rows: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Weights, their scales, a row's width and each element's resolution, float64."""
    width = 256
    values = normal(rows * width) + np.float32(0.001)
    if kind == "int8":
        stored, scales = plain.quantised(values, width)
        return stored, scales, width, np.repeat(scales.astype(np.float64) / 127, width)
    stored = plain.bf16(values)
    return stored, NO_SCALES.copy(), width, 2.0 ** (np.floor(np.log2(np.abs(plain.float32(stored)))) - 7)


def stays(values: np.ndarray, moved: np.ndarray, resolution: np.ndarray) -> bool:
    """Whether `moved`, rounded to nearest, is `values` again."""
    return np.array_equal(np.rint(moved / resolution), np.rint(values / resolution))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_updates_far_below_a_step_move_the_weights_as_much_as_they_should(kind):
    """16 steps, each of about a fiftieth of the weights' resolution s, of 2^20 weights. Stochastic rounding is fair: where an
    update is f·s, the variance is f·(1 - f)·s². So the sum of all movements, and their product with the movements that were
    asked for, are within five standard deviations, some 3 % of the latter. Plain rounding moves nothing."""
    stored, scales, width, resolution = far_below_a_step(kind, 4096)
    begun = plain.as_float32(stored, scales, width).astype(np.float64)
    coefficient = np.float32(0.02 * np.median(resolution))
    asked, variance = np.zeros(stored.size), np.zeros(stored.size)
    coarse = resolution >= np.median(resolution) / 4  # near zero bfloat16 resolves every update
    one = np.empty(stored.size, np.float32)
    for step in range(16):
        place = PLACE | {"step": step}
        kernels.fill(one, **place, pair=step, scale=float(coefficient))
        advance(stored, scales, step=step, pairs=np.array([step], np.uint32), coefficients=np.array([coefficient]))
        asked += one
        variance += np.abs(one) * resolution
    assert stays(begun[coarse], (begun + one)[coarse], resolution[coarse]), "plain rounding would have moved something"
    moved = plain.as_float32(stored, scales, width) - begun
    difference, direction, variance = (moved - asked)[coarse], asked[coarse], variance[coarse]
    deviation = np.sqrt(variance @ direction**2)
    assert abs(difference @ direction) < 5 * deviation < 0.05 * (direction @ direction)
    assert abs(difference.sum()) < 5 * np.sqrt(variance.sum())


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_decay_far_below_a_step_shrinks_the_weights_as_it_should(kind):
    """To θ·(1 - d)^n on average, where plain rounding would not notice d; as above, within five standard deviations. Both signs
    shrink: nothing is drawn to one side."""
    stored, scales, width, resolution = far_below_a_step(kind, 256)
    begun = plain.as_float32(stored, scales, width).astype(np.float64)
    decay, steps = 2.0**-12, 100
    assert stays(begun, begun * (1 - decay), resolution), "plain rounding would have moved something"
    for step in range(steps):
        advance(stored, scales, step=step, **NONE, decay=decay)
    moved = plain.as_float32(stored, scales, width) - begun
    asked = begun * ((1 - decay) ** steps - 1)
    variance = steps * decay * np.abs(begun) * resolution
    for sign in (1, -1):
        side = np.sign(begun) == sign
        deviation = np.sqrt(variance[side].sum())
        assert abs((moved - asked)[side].sum()) < 5 * deviation < 0.05 * abs(asked[side].sum())


def test_an_update_of_nothing_leaves_bf16_as_it_is_and_int8_on_average():
    """bfloat16 is what it stands for, so no random bits carry. int8's levels are float32 products, at times a last bit beside
    a whole number, so that one in 65536 draws may take or give a level; on average they do neither."""
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
