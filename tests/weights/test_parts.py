"""Parts of tensors: their types and scales, and advancing them by records, compared with plain numpy."""

import itertools

import numpy as np
import plain
import pytest
from layers import ALONE, IN_EVERY_STORAGE, STORAGES, records
from plain import same_bits

from es_lite.algorithm.formats import Storage
from es_lite.algorithm.jit import Threads
from es_lite.model.layout import Layer, Tensor
from es_lite.weights.parts import SLICE, Part, dtype_of, scales_of, slices, stored_bytes

MATRIX = Tensor("x.weight", (211, 333), 7, 1.0, 1.0, 1.0)
EXPERTS = Tensor("x.experts", (3, 5, 40), 8, 1.0, 0.5, 1.0)
VECTOR = Tensor("x.bias", (70_001,), 9, 1.0, 1.0, 0.25)
NUMBER = Tensor("x.gate", (), 10, 1.0, 1.0, 1.0)
TENSORS = pytest.mark.parametrize("tensor", [MATRIX, EXPERTS, VECTOR, NUMBER], ids=lambda tensor: tensor.name)


def values_of(tensor: Tensor) -> np.ndarray:
    return 0.05 * np.random.default_rng(tensor.number).standard_normal(tensor.size, np.float32)


def part_of(tensor: Tensor, storage: Storage) -> Part:
    part = Part.empty(tensor, 0, tensor.size, storage)
    part.put(values_of(tensor), ALONE)
    return part


def expected(tensor: Tensor, storage: Storage, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Elements and scales after `count` steps."""
    stored, scales = plain.stored_as(dtype_of(tensor, storage), values_of(tensor), tensor.width)
    for record in records(count):
        pairs, coefficients = record.pairs()
        decay = np.float32(record.decay) * np.float32(tensor.decay_factor)
        place = {"seed": record.seed, "step": record.step, "tensor": tensor.number}
        noise = {"noise": record.noise, "shape": tensor.shape, "pairs": pairs}
        moved = coefficients * np.float32(tensor.coefficient_factor)
        stored, scales = plain.advanced(stored, scales, **place, **noise, coefficients=moved, decay=decay)
    return stored, scales


def test_types_and_sizes():
    """int8 is only for tensors that have rows; a vector is then bfloat16 and has no scales."""
    assert [dtype_of(MATRIX, storage) for storage in STORAGES] == [np.float32, np.uint16, np.int8]
    assert [dtype_of(VECTOR, storage) for storage in STORAGES] == [np.float32, np.uint16, np.uint16]
    assert [dtype_of(NUMBER, storage) for storage in STORAGES] == [np.float32, np.uint16, np.uint16]
    assert [scales_of(MATRIX, storage) for storage in STORAGES] == [0, 0, 211]
    assert scales_of(EXPERTS, "int8") == 15 and scales_of(VECTOR, "int8") == scales_of(NUMBER, "int8") == 0
    layer = Layer(0, "x", (MATRIX, EXPERTS, VECTOR, NUMBER))
    elements = 211 * 333 + 600 + 70_001 + 1
    assert [stored_bytes(layer, storage) for storage in STORAGES] == [
        4 * elements,
        2 * elements,
        211 * 333 + 600 + 4 * (211 + 15) + 2 * 70_002,
    ]


@TENSORS
@IN_EVERY_STORAGE
def test_put_rounds_to_nearest(tensor, storage):
    part = part_of(tensor, storage)
    stored, scales = plain.stored_as(dtype_of(tensor, storage), values_of(tensor), tensor.width)
    assert same_bits(part.data, stored) and same_bits(part.scales, scales) and same_bits(part.own_scales, scales)
    assert same_bits(part.float32(), plain.as_float32(stored, scales, tensor.width))


@TENSORS
@IN_EVERY_STORAGE
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_advances_it_to_the_same_bits(tensor, storage, threads):
    """With the factors of the tensor's group, which are rounded to float32 as the record's numbers are."""
    part, threads = Part.empty(tensor, 0, tensor.size, storage), Threads(threads)
    part.put(values_of(tensor), threads)
    part.advance(records(4), threads)
    stored, scales = expected(tensor, storage, 4)
    assert same_bits(part.data, stored) and same_bits(part.scales, scales)


@TENSORS
@IN_EVERY_STORAGE
def test_steps_together_and_one_at_a_time_have_the_same_bits(tensor, storage):
    together, apart = part_of(tensor, storage), part_of(tensor, storage)
    together.advance(records(5), ALONE)
    for record in records(5):
        apart.advance([record], ALONE)
    assert same_bits(together.data, apart.data) and same_bits(together.scales, apart.scales)


@IN_EVERY_STORAGE
def test_parts_of_whole_rows_make_the_same_tensor(storage):
    """Each part changes only its own elements and, among the scales of the whole tensor, those of its own rows."""
    stored, scales = expected(MATRIX, storage, 3)
    data, all_scales = np.full_like(stored, 77), np.full_like(scales, 77)
    cuts = [0, 1, 2, 50, 210, 211]
    for low, high in itertools.pairwise(cuts):
        cut = slice(low * 333, high * 333)
        part = Part(MATRIX, low * 333, data[cut], all_scales)
        part.put(values_of(MATRIX)[cut], ALONE)
        part.advance(records(3), ALONE)
        assert (data[high * 333 :] == 77).all() and (all_scales[high:] == 77).all()
        assert same_bits(part.float32(), plain.as_float32(stored, scales, 333)[cut])
        assert same_bits(part.own_scales, scales[low:high])
    assert same_bits(data, stored) and same_bits(all_scales, scales)


@TENSORS
@IN_EVERY_STORAGE
def test_a_frozen_tensor_keeps_every_bit(tensor, storage):
    """It gets neither noise nor decay and is not rounded again, whatever its weights are."""
    frozen = Tensor(tensor.name, tensor.shape, tensor.number, 0.0, 0.0, 0.0)
    moving, part = part_of(tensor, storage), part_of(tensor, storage)
    part = Part(frozen, 0, part.data, part.scales)
    moving.advance(records(4), ALONE)
    kept, kept_scales = part.data.copy(), part.scales.copy()
    part.data.flags.writeable = part.scales.flags.writeable = False
    part.advance(records(4), ALONE)
    assert same_bits(part.data, kept) and same_bits(part.scales, kept_scales)
    assert not same_bits(moving.data, kept)


@IN_EVERY_STORAGE
def test_a_tensor_may_decay_without_noise_or_move_without_decay(storage):
    for coefficient_factor, decay_factor in ((0.0, 1.0), (1.0, 0.0)):
        tensor = Tensor("x.weight", (9, 100), 7, 1.0, coefficient_factor, decay_factor)
        part = part_of(tensor, storage)
        before = part.data.copy()
        part.advance(records(3), ALONE)
        stored, scales = expected(tensor, storage, 3)
        assert same_bits(part.data, stored) and same_bits(part.scales, scales)
        assert not same_bits(part.data, before)


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (SLICE,), (2 * SLICE + 3,), (7, SLICE // 3), (3, 2 * SLICE), (5, 7, SLICE // 8)]
)
def test_slices_are_whole_rows_and_cover_the_tensor(shape):
    """No slice has more than SLICE elements, unless it is one row that has."""
    tensor = Tensor("x", shape, 0, 1.0, 1.0, 1.0)
    cut = slices(tensor)
    assert [start for start, _ in cut] == list(np.cumsum([0, *(count for _, count in cut)])[:-1])
    assert sum(count for _, count in cut) == tensor.size
    if len(shape) > 1:
        assert all(start % tensor.width == 0 and count % tensor.width == 0 for start, count in cut)
        assert all(count <= max(SLICE, tensor.width) for _, count in cut)
