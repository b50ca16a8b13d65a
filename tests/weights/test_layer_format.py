"""The geometry of layer files: where everything is, how matrices are cut into sections, and which fronts are refused."""

import json

import numpy as np
import pytest
import xxhash
from layers import IN_EVERY_STORAGE, MODELS, STORAGES, contents, layout_of, written
from plain import same_bits

from es_lite.algorithm.formats import Storage
from es_lite.files import ALIGNMENT
from es_lite.weights.layer_format import LayerFormat
from es_lite.weights.parts import stored_bytes


def formats_of(name: str, storage: Storage) -> list[LayerFormat]:
    return [LayerFormat(layer, storage) for layer in layout_of(name).layers]


@MODELS
@IN_EVERY_STORAGE
def test_tensors_follow_each_other_and_matrices_begin_at_a_page(tmp_path, name, storage):
    """There are no gaps; the matrices come last."""
    for file in written(tmp_path, layout_of(name), storage):
        data, format = file.path.read_bytes(), file.format
        start = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:start])
        entries.pop("__metadata__")
        places = {key: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for key, entry in entries.items()}
        ends = [start, *(end for _, end in places.values())]
        assert [begin for begin, _ in places.values()] == ends[:-1]
        assert len(data) == format.size == ends[-1]
        order = list(places)
        matrices = [t.name for t in file.layer.tensors if (len(t.shape) > 1 if file.layer.block else t.vocabulary)]
        assert order[len(order) - len(matrices) :] == matrices == [tensor.name for tensor in format.matrices]
        assert {t.name: places[t.name][0] for t in file.layer.tensors} == {t.name: format.offset(t) for t in file.layer.tensors}
        assert format.front_bytes % ALIGNMENT == 0 and (not matrices or places[matrices[0]][0] == format.front_bytes)
        assert format.size - start == stored_bytes(file.layer, storage)
        assert (format.whole.low, format.whole.high, format.whole.bytes) == (
            format.front_bytes,
            format.size,
            format.size - format.front_bytes,
        )
        assert format.whole.parts == tuple((tensor, 0, tensor.size) for tensor in format.matrices)


@MODELS
def test_scales_are_where_the_format_says(tmp_path, name):
    for file in written(tmp_path, layout_of(name), "int8", 2):
        data, values = file.path.read_bytes(), contents(file)[0]
        assert [t.name for t in file.format.scaled] == [t.name for t in file.layer.tensors if len(t.shape) > 1]
        for tensor in file.format.scaled:
            scales = np.frombuffer(data, np.float32, tensor.rows, file.format.scales_offset(tensor))
            assert same_bits(scales, values[tensor.name][1])


@MODELS
@IN_EVERY_STORAGE
@pytest.mark.parametrize(("limit", "unit"), [(1, 1), (5000, 1), (20_000, 64), (10**9, 2048)])
def test_sections_are_aligned_and_cover_the_matrices(name, storage, limit, unit):
    """A section is a multiple of `unit` whole rows; only the last one of a matrix may have any number of rows."""
    for format in formats_of(name, storage):
        sections = format.sections(limit, unit)
        edges = [format.front_bytes, *(section.high for section in sections)]
        assert [section.low for section in sections] == edges[:-1]
        assert edges[-1] == (format.size if sections else format.front_bytes)
        following: dict[str, int] = {}
        for section in sections:
            ((tensor, start, count),) = section.parts
            assert start == following.get(tensor.name, 0)
            following[tensor.name] = start + count
            place = section.low - format.offset(tensor)
            assert place % ALIGNMENT == 0 and start % (unit * tensor.width) == 0 and count % tensor.width == 0
            assert section.bytes == section.high - section.low
            if start + count < tensor.size:
                assert section.bytes % ALIGNMENT == 0 and count % (unit * tensor.width) == 0
        assert following == {tensor.name: tensor.size for tensor in format.matrices}


@IN_EVERY_STORAGE
def test_views_share_the_sections_memory_and_the_fronts_scales(storage):
    for format in formats_of("untied", storage):
        front, data = format.empty_front(), np.zeros(format.whole.bytes, np.uint8)
        for section, shift in ((format.whole, 0), *((s, s.low - format.front_bytes) for s in format.sections(20_000))):
            parts = format.views(section, data[shift : shift + section.bytes], front)
            assert [(part.tensor, part.start, part.data.size) for part in parts] == list(section.parts)
            for part in parts:
                assert np.shares_memory(part.data, data)
                assert part.scales is front.scales_of(part.tensor) and part.scales.size == (
                    part.tensor.rows if storage == "int8" else 0
                )
        assert not data.any()


@IN_EVERY_STORAGE
def test_a_front_is_the_same_after_it_was_written_whatever_its_step(storage):
    """And no step changes its size."""
    format = formats_of("tied", storage)[1]
    front = format.empty_front()
    for index, part in enumerate(front.small.values()):
        part.data[:] = np.arange(part.data.size) + index
    for scales in front.scales.values():
        scales[:] = np.arange(scales.size) + 1
    front.checksum = "0123456789abcdef"
    for step in (0, 9, 10, 2**32 - 1):
        front.step = step
        data = format.serialise(front)
        assert len(data) == format.front_bytes
        read = format.parse(data, format.size)
        assert (read.step, read.checksum) == (step, front.checksum)
        assert read.scales.keys() == front.scales.keys() and read.small.keys() == front.small.keys()
        assert all(same_bits(read.scales[key], front.scales[key]) for key in front.scales)
        assert all(same_bits(read.small[key].data, front.small[key].data) for key in front.small)


def test_a_copy_of_a_front_does_not_follow_it():
    front = LayerFormat(layout_of("gpt2").layers[0], "int8").empty_front()
    front.scales = {key: scales + 1 for key, scales in front.scales.items()}
    copy = front.copy()
    for scales in front.scales.values():
        scales[:] = 7
    for part in front.small.values():
        part.data[:] = 3
        copy.small[part.tensor.name].data[:] = 5
        assert (part.data == 3).all()
    assert copy.scales and all((scales == 1).all() for scales in copy.scales.values())


def test_the_checksum_is_of_the_matrices_the_front_and_what_the_file_claims_to_be():
    format = LayerFormat(layout_of("tied").layers[1], "int8")
    front, matrices = format.empty_front(), xxhash.xxh3_64(b"matrices")
    for part in front.small.values():
        part.data[:] = 0
    first = format.checksum(matrices, front)
    assert format.checksum(matrices, front) == first, "the hash of the matrices has changed"
    found = {first, format.checksum(xxhash.xxh3_64(b"matricez"), front)}
    front.step = 1
    found.add(format.checksum(matrices, front))
    next(iter(front.small.values())).data[0] = 1
    found.add(format.checksum(matrices, front))
    next(iter(front.scales.values()))[0] = 1
    found.add(format.checksum(matrices, front))
    assert len(found) == 5


def test_a_front_that_is_damaged_or_of_another_layer_is_refused_in_words():
    format, second, *_ = formats_of("tied", "bf16")[1:]
    data = format.serialise(format.empty_front())
    assert format.size == second.size
    for other, length, words in (
        (data, format.size - 1, f"has {format.size - 1:,} bytes, but block-000 takes {format.size:,}"),
        (b"\xff" + data[1:], format.size, "its header is damaged, or of another version"),
        (data.replace(b'"step"', b'"stop"'), format.size, "its header is damaged, or of another version"),
        (data.replace(b"{", b"[", 1), format.size, "its header is damaged, or of another version"),
        (b"", format.size, "its header is damaged, or of another version"),
        (
            second.serialise(second.empty_front()),
            format.size,
            "it has block-001 in bf16, but not the tensors of this model's block-000 in bf16",
        ),
        (
            data.replace(b"q_proj", b"p_proj"),
            format.size,
            "it has block-000 in bf16, but not the tensors of this model's block-000 in bf16",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            format.parse(other, length)


def test_formats_of_other_storages_have_other_sizes():
    assert len({LayerFormat(layout_of("tied").layers[1], storage).size for storage in STORAGES}) == len(STORAGES)
