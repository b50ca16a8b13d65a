"""Bringing layers level: from θ₀ or a file, in one go or in many, the same bits; and what is left when the disk is full."""

import errno
import os
from collections.abc import Callable

import numpy as np
import pytest
from layers import (
    ALONE,
    STORAGES,
    Arrays,
    bits_of,
    contents,
    expected,
    files_of,
    flip,
    layout_of,
    records,
    same,
    working_copy,
    written,
)
from plain import as_float32, bf16, same_bits, stored_as

from es_lite.algorithm.jit import Threads
from es_lite.errors import RunError, UserError
from es_lite.weights import store
from es_lite.weights.layerfile import FileReader, LayerFile
from es_lite.weights.layout import Layout
from es_lite.weights.stored import dtype_of, slices

MODELS = pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
IN_EVERY_STORAGE = pytest.mark.parametrize("storage", STORAGES)
STEPS = 4


def never() -> Arrays:
    raise AssertionError("θ₀ is not needed where there is a file")


@MODELS
@IN_EVERY_STORAGE
def test_a_layer_is_what_plain_arithmetic_makes_of_theta_0_and_the_records(tmp_path, name, storage):
    layout = layout_of(name)
    theta_0 = Arrays(layout)
    for file in files_of(tmp_path, layout, storage):
        assert store.standing(file) == 0
        store.bring_level(file, theta_0.open, records(STEPS), STEPS, None, Threads(2))
        assert store.standing(file) == STEPS
        assert same(contents(file)[0], expected(file.layer, theta_0, storage, records(STEPS)))


@MODELS
@IN_EVERY_STORAGE
def test_every_way_to_a_step_makes_the_same_file(tmp_path, monkeypatch, name, storage):
    """At once from θ₀, by way of θ₀'s own file, a step at a time, two and two, and in small sections."""
    layout = layout_of(name)
    wanted = bits_of(written(tmp_path / "at-once", layout, storage, STEPS))
    for index, stops in enumerate([[0, STEPS], [1, 2, 3, STEPS], [2, STEPS]]):
        files, theta_0 = files_of(tmp_path / f"{index}", layout, storage), Arrays(layout)
        monkeypatch.setattr(store, "SECTION_BYTES", (1, 20_000, 2**22)[index])
        for file in files:
            done = 0
            for step in stops:
                store.bring_level(
                    file, theta_0.open if not done and step == stops[0] else never, records(step)[done:], step, None, ALONE
                )
                done = step
        assert theta_0.opened == len(files)
        assert bits_of(files) == wanted


@IN_EVERY_STORAGE
def test_doing_it_again_changes_nothing(tmp_path, storage):
    """A layer that stands there already is read, checked and not written; records before its step are passed over."""
    files = written(tmp_path, layout_of("untied"), storage, STEPS)
    before = bits_of(files)
    for file in files:
        inode = file.path.stat().st_ino
        store.bring_level(file, never, records(STEPS), STEPS, None, ALONE)
        store.bring_level(file, never, [], STEPS, None, ALONE)
        assert file.path.stat().st_ino == inode
    assert bits_of(files) == before


@MODELS
@pytest.mark.parametrize(("storage", "kept"), [("fp32", "bf16"), ("fp32", "int8"), ("bf16", "bf16"), ("int8", "int8")])
@pytest.mark.parametrize("fresh", [True, False])
def test_the_working_copy_is_the_layer_rounded_to_nearest(tmp_path, monkeypatch, name, storage, kept, fresh):
    """As it is where both are stored alike; also when the file stood there already, and in sections."""
    layout = layout_of(name)
    theta_0 = Arrays(layout)
    monkeypatch.setattr(store, "SECTION_BYTES", 5000)
    files = files_of(tmp_path, layout, storage) if fresh else written(tmp_path, layout, storage, STEPS)
    with working_copy(layout, kept) as copy:
        for file in files:
            store.bring_level(file, theta_0.open, records(STEPS), STEPS, copy, Threads(2))
        for file in files:
            wanted = expected(file.layer, theta_0, storage, records(STEPS))
            for tensor in file.layer.tensors:
                stored, scales = wanted[tensor.name]
                if storage != kept:
                    stored, scales = stored_as(dtype_of(tensor, kept), as_float32(stored, scales, tensor.width), tensor.width)
                part = copy.part(tensor)
                assert same_bits(part.data, stored) and same_bits(part.scales, scales)
                assert not part.data.flags.writeable and (not scales.size or not part.scales.flags.writeable)
                if tensor.vocabulary:
                    rows = np.array([7, 0, 300, 7], np.int64)
                    data, some = copy.rows(tensor, rows)
                    assert same_bits(data, stored.reshape(tensor.shape)[rows])
                    assert same_bits(some, scales[rows] if scales.size else scales)
                    blocks = list(copy.blocks(tensor, 128))
                    assert [block.start for block in blocks] == list(range(0, tensor.size, 128 * tensor.width))
                    assert same_bits(np.concatenate([block.float32() for block in blocks]), part.float32())


@MODELS
@IN_EVERY_STORAGE
def test_finished_and_replayed_read_the_same_weights(tmp_path, name, storage):
    """A layer that lags behind the journal is read as it will be, and nothing is written; θ₀ and the records give it too."""
    layout = layout_of(name)
    theta_0 = Arrays(layout)
    for behind in (0, 2, STEPS):
        files = written(tmp_path / f"{behind}", layout, storage, behind)
        before = bits_of(files)
        replayed = store.Replayed(theta_0, storage, records(STEPS), ALONE)
        for file in files:
            finished = store.Finished(file, records(STEPS)[behind:], STEPS, ALONE)
            wanted = expected(file.layer, theta_0, storage, records(STEPS))
            for tensor in file.layer.tensors:
                whole = as_float32(*wanted[tensor.name], tensor.width)
                some = (tensor.rows // 3 * tensor.width, tensor.rows // 2 * tensor.width)
                for start, count in (*slices(tensor), some, (0, tensor.width), some):
                    for layer in (finished, replayed):
                        assert same_bits(layer.read(tensor, start, count), whole[start : start + count])
            finished.close()
        assert bits_of(files) == before


def full_after(monkeypatch: pytest.MonkeyPatch, written_bytes: int) -> None:
    """A disk that takes so many bytes more: the write that reaches its end is short, the next one fails."""
    room, write = written_bytes, os.pwrite

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, data[:room], position)
        room -= done
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)


def refused(name: str) -> Callable:
    def call(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    return call


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 1])
@IN_EVERY_STORAGE
def test_a_full_disk_leaves_the_layer_as_it_was(tmp_path, monkeypatch, share, storage):
    """Wherever in the file it runs full: among the matrices, or at the front, which is written last."""
    layout = layout_of("tied")
    files = written(tmp_path, layout, storage, 1)
    file, before, descriptors = files[0], bits_of(files), open_files()
    matrices = file.size - file.front_bytes
    for room in {int(share * matrices), int(matrices + share * file.front_bytes) // 4096 * 4096 if share < 1 else file.size - 1}:
        with monkeypatch.context() as patch:
            full_after(patch, room)
            with pytest.raises(RunError, match=f"{file.path}: .*{os.strerror(errno.ENOSPC)}"):
                store.bring_level(file, never, records(2), 2, None, ALONE)
        assert bits_of(files) == before
        assert open_files() == descriptors
    store.bring_level(file, never, records(2), 2, None, ALONE)
    assert same(contents(file)[0], expected(file.layer, Arrays(layout), storage, records(2)))


@pytest.mark.parametrize("call", ["open", "ftruncate", "replace"])
def test_a_disk_that_refuses_anything_else_leaves_the_layer_as_it_was(tmp_path, monkeypatch, call):
    files = written(tmp_path, layout_of("tied"), "int8", 1)
    before, really_open = bits_of(files), os.open

    def some(path, flags, *rest, **named):
        return refused("open")() if flags & os.O_WRONLY else really_open(path, flags, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, {"open": some}.get(call, refused(call)))
        if call == "replace":
            patch.setattr(type(files[1].path), "replace", refused(call))
        with pytest.raises(RunError, match=str(files[1].path)):
            store.bring_level(files[1], never, records(2), 2, None, ALONE)
    assert bits_of(files) == before


def test_a_full_disk_at_the_very_first_step_leaves_nothing(tmp_path, monkeypatch):
    layout = layout_of("tied")
    files = files_of(tmp_path, layout, "bf16")
    full_after(monkeypatch, 10_000)
    with pytest.raises(RunError, match=str(files[1].path)):
        store.bring_level(files[1], Arrays(layout).open, records(2), 2, None, ALONE)
    assert bits_of(files) == {}


def damaged(tmp_path, layout: Layout, where: str) -> LayerFile:
    file = written(tmp_path, layout, "int8", 1)[1]
    scales = 8 + int.from_bytes(file.path.read_bytes()[:8], "little")
    flip(file.path, {"scales": scales + 5, "matrices": file.size - 5}[where])
    return file


@pytest.mark.parametrize("where", ["scales", "matrices"])
def test_a_damaged_layer_is_not_taken_on(tmp_path, where):
    """Whether there are records to apply or none; what is on the disk stays as it is, for whoever wants to look at it."""
    file = damaged(tmp_path, layout_of("tied"), where)
    before = bits_of([file])
    for step in (1, 2):
        with pytest.raises(UserError, match=f"{file.path}: its checksum does not agree"):
            store.bring_level(file, never, records(step), step, None, ALONE)
        assert bits_of([file]) == before


def test_records_must_reach_from_where_the_file_stands(tmp_path):
    file = written(tmp_path, layout_of("tied"), "bf16", 1)[1]
    with FileReader(file) as reader:
        assert reader.front.step == 1
    assert [record.step for record in store.due(file, records(5), 1, 4)] == [1, 2, 3]
    assert store.due(file, records(5), 4, 4) == []


def test_what_a_killed_writer_left_is_removed(tmp_path):
    files = written(tmp_path, layout_of("tied"), "bf16")
    before = bits_of(files)
    (tmp_path / "block-000.safetensors.next").write_bytes(b"half")
    store.remove_partial(tmp_path)
    assert bits_of(files) == before


def test_what_is_left_of_a_killed_writer_is_in_nobodys_way(tmp_path):
    """A longer one, too: the file ends where it should."""
    layout = layout_of("tied")
    wanted = bits_of(written(tmp_path / "undisturbed", layout, "bf16", 1))
    files = files_of(tmp_path / "disturbed", layout, "bf16")
    for file in files:
        file.path.with_name(file.path.name + ".next").write_bytes(b"\xff" * (file.size + 10_000))
    assert bits_of(written(tmp_path / "disturbed", layout, "bf16", 1)) == wanted


def test_theta_0_of_bf16_passes_a_bf16_store_unchanged(tmp_path):
    """Rounding is to nearest, so a model that is in bfloat16 already keeps its bits at step 0."""
    layout = layout_of("tied")
    theta_0 = Arrays(layout)
    for name, values in theta_0.values.items():
        theta_0.values[name] = as_float32(bf16(values), values[:0], 1)
    for file in files_of(tmp_path, layout, "bf16"):
        store.bring_level(file, theta_0.open, [], 0, None, ALONE)
        finished = store.Finished(file, [], 0, ALONE)
        assert all(same_bits(finished.read(t, 0, t.size), theta_0.values[t.name]) for t in file.layer.tensors)
        finished.close()
