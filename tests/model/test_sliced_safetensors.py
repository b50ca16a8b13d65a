"""safetensors files in slices: the library reads what is written, any slice is read, and damaged files are refused."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from es_lite.errors import DamagedFile, UserError
from es_lite.model.sliced_safetensors import Reader, Writer, open_tensors

SHAPES = {"a.weight": (7, 5), "b": (3,), "scalar": (), "c.weight": (2, 3, 4)}
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def write(path: Path, values: dict[str, torch.Tensor], dtype: str) -> None:
    with Writer(path, SHAPES, dtype, {"format": "pt", "step": "12"}) as writer:
        for tensor in values.values():
            writer.write(tensor.numpy().ravel())


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_library_loads_what_was_written(tmp_path, dtype):
    values = tensors()
    write(tmp_path / "x.safetensors", values, dtype)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == values.keys()
    for name, tensor in values.items():
        assert loaded[name].dtype == TYPES[dtype] and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor.to(TYPES[dtype]))


def test_slices_of_any_length_make_the_same_file(tmp_path):
    values = np.arange(71, dtype=np.float32)
    for length in (1, 5, 70, 71):
        with Writer(tmp_path / f"{length}", {"x": (71,)}, "F32", {}) as writer:
            for low in range(0, 71, length):
                writer.write(values[low : low + length])
    assert len({(tmp_path / f"{length}").read_bytes() for length in (1, 5, 70, 71)}) == 1


def test_metadata_and_places_are_read_back(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, tensors(), "F32")
    entries, metadata = open_tensors(path)
    assert metadata == {"format": "pt", "step": "12"}
    assert {name: entry.shape for name, entry in entries.items()} == SHAPES
    assert all(entry.dtype == "F32" and entry.file == path and entry.offset % 4 == 0 for entry in entries.values())


@pytest.mark.parametrize("dtype", TYPES)
def test_any_slice_is_read(tmp_path, dtype):
    values = tensors(TYPES[dtype])
    save_file(values, tmp_path / "x.safetensors")
    entries, metadata = open_tensors(tmp_path / "x.safetensors")
    assert metadata == {}
    reader = Reader()
    for name, tensor in values.items():
        flat = tensor.float().numpy().ravel()
        for start in range(flat.size + 1):
            for count in range(flat.size - start + 1):
                part = reader.float32(entries[name], start, count)
                assert part.dtype == np.float32 and part.tobytes() == flat[start : start + count].tobytes()
    reader.close()


@pytest.mark.parametrize("dtype", TYPES)
def test_raw_returns_the_stored_bytes(tmp_path, dtype):
    values = tensors(TYPES[dtype])
    save_file(values, tmp_path / "x.safetensors")
    entry = open_tensors(tmp_path / "x.safetensors")[0]["a.weight"]
    assert (
        Reader().raw(entry, 3, 20).tobytes()
        == values["a.weight"].view(torch.uint8).numpy().tobytes()[3 * entry_size(dtype) : 23 * entry_size(dtype)]
    )


def entry_size(dtype: str) -> int:
    return TYPES[dtype].itemsize


def test_a_reader_reads_from_several_files_in_turns(tmp_path):
    reader, entries = Reader(), []
    for number in range(3):
        save_file({"x": torch.full((4,), float(number))}, tmp_path / f"{number}.safetensors")
        entries.append(open_tensors(tmp_path / f"{number}.safetensors")[0]["x"])
    for number in (0, 1, 0, 2, 2):
        assert reader.float32(entries[number], 1, 2).tolist() == [number, number]
    reader.close()


def test_a_type_that_cannot_be_used_is_refused_by_name(tmp_path):
    save_file({"x": torch.zeros(4, dtype=torch.int8)}, tmp_path / "x.safetensors")
    entry = open_tensors(tmp_path / "x.safetensors")[0]["x"]
    with pytest.raises(UserError, match=r"x\.safetensors.*I8"):
        Reader().raw(entry, 0, 1)


def refused(path: Path, data: bytes) -> None:
    """Asserts that a file of these bytes is an error that names it."""
    path.write_bytes(data)
    with pytest.raises(DamagedFile) as error:
        open_tensors(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, tensors(), "F32")
    whole = path.read_bytes()
    for size in range(len(whole)):
        refused(path, whole[:size])


def test_a_file_that_is_too_long_is_refused(tmp_path):
    write(tmp_path / "x.safetensors", tensors(), "F32")
    refused(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").read_bytes() + b"\0")


def framed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(offsets: list[int], shape: list[int] | None = None, dtype: str = "F32") -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02pickle",
        framed(b"not json"),
        framed(b"[1, 2]"),
        framed(b'{"x": 5}'),
        framed(b'{"x": {"dtype": "F32"}}'),
        framed(b'{"x'),
        framed(b"\xff\xfe{}"),
        (2**63).to_bytes(8, "little") + b"{}",
        framed(entry([0, 800]), bytes(8)),
        framed(entry([8, 0]), bytes(8)),
        framed(entry([-8, 0]), bytes(8)),
        framed(entry([0, 8], [3]), bytes(8)),
        framed(entry([0, 8], dtype="F31"), bytes(8)),
        framed(entry([4, 12]), bytes(12)),
    ],
    ids=str,
)
def test_a_malformed_file_is_refused(tmp_path, data):
    refused(tmp_path / "x.safetensors", data)


def test_a_well_formed_file_made_in_the_same_way_is_accepted(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(framed(entry([0, 8]), np.array([1, 2], "<f4").tobytes()))
    found = open_tensors(tmp_path / "x.safetensors")[0]["x"]
    assert Reader().float32(found, 0, 2).tolist() == [1, 2]


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path / "x.safetensors")):
        open_tensors(tmp_path / "x.safetensors")


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        open_tensors(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(100)}, path)
    entry = open_tensors(path)[0]["x"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedFile, match=f"{path}: .*the file is truncated"):
        Reader().raw(entry, 0, 100)


@pytest.fixture
def old(tmp_path) -> Path:
    """A folder with one good file, x."""
    with Writer(tmp_path / "x", {"x": (2,)}, "F32", {"step": "1"}) as writer:
        writer.write(np.ones(2, np.float32))
    return tmp_path / "x"


def only_the_old_one_is_left(old: Path, before: bytes) -> None:
    """Asserts that the file is as it was, alone in its folder."""
    assert [path.name for path in old.parent.iterdir()] == ["x"]
    assert old.read_bytes() == before


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(old):
    before = old.read_bytes()
    with pytest.raises(KeyError), Writer(old, {"x": (2,)}, "F32", {"step": "2"}) as writer:
        writer.write(np.zeros(1, np.float32))
        raise KeyError
    only_the_old_one_is_left(old, before)


def test_a_block_that_raises_after_the_last_byte_does_too(old):
    before = old.read_bytes()
    with pytest.raises(KeyError), Writer(old, {"x": (2,)}, "F32", {"step": "2"}) as writer:
        writer.write(np.zeros(2, np.float32))
        raise KeyError
    only_the_old_one_is_left(old, before)


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_whose_length_is_not_what_its_header_says_is_never_put_in_place(old, count):
    before = old.read_bytes()
    with pytest.raises(AssertionError, match="fewer or more bytes"), Writer(old, {"x": (2,)}, "F32", {}) as writer:
        writer.write(np.zeros(count, np.float32))
    only_the_old_one_is_left(old, before)


def test_the_old_file_is_there_until_the_block_ends(old):
    before = old.read_bytes()
    with Writer(old, {"x": (2,)}, "F32", {}) as writer:
        writer.write(np.zeros(2, np.float32))
        assert old.read_bytes() == before
    assert old.read_bytes() != before
    assert [path.name for path in old.parent.iterdir()] == ["x"]


@pytest.mark.parametrize("limit", [10, 4096], ids=["in the header", "in the data"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(old, limit):
    """A limit on the size of files acts as the full disk: the write that crosses it is short, the next one fails."""
    before = old.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError), Writer(old, {"x": (5000,)}, "F32", {}) as writer:
            writer.write(np.zeros(5000, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    only_the_old_one_is_left(old, before)
