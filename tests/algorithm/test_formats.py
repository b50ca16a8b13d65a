"""bfloat16 and int8 against torch, bitsandbytes and plain numpy, bit for bit."""

import numpy as np
import plain
import pytest
import torch
from plain import same_bits

from es_lite.algorithm import formats

WIDTHS = pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 64, 129, 2049])


def normal(count: int, seed: int = 0) -> np.ndarray:
    return 0.02 * np.random.default_rng(seed).standard_normal(count, np.float32)


def quantise(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    stored, scales = np.full(values.size, 77, np.int8), np.full(values.size // width, np.nan, np.float32)
    formats.quantise(stored, scales, values)
    return stored, scales


def rows_of_every_size(rows: int, width: int) -> np.ndarray:
    """float32 [rows · width], the rows from 1e-30 to 1e30 in size, so that scales and factors round in every possible way."""
    exponents = np.linspace(-30, 30, rows, dtype=np.float32)
    return (np.float32(10) ** exponents[:, None] * normal(rows * width).reshape(rows, width)).ravel()


def test_bf16_is_rounded_to_nearest_and_ties_to_even():
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = ((np.arange(65536, dtype=np.uint32)[:, None] << 16) + low).ravel().view(np.float32)
    values = np.ascontiguousarray(values[np.isfinite(values)])
    out = np.empty(values.size, np.uint16)
    formats.to_bf16(out, values)
    assert same_bits(out, plain.bf16(values))


@pytest.mark.parametrize("length", [0, 1, 7, 2047, 2048, 2049, 5003])
def test_to_bf16_of_any_length(length):
    values, out = normal(length, length), np.empty(length, np.uint16)
    formats.to_bf16(out, values)
    assert same_bits(out, plain.bf16(values))


def test_every_bf16_survives_the_way_to_float32_and_back():
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    values = formats.as_float32(bits)
    assert same_bits(values, torch.from_numpy(bits).view(torch.bfloat16).float().numpy())
    finite = np.isfinite(values)
    out = np.empty(int(finite.sum()), np.uint16)
    formats.to_bf16(out, np.ascontiguousarray(values[finite]))
    assert same_bits(out, np.ascontiguousarray(bits[finite]))


def test_int8_equals_bitsandbytes():
    """The different ways to compute 127/scale agree for most scales and differ in the last bit for others: hence 8192 rows."""
    functional = pytest.importorskip("bitsandbytes.functional")
    width = 129
    for values in (normal(8192 * width), rows_of_every_size(8192, width)):
        stored, scales = quantise(values, width)
        matrix = torch.from_numpy(values).view(-1, width)
        theirs, their_scales, _ = functional.int8_vectorwise_quant(matrix)
        assert same_bits(stored.reshape(-1, width), theirs.numpy())
        assert same_bits(scales, their_scales.numpy())
        back = functional.int8_vectorwise_dequant(theirs, their_scales).numpy()
        assert same_bits(formats.as_float32(stored, scales, width).reshape(-1, width), back)


def test_the_rows_above_tell_the_formulas_apart():
    """127/scale in one operation and element·(scale/127) give other bits for some of these rows, so the test above has power."""
    scales = np.abs(rows_of_every_size(8192, 129).reshape(-1, 129)).max(axis=1)
    assert not same_bits(np.float32(127) / scales, plain.factor(scales).ravel())
    levels = np.arange(-127, 128).astype(np.int8)
    matrix = np.tile(levels, (scales.size, 1))
    divided = matrix.astype(np.float32) * (scales / np.float32(127))[:, None]
    assert not same_bits(divided.ravel(), plain.dequantised(matrix.ravel(), scales, levels.size))


@WIDTHS
def test_int8_equals_the_definition(width):
    values = rows_of_every_size(301, width)
    stored, scales = quantise(values, width)
    expected, expected_scales = plain.quantised(values, width)
    assert same_bits(stored, expected) and same_bits(scales, expected_scales)
    assert same_bits(formats.as_float32(stored, scales, width), plain.dequantised(expected, expected_scales, width))


def test_int8_rounds_halves_to_even():
    """A row of scale 127 has the factor 1, so its elements are their own levels."""
    values = np.concatenate([np.arange(-126.5, 127, 1), [127]]).astype(np.float32)
    assert np.float32(1) / np.float32(127) * np.float32(127) == 1
    stored, scales = quantise(values, values.size)
    assert scales == 127
    assert (stored[:-1] % 2 == 0).all() and (np.abs(stored[:-1] - values[:-1]) == 0.5).all()


@WIDTHS
def test_int8_is_within_half_a_level(width):
    """Measured in float64; the 2^-20 allow for the roundings of the float32 arithmetic."""
    values = rows_of_every_size(301, width)
    stored, scales = quantise(values, width)
    error = np.abs(formats.as_float32(stored, scales, width).astype(np.float64) - values).reshape(-1, width)
    assert (error <= scales[:, None].astype(np.float64) / 254 * (1 + 2**-20) + scales[:, None] * 2**-20).all()
    extreme = np.abs(values).reshape(-1, width).argmax(axis=1)
    assert (np.abs(stored.reshape(-1, width)[np.arange(301), extreme]) == 127).all()


@WIDTHS
def test_rows_of_zeros_have_the_scale_zero(width):
    values = normal(5 * width).reshape(5, width)
    values[[0, 2, 4]] = 0
    values[2, ::2] = -0.0
    stored, scales = quantise(values.ravel(), width)
    assert not scales[[0, 2, 4]].any() and scales[[1, 3]].all()
    back = formats.as_float32(stored, scales, width).reshape(5, width)
    assert not stored.reshape(5, width)[[0, 2, 4]].any() and not back[[0, 2, 4]].any()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 9e-37])
def test_rows_too_small_for_a_factor_are_zeros(size):
    values = np.float32(size) * np.array([1, -1, 0.5, 0], np.float32)
    stored, scales = quantise(values, 4)
    assert scales == np.float32(size) and not stored.any()
    assert not formats.as_float32(stored, scales, 4).any()


@WIDTHS
def test_any_slice_can_be_converted_by_itself(width):
    """From any start, of any length, within a row and across rows, given the scales of the whole tensor."""
    stored, scales = plain.quantised(normal(7 * width), width)
    whole = plain.dequantised(stored, scales, width)
    random = np.random.default_rng(width)
    cuts = {(0, 7 * width), (0, 0), (width - 1, 2), (width, width), (7 * width - 1, 1), (2 * width + width // 2, 3 * width)}
    cuts |= {(int(low), int(random.integers(0, 7 * width - low + 1))) for low in random.integers(0, 7 * width, 40)}
    for start, count in cuts:
        count = min(count, 7 * width - start)
        part = formats.as_float32(stored[start : start + count], scales, width, start)
        assert same_bits(part, whole[start : start + count])


@WIDTHS
def test_a_slice_can_be_dequantised_to_bf16(width):
    """The exact value is rounded once."""
    stored, scales = plain.quantised(normal(7 * width), width)
    for start, stop in ((0, 7 * width), (width // 2, 5 * width + width // 2), (7 * width - 1, 7 * width)):
        out = np.empty(stop - start, np.uint16)
        formats.dequantise(out, stored[start:stop], scales=scales, width=width, start=start)
        assert same_bits(out, plain.bf16(plain.dequantised(stored, scales, width)[start:stop]))


@WIDTHS
def test_any_rows_can_be_quantised_by_themselves(width):
    """Their bits are those they have when all rows are quantised, and nothing else is written."""
    values = normal(9 * width)
    expected, expected_scales = plain.quantised(values, width)
    for low, high in ((0, 9), (0, 1), (8, 9), (2, 7)):
        stored, scales = np.full(9 * width, 77, np.int8), np.full(9, 77, np.float32)
        cut = slice(low * width, high * width)
        formats.quantise(stored[cut], scales[low:high], values[cut])
        assert same_bits(stored[cut], expected[cut]) and same_bits(scales[low:high], expected_scales[low:high])
        assert (np.delete(stored, np.r_[cut]) == 77).all() and (np.delete(scales, np.r_[low:high]) == 77).all()


def test_read_only_arrays_are_accepted():
    values = normal(640)
    stored, scales = plain.quantised(values, 64)
    for array in (values, stored, scales):
        array.flags.writeable = False
    assert same_bits(quantise(values, 64)[0], stored)
    assert same_bits(formats.as_float32(stored[3:], scales, 64, 3), plain.dequantised(stored, scales, 64)[3:])
