"""Layer files: what the safetensors library sees in them, reading and replacing them; no damage stays unnoticed."""

import errno
import mmap
import os
import shutil
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import pytest
import torch
from layers import (
    ALONE,
    IN_EVERY_STORAGE,
    MODELS,
    STORAGES,
    Arrays,
    bits_of,
    contents,
    expected,
    files_of,
    flip,
    layout_of,
    open_files,
    records,
    same,
    written,
)
from plain import same_bits
from safetensors import safe_open

from es_lite.errors import DamagedFile
from es_lite.files import aligned, next_to
from es_lite.weights import store
from es_lite.weights.layer_file import FileReader, FileWriter, LayerFile
from es_lite.weights.layer_format import LayerFormat, Section


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
    """A matrix and its scales have the names that bitsandbytes' linear layers load."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for file in written(tmp_path, layout_of(name), "int8", 2):
        with safe_open(file.path, framework="pt") as opened, closing(FileReader(file)) as reader:
            matrices = [tensor for tensor in file.layer.tensors if len(tensor.shape) > 1]
            assert {n for n in opened.keys() if n.endswith("SCB")} == {f"{t.name.removesuffix('weight')}SCB" for t in matrices}  # noqa: SIM118
            for tensor in matrices:
                scales = opened.get_tensor(tensor.name.removesuffix("weight") + "SCB")
                theirs = functional.int8_vectorwise_dequant(opened.get_tensor(tensor.name), scales)
                assert same_bits(theirs.numpy().ravel(), reader.part(tensor, 0, tensor.size).float32())


@MODELS
@IN_EVERY_STORAGE
def test_a_reader_returns_any_part(tmp_path, name, storage):
    """Elements anywhere; the scales are those of whole rows."""
    layout = layout_of(name)
    theta_0 = Arrays(layout)
    for file in written(tmp_path, layout, storage, 2):
        wanted = expected(file.layer, theta_0, storage, records(2))
        with closing(FileReader(file)) as reader:
            assert reader.front.step == 2
            for tensor in file.layer.tensors:
                stored, scales = wanted[tensor.name]
                for start, count in ((0, tensor.size), (tensor.width // 2, tensor.width // 2), (tensor.size - 3, 3), (1, 0)):
                    part = reader.part(tensor, start, count)
                    assert (part.tensor, part.start) == (tensor, start)
                    assert same_bits(part.data, stored[start : start + count]) and part.scales.size == scales.size
                for first, last in ((0, tensor.rows), (tensor.rows // 3, tensor.rows // 2), (tensor.rows - 1, tensor.rows)):
                    part = reader.part(tensor, first * tensor.width, (last - first) * tensor.width)
                    assert same_bits(part.data, stored[first * tensor.width : last * tensor.width])
                    assert same_bits(part.own_scales, scales[first:last])


@pytest.mark.parametrize("direct", [False, True])
@IN_EVERY_STORAGE
def test_a_reader_returns_sections_and_verifies_them(tmp_path, storage, direct):
    for file in written(tmp_path, layout_of("untied"), storage, 2):
        data, descriptors = file.path.read_bytes(), open_files()
        for sections in ([file.format.whole], *([] if file.layer.block else [file.format.sections(20_000)])):
            with closing(FileReader(file, direct)) as reader, mmap.mmap(-1, aligned(file.format.size)) as memory:
                for section in sections:
                    out = np.frombuffer(memory, np.uint8)[: aligned(section.bytes)]
                    reader.read_section(section, out)
                    assert out[: section.bytes].tobytes() == data[section.low : section.high]
                    del out
                reader.front.step += 1  # it belongs to the caller; what is verified is what was read
                for part in reader.front.small.values():
                    part.data[:] = 0
                for scales in reader.front.scales.values():
                    scales[:] = 0
                reader.verify()
        assert open_files() == descriptors


def rewritten(file: LayerFile, direct: bool, sections: Sequence[Section], dirt: int) -> bytes:
    """The file after it has been written again, from buffers in which bytes of value `dirt` follow the section."""
    old = file.path.read_bytes()
    front = file.front()
    writer = FileWriter(file, direct)
    for section in sections:
        with mmap.mmap(-1, aligned(section.bytes)) as buffer:
            buffer[:] = bytes([dirt]) * len(buffer)
            buffer[: section.bytes] = old[section.low : section.high]
            writer.write(section, memoryview(buffer))
    writer.finish(front, front.step)
    return file.path.read_bytes()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("place", [0, 1, -1], ids=["embedding", "block", "final"])
@IN_EVERY_STORAGE
def test_the_file_is_the_same_however_it_is_written(tmp_path, direct, place, storage):
    """Past the page cache or through it, in sections of any size, whatever follows them in memory. The sections of embedding
    and final layer, which have one matrix, are aligned; a block's matrices are written together."""
    file = written(tmp_path, layout_of("untied"), storage)[place]
    old = file.path.read_bytes()
    for limit in (1, 30_000, 10**9):
        sections = [file.format.whole] if file.layer.block else file.format.sections(limit)
        assert rewritten(file, direct, sections, 0xA5) == old
    assert list(tmp_path.glob("*.next")) == []
    file.check(direct)


def test_a_writer_that_is_discarded_leaves_the_old_file(tmp_path):
    file = written(tmp_path, layout_of("tied"), "bf16")[1]
    before, descriptors = bits_of([file]), open_files()
    writer = FileWriter(file)
    writer.write(file.format.whole, memoryview(bytearray(file.format.size)))
    assert next_to(file.path).exists()
    writer.discard()
    assert bits_of([file]) == before and open_files() == descriptors


def noticed(file: LayerFile) -> bool:
    """Whether the damage is found, by an error that names the file."""
    try:
        file.check()
    except DamagedFile as error:
        return str(error).startswith(f"{file.path}: ")
    return False


@pytest.mark.parametrize(
    ("name", "place", "storage"), [("tied", 0, "int8"), ("tied", 1, "bf16"), ("tied", -1, "fp32"), ("gpt2", 0, "int8")]
)
def test_a_bit_that_changed_anywhere_is_noticed(tmp_path, name, place, storage):
    """Every bit of the header (its length, names, step, checksum, padding), one of every byte of the scales and small tensors,
    and some of the matrices."""
    file = written(tmp_path, layout_of(name), storage, 10)[place]
    file.check()
    front_bytes, size = file.format.front_bytes, file.format.size
    whole, random = file.path.read_bytes(), np.random.default_rng(1)
    header_end = 8 + int.from_bytes(whole[:8], "little")
    places = {*range(front_bytes), size - 1, *(int(p) for p in random.integers(front_bytes - 1, size, 100))}
    unnoticed = []
    with file.path.open("r+b", buffering=0) as raw:
        for position in sorted(places):
            byte = os.pread(raw.fileno(), 1, position)
            for bit in range(8) if position < header_end else (position % 8,):
                os.pwrite(raw.fileno(), bytes([byte[0] ^ 1 << bit]), position)
                if not noticed(file):
                    unnoticed.append((position, bit))
            os.pwrite(raw.fileno(), byte, position)
    file.check()
    assert not unnoticed, {
        whole[position : position + 1] + b" in " + whole[max(0, position - 9) : position + 9] for position, _ in unnoticed
    }


@IN_EVERY_STORAGE
def test_a_file_of_another_length_is_noticed(tmp_path, storage):
    file = written(tmp_path, layout_of("tied"), storage)[1]
    whole, front_bytes, size = file.path.read_bytes(), file.format.front_bytes, file.format.size
    for length in (0, 1, 7, 8, 100, front_bytes - 1, front_bytes, front_bytes + 1, size - 4096, size - 1):
        file.path.write_bytes(whole[:length])
        assert noticed(file)
        with pytest.raises(DamagedFile, match="block-000"):
            file.front()
    file.path.write_bytes(whole + b"\0")
    assert noticed(file)
    file.path.write_bytes(bytes(size))
    assert noticed(file)


def test_a_file_that_is_missing_or_a_folder_is_noticed(tmp_path):
    file, descriptors = files_of(tmp_path, layout_of("tied"), "bf16")[1], open_files()
    for _ in range(2):
        assert noticed(file)
        with pytest.raises(DamagedFile, match=f"{file.path}: cannot be read"):
            FileReader(file)
        file.path.mkdir(exist_ok=True)
    assert open_files() == descriptors


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    file = written(tmp_path, layout_of("tied"), "bf16")[1]
    with closing(FileReader(file)) as reader:
        os.truncate(file.path, file.format.size - 1)
        with pytest.raises(DamagedFile, match=f"{file.path}: cannot be read \\(the file is truncated\\)"):
            reader.part(file.format.matrices[-1], 0, file.format.matrices[-1].size)


def test_a_disk_that_cannot_read_is_noticed(tmp_path, monkeypatch):
    file = written(tmp_path, layout_of("tied"), "bf16")[1]

    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with closing(FileReader(file)) as reader:
        monkeypatch.setattr(os, "preadv", preadv)
        failed = f"{file.path}: cannot be read \\({os.strerror(errno.EIO)}\\)"
        section, tensor = file.format.whole, file.format.matrices[0]
        with pytest.raises(DamagedFile, match=failed):
            reader.part(tensor, 0, tensor.size)
        with pytest.raises(DamagedFile, match=failed):
            reader.read_section(section, np.empty(section.bytes, np.uint8))
        with pytest.raises(DamagedFile, match=failed):
            file.check()


@IN_EVERY_STORAGE
def test_the_file_of_another_layer_storage_or_model_is_noticed(tmp_path, storage):
    """Even if it is intact and of the same size."""
    layout = layout_of("tied")
    files = written(tmp_path / "here", layout, storage)
    others = [files[2], *(written(tmp_path / other, layout, other)[1] for other in STORAGES if other != storage)]
    others.append(written(tmp_path / "gpt2", layout_of("gpt2"), storage)[1])
    assert files[2].format.size == files[1].format.size
    for other in others:
        shutil.copyfile(other.path, files[1].path)
        assert noticed(files[1])
        with pytest.raises(DamagedFile, match=str(files[1].path)):
            files[1].front()


@pytest.mark.parametrize(("bit", "step"), [(0, 2), (1, 1), (2, 7)])
def test_a_changed_step_is_noticed_wherever_it_leads(tmp_path, bit, step):
    """Also if the records at hand do not go back that far: in a run, they are those of the last step."""
    layout = layout_of("tied")
    file = written(tmp_path, layout, "bf16", 3)[1]
    flip(file.path, file.path.read_bytes().index(b'"step":"3"') + len('"step":"'), bit)
    assert file.front().step == step and noticed(file)
    with pytest.raises(DamagedFile, match=str(file.path)):
        store.advance_layer(file, Arrays(layout).open, records(4), 4, None, ALONE)
    with pytest.raises(DamagedFile, match=str(file.path)):
        store.advance_layer(file, Arrays(layout).open, records(4)[3:], 4, None, ALONE)


def test_the_format_is_not_of_a_path(tmp_path):
    """The same format serves a file anywhere."""
    file = written(tmp_path, layout_of("tied"), "int8", 1)[1]
    moved = LayerFile(tmp_path / "elsewhere", LayerFormat(file.layer, "int8"))
    assert not moved.exists() and file.exists()
    file.path.rename(moved.path)
    assert moved.exists() and moved.layer == file.layer and moved.front().step == 1
    moved.check()
