"""A layer at a step, read from its file or from θ₀: the same bits in slices and in sections, and nothing is written."""

import numpy as np
import pytest
from layers import (
    ALONE,
    IN_EVERY_STORAGE,
    MODELS,
    Arrays,
    bits_of,
    expected,
    files_of,
    flip,
    layout_of,
    open_files,
    records,
    same,
    written,
)
from plain import as_float32, bf16, same_bits

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.errors import DamagedFile
from es_lite.model.layout import Layout
from es_lite.weights import store
from es_lite.weights.layer_file import LayerFile
from es_lite.weights.parts import slices
from es_lite.weights.reading import LayerReader

STEPS = 4
BEGINNINGS = pytest.mark.parametrize("behind", [None, 0, 2, STEPS], ids=["theta_0", "step 0", "step 2", "the step itself"])
"""What the layers are read from: θ₀, or files at a step."""


def readers(files: list[LayerFile], layout: Layout, behind: int | None, threads: Threads = ALONE) -> list[LayerReader]:
    theta_0 = Arrays(layout)
    if behind is None:
        return [LayerReader.of_theta_0(file.format, theta_0, records(STEPS), threads) for file in files]
    return [LayerReader.of_file(file, records(STEPS)[behind:], STEPS, threads) for file in files]


def files_at(folder, layout: Layout, storage: str, behind: int | None) -> list[LayerFile]:
    return files_of(folder, layout, storage) if behind is None else written(folder, layout, storage, behind)


@MODELS
@IN_EVERY_STORAGE
@BEGINNINGS
def test_every_slice_is_that_of_plain_arithmetic(tmp_path, name, storage, behind):
    """However often it is asked for, and whether or not other slices were read before."""
    layout = layout_of(name)
    theta_0, files = Arrays(layout), files_at(tmp_path, layout, storage, behind)
    before, descriptors = bits_of(files), open_files()
    for file, reader in zip(files, readers(files, layout, behind, Threads(2)), strict=True):
        wanted = expected(file.layer, theta_0, storage, records(STEPS))
        with reader:
            assert [record.step for record in reader.needed] == list(range(behind or 0, STEPS))
            for tensor in file.layer.tensors:
                stored, scales = wanted[tensor.name]
                whole = as_float32(stored, scales, tensor.width)
                some = (tensor.rows // 3 * tensor.width, tensor.rows // 2 * tensor.width)
                for start, count in (*slices(tensor), some, (0, tensor.width), some):
                    part = reader.part(tensor, start, count)
                    first, rows = start // max(1, tensor.width), count // max(1, tensor.width)
                    assert (part.tensor, part.start) == (tensor, start)
                    assert same_bits(part.data, stored[start : start + count])
                    assert same_bits(part.own_scales, scales[first : first + rows])
                    assert same_bits(part.float32(), whole[start : start + count])
    assert bits_of(files) == before and open_files() == descriptors


@MODELS
@IN_EVERY_STORAGE
@BEGINNINGS
@pytest.mark.parametrize("limit", [1, 20_000])
def test_all_sections_and_the_small_tensors_are_the_layer(tmp_path, name, storage, behind, limit):
    """The front's scales follow as sections are read. Slices can still be asked for, and have the same bits as before."""
    layout = layout_of(name)
    theta_0, files = Arrays(layout), files_at(tmp_path, layout, storage, behind)
    before = bits_of(files)
    for file, reader in zip(files, readers(files, layout, behind), strict=True):
        wanted, found = expected(file.layer, theta_0, storage, records(STEPS)), {}
        with reader:
            for tensor in file.format.matrices:
                found[tensor.name] = np.full_like(wanted[tensor.name][0], 77), reader.front.scales_of(tensor)
            for section in file.format.sections(limit):
                ((tensor, start, count),) = section.parts
                for part in reader.section(section, np.empty(section.bytes, np.uint8)):
                    assert (part.tensor, part.start, part.data.size) == (tensor, start, count)
                    found[tensor.name][0][start : start + count] = part.data
            reader.verify()
            found |= {part.tensor.name: (part.data, part.scales) for part in reader.small()}
            assert same(found, wanted)
            assert {name: part.data.tobytes() for name, part in reader.front.small.items()} == {
                tensor.name: wanted[tensor.name][0].tobytes() for tensor in file.format.small
            }
            for tensor in file.layer.tensors:
                part = reader.part(tensor, 0, tensor.size)
                assert same_bits(part.data, wanted[tensor.name][0]) and same_bits(part.scales, wanted[tensor.name][1])
    assert bits_of(files) == before


@IN_EVERY_STORAGE
@BEGINNINGS
def test_the_two_halves_of_a_section_are_the_whole(tmp_path, storage, behind):
    """`load` leaves the bytes as they are stored, `advance` does the rest, and may do it later and in larger memory."""
    layout = layout_of("untied")
    files = files_at(tmp_path, layout, storage, behind)
    for file, halved, whole in zip(files, readers(files, layout, behind), readers(files, layout, behind), strict=True):
        with halved, whole:
            section = file.format.whole
            room, exact = np.empty(section.bytes + 100, np.uint8), np.empty(section.bytes, np.uint8)
            halved.load(section, room)
            if behind is not None:
                assert room[: section.bytes].tobytes() == file.path.read_bytes()[section.low : section.high]
            for part, other in zip(halved.advance(section, room), whole.section(section, exact), strict=True):
                assert same_bits(part.data, other.data) and same_bits(part.scales, other.scales)
            assert same_bits(room[: section.bytes], exact)


@IN_EVERY_STORAGE
def test_the_layers_file_is_preferred_to_theta_0(tmp_path, storage):
    """θ₀ is opened only if there is no file."""
    layout = layout_of("tied")
    theta_0 = Arrays(layout)
    for file in files_of(tmp_path, layout, storage):
        for times in (1, 2):
            with LayerReader.of_either(file, theta_0.open, records(STEPS), 3, ALONE) as reader:
                assert [record.step for record in reader.needed] == [0, 1, 2]
            assert theta_0.opened == times
        theta_0.opened = 0
        store.advance_layer(file, theta_0.open, records(2), 2, None, ALONE)
        theta_0.opened = 0
        with LayerReader.of_either(file, theta_0.open, records(STEPS), 3, ALONE) as reader:
            assert [record.step for record in reader.needed] == [2]
            tensor = file.layer.tensors[0]
            wanted = expected(file.layer, Arrays(layout), storage, records(3))[tensor.name]
            assert same_bits(reader.part(tensor, 0, tensor.size).data, wanted[0])
        assert theta_0.opened == 0


def without(history: list[Record], *steps: int) -> list[Record]:
    return [record for record in history if record.step not in steps]


def test_records_before_the_file_and_after_the_step_are_passed_over(tmp_path):
    file = written(tmp_path, layout_of("tied"), "bf16", 1)[1]
    for history, step, needed in (
        (records(5), 4, [1, 2, 3]),
        (records(5)[1:], 4, [1, 2, 3]),
        (records(5), 1, []),
        ([], 1, []),
        (without(records(5), 0, 4), 4, [1, 2, 3]),
    ):
        with LayerReader.of_file(file, history, step, ALONE) as reader:
            assert [record.step for record in reader.needed] == needed


@pytest.mark.parametrize(
    "history",
    [
        records(4)[2:],
        records(3),
        without(records(4), 2),
        [],
        [*records(4), records(4)[1]],
        records(4)[::-1],
    ],
    ids=["too late", "too few", "a gap", "none", "one twice", "in reverse"],
)
@pytest.mark.parametrize("behind", [None, 1], ids=["theta_0", "file"])
def test_records_that_do_not_lead_to_the_step_are_refused(tmp_path, behind, history):
    """Applying them would make a layer that no run has."""
    layout = layout_of("tied")
    file = files_at(tmp_path, layout, "bf16", behind)[1]
    theta_0, descriptors = Arrays(layout), open_files()
    with pytest.raises(DamagedFile, match=str(file.path)):
        LayerReader.of_either(file, theta_0.open, history, 4, ALONE)
    assert open_files() == descriptors


@pytest.mark.parametrize("where", ["scales", "matrices"])
@pytest.mark.parametrize("behind", [2, STEPS])
def test_damage_is_found_when_all_sections_have_been_read(tmp_path, behind, where):
    file = written(tmp_path, layout_of("tied"), "int8", behind)[1]
    flip(file.path, {"scales": file.format.scales_offset(file.format.scaled[0]), "matrices": file.format.size - 5}[where])
    with LayerReader.of_file(file, records(STEPS), STEPS, ALONE) as reader:
        for section in file.format.sections(5000):
            reader.section(section, np.empty(section.bytes, np.uint8))
        with pytest.raises(DamagedFile, match=f"{file.path}: its checksum does not match"):
            reader.verify()


def test_theta_0_in_bf16_passes_a_bf16_store_unchanged(tmp_path):
    """Rounding is to nearest, so a model that is in bfloat16 already keeps its bits at step 0."""
    layout = layout_of("tied")
    theta_0 = Arrays(layout)
    for name, values in theta_0.values.items():
        theta_0.values[name] = as_float32(bf16(values), values[:0], 1)
    for file in files_of(tmp_path, layout, "bf16"):
        store.advance_layer(file, theta_0.open, [], 0, None, ALONE)
        with LayerReader.of_file(file, [], 0, ALONE) as reader:
            assert all(same_bits(reader.part(t, 0, t.size).float32(), theta_0.values[t.name]) for t in file.layer.tensors)
