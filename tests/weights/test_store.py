"""Advancing layers: from θ₀ or from a file, at once or in many steps, whole or in shares: the same bits, even on a full disk."""

import errno
import itertools
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from layers import (
    ALONE,
    IN_EVERY_STORAGE,
    MODELS,
    TYPES,
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
    seen,
    working_copy,
    written,
)

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.errors import DamagedFile, RunError
from es_lite.files import Spare, next_to, remove_unfinished
from es_lite.weights import store
from es_lite.weights.layer_file import LayerFile
from es_lite.weights.store import Store
from es_lite.weights.working_copy import WorkingCopy

STEPS = 4


def never() -> Arrays:
    raise AssertionError("θ₀ is not needed if there is a file")


@MODELS
@IN_EVERY_STORAGE
def test_a_layer_is_what_plain_arithmetic_makes_of_theta_0_and_the_records(tmp_path, name, storage):
    layout = layout_of(name)
    theta_0, files = Arrays(layout), Store(tmp_path, layout, storage)
    assert [file.layer for file in files.files] == list(layout.layers)
    assert files.steps() == [0] * len(layout.layers)
    for file in files.files:
        store.advance_layer(file, theta_0.open, records(STEPS), STEPS, None, Threads(2))
        assert file.front().step == STEPS
        assert same(contents(file)[0], expected(file.layer, theta_0, storage, records(STEPS)))
    assert files.steps() == [STEPS] * len(layout.layers)


@MODELS
@IN_EVERY_STORAGE
def test_every_way_to_a_step_makes_the_same_file(tmp_path, monkeypatch, name, storage):
    """At once from θ₀, by way of a file at step 0, one step at a time, two at a time, and in small sections."""
    layout = layout_of(name)
    wanted = bits_of(written(tmp_path / "at-once", layout, storage, STEPS))
    for index, stops in enumerate([[0, STEPS], [1, 2, 3, STEPS], [2, STEPS]]):
        files, theta_0 = files_of(tmp_path / f"{index}", layout, storage), Arrays(layout)
        monkeypatch.setattr(store, "SECTION_BYTES", (1, 20_000, 2**22)[index])
        for file in files:
            done = 0
            for step in stops:
                store.advance_layer(
                    file, theta_0.open if not done and step == stops[0] else never, records(step)[done:], step, None, ALONE
                )
                done = step
        assert theta_0.opened == len(files)
        assert bits_of(files) == wanted


@IN_EVERY_STORAGE
def test_doing_it_again_changes_nothing(tmp_path, storage):
    """A layer that is at the step already is read, checked and not written; records before its step are passed over."""
    files = written(tmp_path, layout_of("untied"), storage, STEPS)
    before = bits_of(files)
    for file in files:
        inode = file.path.stat().st_ino
        store.advance_layer(file, never, records(STEPS), STEPS, None, ALONE)
        store.advance_layer(file, never, [], STEPS, None, ALONE)
        assert file.path.stat().st_ino == inode
    assert bits_of(files) == before


@IN_EVERY_STORAGE
def test_a_reader_of_the_store_is_at_the_step_wherever_the_file_is(tmp_path, storage):
    layout = layout_of("tied")
    files = Store(tmp_path, layout, storage)
    written(tmp_path, layout, storage, 1)
    store.advance_layer(files.files[1], never, records(2)[1:], 2, None, ALONE)
    assert files.steps() == [1, 2, 1, 1, 1]
    before = bits_of(files.files)
    for layer in layout.layers:
        wanted = expected(layer, Arrays(layout), storage, records(3))
        with files.reader(layer, records(3), 3, ALONE) as reader:
            found = {tensor.name: reader.part(tensor, 0, tensor.size) for tensor in layer.tensors}
        assert same({name: (part.data, part.scales) for name, part in found.items()}, wanted)
    assert bits_of(files.files) == before


def test_a_layer_without_a_file_whose_records_do_not_begin_at_theta_0_is_refused(tmp_path):
    """Nothing is written: records of later steps, applied to θ₀, would make a layer that no run has."""
    layout = layout_of("tied")
    files = files_of(tmp_path, layout, "bf16")
    for history, step in ((records(3)[2:], 3), (records(2), 3), ([], 1)):
        with pytest.raises(DamagedFile, match=str(files[1].path)):
            store.advance_layer(files[1], Arrays(layout).open, history, step, None, ALONE)
        with pytest.raises(DamagedFile, match=str(files[1].path)):
            store.advance_layer_sections(files[1], 0, 1, Arrays(layout).open, history, step, None, ALONE)
        assert bits_of(files) == {}


class FullDisk:
    """A disk that takes this many more bytes: the write that reaches its end is short, the next one fails."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._write = os.pwrite

    def pwrite(self, descriptor: int, data: memoryview, position: int) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = self._write(descriptor, data[: self.room], position)
        self.room -= done
        return done


def refused(name: str) -> Callable:
    def call(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    return call


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 1])
@IN_EVERY_STORAGE
def test_a_full_disk_leaves_the_layer_as_it_was(tmp_path, monkeypatch, share, storage):
    """Wherever in the file it becomes full: among the matrices, or in the front, which is written last."""
    layout = layout_of("tied")
    files = written(tmp_path, layout, storage, 1)
    file, before, descriptors = files[0], bits_of(files), open_files()
    size, front = file.format.size, file.format.front_bytes
    matrices = size - front
    for room in {int(share * matrices), int(matrices + share * front) // 4096 * 4096 if share < 1 else size - 1}:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", FullDisk(room).pwrite)
            with pytest.raises(RunError, match=f"{file.path}: .*{os.strerror(errno.ENOSPC)}"):
                store.advance_layer(file, never, records(2), 2, None, ALONE)
        assert bits_of(files) == before
        assert open_files() == descriptors
    store.advance_layer(file, never, records(2), 2, None, ALONE)
    assert same(contents(file)[0], expected(file.layer, Arrays(layout), storage, records(2)))


@pytest.mark.parametrize("call", ["open", "ftruncate", "replace"])
def test_a_disk_that_refuses_anything_else_leaves_the_layer_as_it_was(tmp_path, monkeypatch, call):
    files = written(tmp_path, layout_of("tied"), "int8", 1)
    before, really_open = bits_of(files), os.open

    def some(path, flags, *rest, **named):
        return refused("open")() if flags & (os.O_WRONLY | os.O_RDWR) else really_open(path, flags, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, {"open": some}.get(call, refused(call)))
        if call == "replace":
            patch.setattr(type(files[1].path), "replace", refused(call))
        with pytest.raises(RunError, match=str(files[1].path)):
            store.advance_layer(files[1], never, records(2), 2, None, ALONE)
    assert bits_of(files) == before


def test_a_full_disk_at_the_very_first_step_leaves_nothing(tmp_path, monkeypatch):
    layout = layout_of("tied")
    files = files_of(tmp_path, layout, "bf16")
    monkeypatch.setattr(os, "pwrite", FullDisk(10_000).pwrite)
    with pytest.raises(RunError, match=str(files[1].path)):
        store.advance_layer(files[1], Arrays(layout).open, records(2), 2, None, ALONE)
    assert bits_of(files) == {}


def damage(file: LayerFile, where: str) -> None:
    """Changes a bit of an int8 layer."""
    flip(file.path, {"scales": file.format.scales_offset(file.format.scaled[0]) + 5, "matrices": file.format.size - 5}[where])


@pytest.mark.parametrize("where", ["scales", "matrices"])
def test_a_damaged_layer_is_not_advanced(tmp_path, where):
    """Whether there are records to apply or none; what is on the disk stays as it is, for whoever wants to look at it."""
    file = written(tmp_path, layout_of("tied"), "int8", 1)[1]
    damage(file, where)
    before = bits_of([file])
    for step in (1, 2):
        with pytest.raises(DamagedFile, match=f"{file.path}: its checksum does not match"):
            store.advance_layer(file, never, records(step), step, None, ALONE)
        assert bits_of([file]) == before


def test_damaged_files_are_removed_and_named_the_others_stay(tmp_path):
    layout = layout_of("tied")
    files = written(tmp_path, layout, "int8", 1)
    before = bits_of(files)
    damage(files[1], "scales")
    os.truncate(files[-1].path, 10)
    files[2].path.unlink()  # to be made again too, but it is not damaged
    removed = list(Store(tmp_path, layout, "int8").remove_damaged())
    assert [str(error).partition(":")[0] for error in removed] == [str(files[1].path), str(files[-1].path)]
    assert all(isinstance(error, DamagedFile) for error in removed)
    gone = {files[index].path.name for index in (1, 2, -1)}
    assert bits_of(files) == {name: data for name, data in before.items() if name not in gone}
    theta_0 = Arrays(layout)
    for file in files:
        store.advance_layer(file, theta_0.open, records(1), 1, None, ALONE)
    assert bits_of(files) == before and theta_0.opened == 3


@IN_EVERY_STORAGE
def test_writing_over_spare_files_changes_no_bit(tmp_path, storage):
    """Blocks are of one size: each is written over the file that the one before it replaced."""
    layout = layout_of("tied")
    folder = tmp_path / "over spare files"
    files, spare = written(folder, layout, storage, 1), Spare(folder)
    for step in range(2, STEPS + 1):
        inodes = [file.path.stat().st_ino for file in files]
        for file in files:
            store.advance_layer(file, never, records(step), step, None, ALONE, spare)
        assert files[2].path.stat().st_ino == inodes[1]
        assert len(list(folder.iterdir())) == len(files) + 1
    remove_unfinished(folder)
    assert bits_of(files) == bits_of(written(tmp_path / "new files", layout, storage, STEPS))


def test_a_layer_whose_replacement_failed_is_not_written_over(tmp_path, monkeypatch):
    """The old file has its second name already when `replace` fails."""
    files, spare = written(tmp_path, layout_of("tied"), "bf16", 1), Spare(tmp_path)
    before = bits_of(files)
    for target, name, call in (
        (type(tmp_path), "replace", refused("replace")),
        (os, "pwrite", FullDisk(files[1].format.size - 5000).pwrite),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, call)
            with pytest.raises(RunError, match=str(files[1].path)):
                store.advance_layer(files[1], never, records(2), 2, None, ALONE, spare)
        assert {name: data for name, data in bits_of(files).items() if name in before} == before


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    """Even if it is longer: the file ends where it should."""
    layout = layout_of("tied")
    wanted = bits_of(written(tmp_path / "undisturbed", layout, "bf16", 1))
    files = files_of(tmp_path / "disturbed", layout, "bf16")
    for file in files:
        next_to(file.path).write_bytes(b"\xff" * (file.format.size + 10_000))
    assert bits_of(written(tmp_path / "disturbed", layout, "bf16", 1)) == wanted


def ranges_of(file: LayerFile) -> list[tuple[int, int]]:
    """Consecutive ranges of one and two sections, in turns, which cover the layer's."""
    edges, sizes = [0], itertools.cycle((1, 2))
    while edges[-1] < store.section_count(file):
        edges.append(min(edges[-1] + next(sizes), store.section_count(file)))
    return list(itertools.pairwise(edges))


def shared(
    file: LayerFile,
    theta_0: Callable[[], Arrays],
    history: Sequence[Record],
    step: int,
    working: WorkingCopy | None,
    ranges: Sequence[tuple[int, int]],
) -> None:
    """`store.advance_layer`, as several workers do it together."""
    for low, high in ranges:
        store.advance_layer_sections(file, low, high, theta_0, history, step, working, ALONE)
    store.finish_layer(file, theta_0, history, step, working, ALONE)


ORDERS: dict[str, Callable[[list], list]] = {
    "in order": lambda ranges: ranges,
    "in reverse": lambda ranges: ranges[::-1],
    "in any order": lambda ranges: random.Random(1).sample(ranges, len(ranges)),
    "each twice": lambda ranges: [*ranges, *ranges[::-1]],
}
BEGINNINGS = pytest.mark.parametrize("behind", [None, 0, 2, STEPS], ids=["theta_0", "step 0", "step 2", "the step itself"])
"""Where the layers are before they are advanced to STEPS: without a file, or at a step."""


@pytest.fixture
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer that has matrices has several sections."""
    monkeypatch.setattr(store, "SECTION_BYTES", 5000)


@MODELS
@pytest.mark.parametrize("order", ORDERS)
@BEGINNINGS
@TYPES
@pytest.mark.usefixtures("small_sections")
def test_a_shared_layer_is_the_same_as_one_advanced_whole(tmp_path, name, storage, working, behind, order):
    """The same file and the same working copy, byte for byte; until `finish`, the old file is as it was."""
    layout, history = layout_of(name), records(STEPS)[behind or 0 :]
    whole, parts = (
        files_of(tmp_path / folder, layout, storage) if behind is None else written(tmp_path / folder, layout, storage, behind)
        for folder in ("whole", "parts")
    )
    theta_0, before = Arrays(layout), bits_of(parts)
    with working_copy(layout, working) as first, working_copy(layout, working) as second:
        descriptors = open_files()
        for one, other in zip(whole, parts, strict=True):
            store.advance_layer(one, theta_0.open, history, STEPS, first, ALONE)
            for low, high in (ranges := ORDERS[order](ranges_of(other))):
                store.advance_layer_sections(other, low, high, theta_0.open, history, STEPS, second, ALONE)
            assert (other.path.read_bytes() == before[other.path.name]) if before else not other.exists()
            assert next_to(other.path).exists() == (behind != STEPS and bool(ranges))
            store.finish_layer(other, theta_0.open, history, STEPS, second, ALONE)
            assert other.path.read_bytes() == one.path.read_bytes()
            other.check()
        assert [seen(first.part(tensor)) for tensor in layout.tensors] == [seen(second.part(tensor)) for tensor in layout.tensors]
        assert open_files() == descriptors
    assert bits_of(parts) == bits_of(whole)
    assert theta_0.opened == 0 or behind is None


@IN_EVERY_STORAGE
@pytest.mark.usefixtures("small_sections")
def test_workers_share_a_layer_at_the_same_time(tmp_path, storage):
    layout = layout_of("untied")
    wanted = bits_of(written(tmp_path / "whole", layout, storage, 2))
    files = written(tmp_path / "parts", layout, storage)
    with ThreadPoolExecutor(3) as pool:
        for file in files:
            list(
                pool.map(
                    lambda edges, file=file: store.advance_layer_sections(file, *edges, never, records(2), 2, None, ALONE),
                    [*ranges_of(file), *ranges_of(file)],
                )
            )
            store.finish_layer(file, never, records(2), 2, None, ALONE)
    assert bits_of(files) == wanted


@IN_EVERY_STORAGE
@pytest.mark.usefixtures("small_sections")
def test_what_is_left_of_a_killed_worker_does_not_change_the_shared_file(tmp_path, storage):
    """It may be longer, and its bytes are anything: every section is written again."""
    layout = layout_of("tied")
    wanted = bits_of(written(tmp_path / "whole", layout, storage, 2))
    files = written(tmp_path / "parts", layout, storage)
    for file in files:
        next_to(file.path).write_bytes(b"\xff" * (file.format.size + 10_000))
        shared(file, never, records(2), 2, None, ranges_of(file))
    assert bits_of(files) == wanted


@BEGINNINGS
@TYPES
@pytest.mark.usefixtures("small_sections")
def test_repeating_anything_after_success_changes_nothing(tmp_path, storage, working, behind):
    """A worker may have died after the new file was in place and before it said so."""
    layout, history = layout_of("tied"), records(STEPS)[behind or 0 :]
    files = files_of(tmp_path, layout, storage) if behind is None else written(tmp_path, layout, storage, behind)
    with working_copy(layout, working) as copy:
        for file in files:
            shared(file, Arrays(layout).open, history, STEPS, copy, ranges_of(file))
        before, copied = bits_of(files), [seen(copy.part(tensor)) for tensor in layout.tensors]
        inodes = [file.path.stat().st_ino for file in files]
        for file in files:
            store.finish_layer(file, never, history, STEPS, copy, ALONE)
            shared(file, never, history, STEPS, copy, ranges_of(file)[:1])
        assert [file.path.stat().st_ino for file in files] == inodes
        assert bits_of(files) == before and [seen(copy.part(tensor)) for tensor in layout.tensors] == copied


@pytest.mark.parametrize("step", [1, 2], ids=["nothing to apply", "a record to apply"])
@pytest.mark.parametrize("where", ["scales", "matrices"])
@pytest.mark.usefixtures("small_sections")
def test_the_check_of_the_old_file_finds_damage_that_no_part_of_it_can(tmp_path, where, step):
    """It is a task of its own, next to those that advance parts; `finish` comes after all of them."""
    file, descriptors = written(tmp_path, layout_of("tied"), "int8", 1)[1], open_files()
    damage(file, where)
    before = file.path.read_bytes()
    for low, high in ranges_of(file):
        store.advance_layer_sections(file, low, high, never, records(step), step, None, ALONE)
    with pytest.raises(DamagedFile, match=f"{file.path}: its checksum does not match"):
        file.check()
    assert file.path.read_bytes() == before and open_files() == descriptors


@pytest.mark.parametrize("share", [0, 0.5, 0.95])
@IN_EVERY_STORAGE
@pytest.mark.usefixtures("small_sections")
def test_a_full_disk_leaves_the_old_file_of_a_shared_layer(tmp_path, monkeypatch, share, storage):
    """Whoever finds the disk full: a worker with some sections, or the one that finishes. Then it is done again."""
    layout, message = layout_of("tied"), os.strerror(errno.ENOSPC)
    wanted = bits_of(written(tmp_path / "whole", layout, storage, 2))
    files = written(tmp_path / "parts", layout, storage)
    for file in files:
        before, descriptors, front = file.path.read_bytes(), open_files(), file.format.front_bytes
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", FullDisk(int(share * (file.format.size - front))).pwrite)
            with pytest.raises(RunError, match=f"{file.path}: .*{message}"):
                shared(file, never, records(2), 2, None, ranges_of(file))
        assert file.path.read_bytes() == before and open_files() == descriptors
        assert not next_to(file.path).exists()
        for low, high in ranges_of(file):
            store.advance_layer_sections(file, low, high, never, records(2), 2, None, ALONE)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", FullDisk(int(share * front)).pwrite)
            with pytest.raises(RunError, match=f"{file.path}: .*{message}"):
                store.finish_layer(file, never, records(2), 2, None, ALONE)
        assert file.path.read_bytes() == before and open_files() == descriptors
        assert not next_to(file.path).exists()
        shared(file, never, records(2), 2, None, ranges_of(file))
    assert bits_of(files) == wanted


@pytest.mark.parametrize("call", ["open", "ftruncate", "replace"])
@pytest.mark.usefixtures("small_sections")
def test_a_disk_that_refuses_anything_else_leaves_the_old_file_of_a_shared_layer(tmp_path, monkeypatch, call):
    files = written(tmp_path, layout_of("tied"), "int8", 1)
    file, before, really_open = files[1], bits_of(files), os.open

    def some(path, flags, *rest, **named):
        return refused("open")() if flags & (os.O_WRONLY | os.O_RDWR) else really_open(path, flags, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, {"open": some}.get(call, refused(call)))
        if call == "replace":
            patch.setattr(type(file.path), "replace", refused(call))
        with pytest.raises(RunError, match=str(file.path)):
            shared(file, never, records(2), 2, None, ranges_of(file))
    assert bits_of(files) == before
    shared(file, never, records(2), 2, None, ranges_of(file))
    assert file.front().step == 2
    file.check()
