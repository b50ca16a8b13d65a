"""Layers' files: what the safetensors library sees in them, where everything lies, and that no damage goes unseen."""

import json
import mmap
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from layers import ALONE, STORAGES, Arrays, bits_of, contents, expected, files_of, flip, layout_of, records, same, written
from plain import same_bits
from safetensors import safe_open

from es_lite.errors import UserError
from es_lite.weights import store
from es_lite.weights.layerfile import ALIGNMENT, FileReader, FileWriter, LayerFile
from es_lite.weights.stored import stored_bytes

MODELS = pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
IN_EVERY_STORAGE = pytest.mark.parametrize("storage", STORAGES)


def header(path: Path) -> tuple[int, dict]:
    """Where the tensors begin, and the header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length])


@MODELS
@IN_EVERY_STORAGE
def test_the_safetensors_library_reads_what_was_written(tmp_path, name, storage):
    layout = layout_of(name)
    theta_0, types = Arrays(layout), {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    for file in written(tmp_path, layout, storage):
        values, metadata = contents(file)
        assert same(values, expected(file.layer, theta_0, storage, []))
        assert metadata.keys() == {"format", "layer", "storage", "step", "xxh3"}
        assert [metadata[key] for key in ("format", "layer", "storage", "step")] == ["pt", file.layer.name, storage, "0"]
        with safe_open(file.path, framework="pt") as opened:
            for tensor in file.layer.tensors:
                value = opened.get_tensor(tensor.name)
                kind = "bf16" if storage == "int8" and len(tensor.shape) < 2 else storage
                assert value.dtype == types[kind] and tuple(value.shape) == tensor.shape


@MODELS
def test_bitsandbytes_dequantises_the_int8_files(tmp_path, name):
    """A matrix and its scales under the names that bitsandbytes' linear layers load."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for file in written(tmp_path, layout_of(name), "int8", 2):
        with safe_open(file.path, framework="pt") as opened, FileReader(file) as reader:
            matrices = [tensor for tensor in file.layer.tensors if len(tensor.shape) > 1]
            assert {n for n in opened.keys() if n.endswith("SCB")} == {f"{t.name.removesuffix('weight')}SCB" for t in matrices}  # noqa: SIM118
            for tensor in matrices:
                scales = opened.get_tensor(tensor.name.removesuffix("weight") + "SCB")
                theirs = functional.int8_vectorwise_dequant(opened.get_tensor(tensor.name), scales)
                assert same_bits(theirs.numpy().ravel(), reader.part(tensor, 0, tensor.size).float32())


@MODELS
@IN_EVERY_STORAGE
def test_where_everything_lies(tmp_path, name, storage):
    """One after the other, nothing between; matrices last, and from a multiple of 4096 on."""
    for file in written(tmp_path, layout_of(name), storage):
        start, entries = header(file.path)
        entries.pop("__metadata__")
        places = {key: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for key, entry in entries.items()}
        ends = [start, *(end for _, end in places.values())]
        assert [begin for begin, _ in places.values()] == ends[:-1]
        assert file.path.stat().st_size == file.size == ends[-1]
        order = list(places)
        matrices = [t.name for t in file.layer.tensors if (len(t.shape) > 1 if file.layer.block else t.vocabulary)]
        assert order[len(order) - len(matrices) :] == matrices == [tensor.name for tensor in file.matrices]
        assert [places[key][0] - file.front_bytes for key in matrices] == list(file.offsets.values())
        assert file.front_bytes % 4096 == 0 and (not matrices or places[matrices[0]][0] == file.front_bytes)
        assert file.size - start == stored_bytes(file.layer, storage)


def test_no_step_makes_the_file_another_size(tmp_path):
    file = written(tmp_path, layout_of("tied"), "int8")[1]
    with FileReader(file) as reader:
        front = reader.front
    for step in (0, 9, 10, 2**32 - 1):
        front.step = step
        assert len(file.front(front)) == file.front_bytes
        assert file.parse(file.front(front), file.size).step == step


@MODELS
@IN_EVERY_STORAGE
@pytest.mark.parametrize(("limit", "unit"), [(1, 1), (5000, 1), (20_000, 64), (10**9, 2048)])
def test_sections_are_aligned_and_cover_the_matrices(tmp_path, name, storage, limit, unit):
    """Whole rows, `unit` or a multiple at a time; only a matrix's last section may end anywhere."""
    for file in files_of(tmp_path, layout_of(name), storage):
        sections = file.sections(limit, unit)
        edges = [file.front_bytes, *(section.high for section in sections)]
        assert [section.low for section in sections] == edges[:-1] and edges[-1] == (file.size if sections else file.front_bytes)
        following: dict[str, int] = {}
        for section in sections:
            ((tensor, start, count),) = section.parts
            assert start == following.get(tensor.name, 0)
            following[tensor.name] = start + count
            place = section.low - file.front_bytes - file.offsets[tensor.name]
            assert place % ALIGNMENT == 0 and start % (unit * tensor.width) == 0 and count % tensor.width == 0
            if start + count < tensor.size:
                assert (section.high - section.low) % ALIGNMENT == 0 and count % (unit * tensor.width) == 0
        assert following == {tensor.name: tensor.size for tensor in file.matrices}


@MODELS
@IN_EVERY_STORAGE
def test_a_reader_gives_any_part(tmp_path, name, storage):
    layout = layout_of(name)
    theta_0 = Arrays(layout)
    for file in written(tmp_path, layout, storage, 2):
        wanted = expected(file.layer, theta_0, storage, records(2))
        with FileReader(file) as reader:
            assert reader.front.step == 2
            for tensor in file.layer.tensors:
                stored, scales = wanted[tensor.name]
                for start, count in ((0, tensor.size), (tensor.width // 2, tensor.width // 2), (tensor.size - 3, 3), (1, 0)):
                    part = reader.part(tensor, start, count)
                    assert (part.tensor, part.start) == (tensor, start)
                    assert same_bits(part.data, stored[start : start + count]) and same_bits(part.scales, scales)


def rewritten(file: LayerFile, direct: bool, limit: int, dirt: int) -> bytes:
    """The file again, written in sections from buffers with room for more, which is not written as part of it."""
    old = file.path.read_bytes()
    with FileReader(file) as reader:
        front = reader.front
    writer = FileWriter(file, direct)
    for section in file.sections(limit):
        size = section.high - section.low
        with mmap.mmap(-1, -(-size // ALIGNMENT) * ALIGNMENT) as buffer:
            buffer[:] = bytes([dirt]) * len(buffer)
            buffer[:size] = old[section.low : section.high]
            writer.write(section, memoryview(buffer))
    writer.finish(front, front.step)
    return file.path.read_bytes()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("place", [0, 1, -1])
@IN_EVERY_STORAGE
def test_the_file_is_the_same_however_it_is_written(tmp_path, direct, place, storage):
    """Past the page cache or through it, in whatever sections, whatever lies behind them in memory. Embedding and final layer
    have one matrix, whose sections are aligned; a block's are written together."""
    file = written(tmp_path, layout_of("untied"), storage)[place]
    old = file.path.read_bytes()
    for limit in (1, 30_000, 10**9) if place != 1 else ():
        assert rewritten(file, direct, limit, 0xA5) == old
    assert list(tmp_path.glob("*.next")) == []
    store.check(file)


def test_a_writer_that_gives_up_leaves_the_old_file(tmp_path):
    file = written(tmp_path, layout_of("tied"), "bf16")[1]
    before = bits_of([file])
    writer = FileWriter(file)
    writer.write(file.whole, memoryview(bytearray(file.size)))
    assert file.path.with_name(file.path.name + ".next").exists()
    writer.discard()
    assert bits_of([file]) == before


def seen(file: LayerFile) -> bool:
    """Whether the damage is found, by an error that names the file."""
    try:
        store.check(file)
    except UserError as error:
        return str(file.path) in str(error)
    return False


@pytest.mark.parametrize(
    ("name", "place", "storage"), [("tied", 0, "int8"), ("tied", 1, "bf16"), ("tied", -1, "fp32"), ("gpt2", 0, "int8")]
)
def test_a_bit_that_changed_anywhere_is_found(tmp_path, name, place, storage):
    """Each bit of the header (its length, names, step, checksum, padding), one of each byte of the scales and small tensors,
    and of the matrices some."""
    file = written(tmp_path, layout_of(name), storage, 10)[place]
    store.check(file)
    begin, random = header(file.path)[0], np.random.default_rng(1)
    places = {*range(file.front_bytes), file.size - 1, *(int(p) for p in random.integers(file.front_bytes - 1, file.size, 100))}
    unseen = []
    with file.path.open("r+b", buffering=0) as raw:
        for position in sorted(places):
            byte = os.pread(raw.fileno(), 1, position)
            for bit in range(8) if position < begin else (position % 8,):
                os.pwrite(raw.fileno(), bytes([byte[0] ^ 1 << bit]), position)
                if not seen(file):
                    unseen.append((position, bit))
            os.pwrite(raw.fileno(), byte, position)
    store.check(file)
    front = file.path.read_bytes()
    assert not unseen, {
        front[position : position + 1] + b" in " + front[max(0, position - 9) : position + 9] for position, _ in unseen
    }


@IN_EVERY_STORAGE
def test_a_file_of_another_length_is_found(tmp_path, storage):
    file = written(tmp_path, layout_of("tied"), storage)[1]
    whole = file.path.read_bytes()
    for size in (0, 1, 7, 8, 100, file.front_bytes - 1, file.front_bytes, file.front_bytes + 1, file.size - 4096, file.size - 1):
        file.path.write_bytes(whole[:size])
        assert seen(file)
        with pytest.raises(UserError, match="block-000"):
            store.standing(file)
    file.path.write_bytes(whole + b"\0")
    assert seen(file)
    file.path.write_bytes(bytes(file.size))
    assert seen(file)


def test_a_file_that_is_gone_or_a_folder_is_a_users_error(tmp_path):
    file = files_of(tmp_path, layout_of("tied"), "bf16")[1]
    assert seen(file)
    file.path.mkdir()
    assert seen(file)


@IN_EVERY_STORAGE
def test_the_file_of_another_layer_storage_or_model_is_found(tmp_path, storage):
    """Even where it is of the very same size and whole."""
    layout = layout_of("tied")
    files = written(tmp_path / "here", layout, storage)
    others = [files[2], *(written(tmp_path / other, layout, other)[1] for other in STORAGES if other != storage)]
    others.append(written(tmp_path / "gpt2", layout_of("gpt2"), storage)[1])
    assert files[2].size == files[1].size
    for other in others:
        shutil.copyfile(other.path, files[1].path)
        assert seen(files[1])
        with pytest.raises(UserError, match=str(files[1].path)):
            store.standing(files[1])


@pytest.mark.parametrize(("bit", "step"), [(0, 2), (1, 1), (2, 7)])
def test_a_changed_step_is_a_users_error_wherever_it_leads(tmp_path, bit, step):
    """Also where the records at hand do not reach back so far: in a run, they are those of the last step."""
    layout = layout_of("tied")
    file = written(tmp_path, layout, "bf16", 3)[1]
    flip(file.path, file.path.read_bytes().index(b'"step":"3"') + len('"step":"'), bit)
    assert store.standing(file) == step and seen(file)
    with pytest.raises(UserError, match=str(file.path)):
        store.bring_level(file, Arrays(layout).open, records(4), 4, None, ALONE)
    with pytest.raises(UserError, match=str(file.path)):
        store.bring_level(file, Arrays(layout).open, records(4)[3:], 4, None, ALONE)
