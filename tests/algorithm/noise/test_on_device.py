"""The noise and the perturbation by torch operations against the numpy definitions: on the CPU, and on a GPU if there is one."""

import numpy as np
import plain
import pytest
import torch
from plain import EVERY_KIND

from es_lite.algorithm.noise import on_device, philox
from es_lite.algorithm.noise.kinds import FULL, NoiseKind
from es_lite.algorithm.noise.place import Place

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
DEVICES = pytest.mark.parametrize("device", [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=NO_GPU)], ids=str)
COMPUTE = pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32], ids=str)
FIRST = pytest.mark.parametrize("first", [0, 8, 8 * 100_003, 8 * (2**28 - 3)])
SIGNS = pytest.mark.parametrize("count", [1, 2], ids=["plus", "plus-minus"])
PLACE = Place(seed=0xFEDCBA9876543210, step=2**32 - 7, pair=4, tensor=290)
EXTREME = Place(seed=2**64 - 1, step=2**32 - 1, pair=2**32 - 1, tensor=2**32 - 1)
SIGMA = 1.2345678e-3


def normal(count: int) -> np.ndarray:
    return 0.05 * np.random.default_rng(count).standard_normal(count, np.float32)


def bits(values: torch.Tensor | np.ndarray) -> bytes:
    if isinstance(values, torch.Tensor):
        values = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).cpu().contiguous().numpy()
    return values.tobytes()


def arrays(compute: torch.dtype, count: int, size: int) -> list[np.ndarray]:
    """Outputs for the kernels: uint16 stands for bfloat16."""
    return [np.empty(size, np.uint16 if compute == torch.bfloat16 else np.float32) for _ in range(count)]


def perturbed_by_kernel(
    noise: NoiseKind, compute: torch.dtype, count: int, stored: np.ndarray, shape: tuple[int, ...], **slice_of
) -> list[bytes]:
    outs = arrays(compute, count, stored.size)
    noise.perturb(outs[0], outs[1] if count == 2 else None, stored, PLACE, SIGMA, shape, **slice_of)
    return [bits(out) for out in outs]


@DEVICES
@FIRST
@pytest.mark.parametrize("place", [PLACE, EXTREME], ids=["any", "extreme"])
def test_words(device, first, place):
    counters = torch.arange(first // 8, first // 8 + 77, device=device)
    expected = philox.words((counters.cpu().numpy(), place.tensor, place.pair, place.step), place.key)
    assert on_device.philox4x32(counters, place).tolist() == expected.tolist()


@DEVICES
@FIRST
def test_lanes(device, first):
    elements = torch.arange(first, first + 8 * 77, device=device)
    assert on_device.lanes(elements, PLACE).tolist() == philox.lanes(PLACE, first, 8 * 77).tolist()


@DEVICES
@FIRST
@pytest.mark.parametrize("noise", FULL.values(), ids=FULL)
def test_the_noise_equals_its_definition(device, first, noise):
    elements = torch.arange(first, first + 8 * 77, device=device)
    assert bits(noise.epsilon_on_device(elements, PLACE, ())) == bits(noise.epsilon(PLACE, (), first, 8 * 77))


@DEVICES
@EVERY_KIND
@pytest.mark.parametrize("shape", [(77, 56), (56, 77), (4312,), (11, 7, 56)], ids=str)
def test_the_noise_of_a_tensor_equals_its_definition(device, noise, shape):
    for first, count in ((0, 4312), (8, 8), (1504, 800)):
        elements = torch.arange(first, first + count, device=device)
        assert bits(noise.epsilon_on_device(elements, PLACE, shape)) == bits(noise.epsilon(PLACE, shape, first, count))


@DEVICES
@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("first", [0, 1, 13, 64])
def test_as_float32(device, width, first):
    stored, scales = plain.quantised(normal(20 * width), width)
    first = min(first, stored.size)
    there = torch.from_numpy(stored[first:]).to(device), torch.from_numpy(scales).to(device)
    assert bits(on_device.as_float32(*there, width, first)) == bits(plain.dequantised(stored, scales, width)[first:])


@DEVICES
@EVERY_KIND
@COMPUTE
@SIGNS
@pytest.mark.parametrize(
    ("shape", "start", "length"),
    [
        ((9, 10, 61), 0, 8),
        ((90, 61), 0, 5490),
        ((90, 61), 13, 5003),
        ((3, 1830), 2047, 1),
        ((3, 1830), 8, 4096),
        ((5490,), 13, 5003),
    ],
    ids=str,
)
def test_perturbed_bfloat16_equals_the_kernels(device, noise, compute, count, shape, start, length, monkeypatch):
    """Chunks, and the slice, begin and end within rows and within groups of 8."""
    monkeypatch.setattr(on_device, "CHUNK", 1000)
    stored = plain.bf16(normal(length))
    outs = [torch.empty(length, dtype=compute, device=device) for _ in range(count)]
    there = torch.from_numpy(stored).view(torch.bfloat16).to(device)
    on_device.perturb(outs, there, None, shape, start, noise.epsilon_on_device, PLACE, SIGMA)
    assert [bits(out) for out in outs] == perturbed_by_kernel(noise, compute, count, stored, shape, start=start)


@DEVICES
@EVERY_KIND
@COMPUTE
@SIGNS
@pytest.mark.parametrize("width", [1, 24, 27, 1003])
@pytest.mark.parametrize("row", [0, 3])
def test_perturbed_int8_equals_the_kernels(device, noise, compute, count, width, row, monkeypatch):
    """Whole rows from some row on, with their scales only; chunks end within rows."""
    monkeypatch.setattr(on_device, "CHUNK", 1000)
    values = normal(60 * width).reshape(60, width) * np.geomspace(0.1, 10, 60, dtype=np.float32)[:, None]
    stored, scales = plain.quantised(values.ravel(), width)
    start, shape = row * width, (60, width)
    outs = [torch.empty(stored.size - start, dtype=compute, device=device) for _ in range(count)]
    there = torch.from_numpy(stored[start:]).to(device), torch.from_numpy(scales[row:]).to(device)
    on_device.perturb(outs, *there, shape, start, noise.epsilon_on_device, PLACE, SIGMA)
    expected = perturbed_by_kernel(noise, compute, count, stored[start:], shape, start=start, scales=scales)
    assert [bits(out) for out in outs] == expected
    wrong = perturbed_by_kernel(noise, compute, count, stored[start:], shape, start=start, scales=np.roll(scales, 1))
    assert expected != wrong, "the rows' scales must differ for this test to have power"


@DEVICES
@EVERY_KIND
@COMPUTE
@SIGNS
@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_perturbed_rows_equal_the_kernels(device, noise, compute, count, storage, monkeypatch):
    """The elements of some rows, in any order, one of them twice."""
    monkeypatch.setattr(on_device, "CHUNK", 40)  # a chunk ends within a row
    width, rows = 24, np.array([49, 0, 3, 4, 3], np.int64)
    values = normal(50 * width)
    if storage == "int8":
        stored, all_scales = plain.quantised(values, width)
        scales, there = all_scales[rows], torch.from_numpy(all_scales[rows]).to(device)
    else:
        stored, scales, there = plain.bf16(values), np.empty(0, np.float32), None
    some = stored.reshape(50, width)[rows]
    elements = torch.from_numpy((rows[:, None] * width + np.arange(width)).ravel()).to(device)
    numbers = torch.from_numpy(some.ravel())
    numbers = (numbers if storage == "int8" else numbers.view(torch.bfloat16)).to(device)
    outs = [torch.empty(rows.size * width, dtype=compute, device=device) for _ in range(count)]
    on_device.perturb(outs, numbers, there, (50, width), elements, noise.epsilon_on_device, PLACE, SIGMA)

    expected = [array.reshape(rows.size, width) for array in arrays(compute, count, rows.size * width)]
    minus = expected[1] if count == 2 else None
    noise.perturb_rows(expected[0], minus, some, rows, PLACE, SIGMA, (50, width), scales=scales)
    assert [bits(out) for out in outs] == [bits(out) for out in expected]
