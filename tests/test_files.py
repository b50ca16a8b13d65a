"""Reading and writing files whole, and replacing files and folders so that a crash leaves the old or the new one."""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from es_lite import files
from es_lite.files import (
    ALIGNMENT,
    NewFile,
    Spare,
    aligned,
    finish_replacement,
    new_folder,
    next_to,
    open_file,
    read_fully,
    remove_unfinished,
    view_of,
    write_durably,
    write_fully,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that holds "old", alone in its folder."""
    (tmp_path / "file.txt").write_bytes(b"old")
    return tmp_path / "file.txt"


def found_in(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by path: the bytes of files, None for folders."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in sorted(folder.rglob("*"))}


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = open_file(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def failing(code: int) -> Callable:
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


# Whole reads and writes


def test_short_writes_are_continued(path, monkeypatch):
    write, positions = os.pwrite, []

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        positions.append(position)
        return write(descriptor, data[:3], position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with opened(path) as descriptor:
        write_fully(descriptor, memoryview(b"0123456789"), 2)
        write_fully(descriptor, memoryview(b""), 100)
    assert path.read_bytes() == b"ol0123456789" and positions == [2, 5, 8, 11]


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_short_reads_are_continued(path, monkeypatch, most):
    """Whether the system returns less than was asked for, or a request is larger than one may be."""
    path.write_bytes(bytes(range(10)))
    read = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], position: int) -> int:
        return read(descriptor, [buffers[0][:most]], position)

    with opened(path) as descriptor:
        for patch in ((os, "preadv", preadv), (files, "READ_BYTES", most)):
            with monkeypatch.context() as patched:
                patched.setattr(*patch)
                out = bytearray(6)
                read_fully(descriptor, memoryview(out), 3, 6)
                assert out == bytes(range(3, 9))


def test_a_read_ends_at_the_end_of_the_file(path):
    """It may be exactly there, even if there is room for more; a read beyond it is an error, however much there was."""
    with opened(path) as descriptor:
        out = bytearray(b"\xff" * 8)
        read_fully(descriptor, memoryview(out), 1, 2)
        assert out[:2] == b"ld" and out[2:] == b"\xff" * 6
        read_fully(descriptor, memoryview(out), 3, 0)
        for position, size in ((1, 3), (3, 1), (100, 1)):
            with pytest.raises(OSError) as raised:
                read_fully(descriptor, memoryview(out), position, size)
            assert raised.value.strerror == "the file is truncated"


def test_bytes_beyond_those_asked_for_may_follow_in_a_larger_view(path):
    """So that direct reads can be of whole pages."""
    path.write_bytes(bytes(range(100)))
    out = np.full(64, 255, np.uint8)
    with opened(path) as descriptor:
        read_fully(descriptor, view_of(out), 10, 20)
    assert out[:20].tolist() == list(range(10, 30))
    assert all(value in (255, 10 + index) for index, value in enumerate(out.tolist()))


def test_sizes_are_rounded_up_to_the_alignment():
    assert [aligned(size) for size in (0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1)] == [
        0,
        ALIGNMENT,
        ALIGNMENT,
        ALIGNMENT,
        2 * ALIGNMENT,
    ]


def test_a_view_is_the_arrays_bytes():
    array = np.arange(3, dtype=np.float32)
    view = view_of(array)
    assert bytes(view) == array.tobytes()
    view[:4] = b"\0\0\x80\x3f"
    assert array[0] == 1


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct access")
def test_direct_access_is_used_if_the_file_system_has_it(path, monkeypatch):
    """Else the file is opened without it; an error that has another cause is raised."""
    really_open, asked = os.open, []

    def without_direct(name: Path, flags: int, *rest: int) -> int:
        asked.append(bool(flags & os.O_DIRECT))
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really_open(name, flags, *rest)

    def with_direct(name: Path, flags: int, *rest: int) -> int:
        asked.append(bool(flags & os.O_DIRECT))
        return really_open(name, flags & ~os.O_DIRECT, *rest)

    for system, direct, wanted in (
        (without_direct, True, [True, False]),
        (with_direct, True, [True]),
        (with_direct, False, [False]),
    ):
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", system)
            descriptor = open_file(path, os.O_RDONLY, direct)
        assert asked == wanted and os.read(descriptor, 10) == b"old"
        os.close(descriptor)
    for direct in (False, True):
        with pytest.raises(FileNotFoundError):
            open_file(path.with_name("missing"), os.O_RDONLY, direct)
        with pytest.raises(IsADirectoryError):
            open_file(path.parent, os.O_RDWR, direct)


def test_descriptors_are_not_inherited(path):
    with opened(path) as descriptor:
        assert not os.get_inheritable(descriptor)


# New files


def test_a_new_file_replaces_the_old_one_at_commit(path):
    descriptors = open_files()
    new = NewFile(path)
    new.append(b"new ")
    new.append(memoryview(np.frombuffer(b"file", np.int32)))
    assert found_in(path.parent) == {"file.txt": b"old", "file.txt.next": b"new file"}
    new.commit()
    assert found_in(path.parent) == {"file.txt": b"new file"} and open_files() == descriptors


def test_a_discarded_file_leaves_the_old_one(path):
    descriptors = open_files()
    new = NewFile(path)
    new.append(b"new")
    new.discard()
    new.discard()
    assert found_in(path.parent) == {"file.txt": b"old"} and open_files() == descriptors


def test_it_needs_no_old_file(tmp_path):
    with NewFile(tmp_path / "x") as new:
        new.append(b"x")
    assert found_in(tmp_path) == {"x": b"x"}


def test_as_a_context_manager_it_commits_or_discards(path):
    with NewFile(path) as new:
        new.append(b"first")
    assert found_in(path.parent) == {"file.txt": b"first"}
    with pytest.raises(KeyboardInterrupt), NewFile(path) as new:
        new.append(b"second")
        raise KeyboardInterrupt
    assert found_in(path.parent) == {"file.txt": b"first"}


@pytest.mark.parametrize(("size", "wanted"), [(None, b"ab\0\0cd"), (3, b"ab\0"), (8, b"ab\0\0cd\0\0")])
def test_parts_are_written_anywhere_and_the_size_is_set_at_commit(path, size, wanted):
    new = NewFile(path)
    new.write(memoryview(b"cd"), 4)
    new.write(memoryview(b"ab"), 0)
    new.commit(size)
    assert path.read_bytes() == wanted


def test_what_a_killed_writer_left_is_dropped_unless_it_is_to_be_kept(path):
    """Several processes can write parts of the same new version, one after the other or together."""
    next_to(path).write_bytes(b"from another process")
    with NewFile(path) as new:
        new.append(b"new")
    assert path.read_bytes() == b"new"
    first, second = NewFile(path, keep=True), NewFile(path, keep=True)
    first.write(memoryview(b"ab"), 0)
    second.write(memoryview(b"cd"), 2)
    first.close()
    second.close()
    assert found_in(path.parent) == {"file.txt": b"new", "file.txt.next": b"abcd"}
    third = NewFile(path, keep=True)
    assert os.pread(third.descriptor, 10, 0) == b"abcd"
    third.commit()
    assert found_in(path.parent) == {"file.txt": b"abcd"}


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_commit_waits_for_the_disk(path, monkeypatch, durable):
    """First for the new file's bytes, before it replaces the old one, then for the folder that names it."""
    sync, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if folder else os.pread(descriptor, 10, 0), path.read_bytes()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    new, descriptors = NewFile(path), open_files()
    new.append(b"new")
    new.commit(durable=durable)
    assert synced == ([(b"new", b"old"), ("folder", b"new")] if durable else [])
    assert path.read_bytes() == b"new" and open_files() == descriptors - 1


# Spare files


def test_a_replaced_file_can_be_written_over(path):
    spare, inode = Spare(path.parent), path.stat().st_ino
    spare.keep(path)
    write_durably(path, "new")
    other = path.with_name("other")
    assert spare.take(other, 3)
    assert (other.stat().st_ino, other.read_bytes()) == (inode, b"old")
    assert found_in(path.parent) == {"file.txt": b"new", "other": b"old"}
    assert not spare.take(other, 3)


def test_a_spare_file_of_another_size_is_removed(path):
    spare = Spare(path.parent)
    spare.keep(path)
    write_durably(path, "new")
    assert not spare.take(path.with_name("other"), 4)
    assert found_in(path.parent) == {"file.txt": b"new"}


def test_a_file_that_was_not_replaced_after_all_is_never_written_over(path):
    spare = Spare(path.parent)
    spare.keep(path)
    assert not spare.take(path.with_name("other"), 3)
    assert found_in(path.parent) == {"file.txt": b"old"}


def test_there_is_one_spare_file_or_none_and_it_counts_as_unfinished(path, monkeypatch):
    spare = Spare(path.parent)
    for text in ("new", "newer"):
        spare.keep(path)
        write_durably(path, text)
    assert sorted(found_in(path.parent).values()) == [b"new", b"newer"]
    remove_unfinished(path.parent)
    assert found_in(path.parent) == {"file.txt": b"newer"}
    monkeypatch.setattr(Path, "hardlink_to", os.mkdir)  # a file system without links refuses
    spare.keep(path)
    assert found_in(path.parent) == {"file.txt": b"newer"}


def test_text_is_written_durably(path, monkeypatch):
    sync, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), sync(descriptor)))
    for text in ("θ₀ and the rest\n", ""):
        write_durably(path, text)
        assert found_in(path.parent) == {"file.txt": text.encode()}
    assert len(synced) == 4


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "replace"])
def test_a_text_that_cannot_be_written_leaves_the_old_one(path, monkeypatch, call):
    descriptors = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "replace" else os, call, failing(errno.ENOSPC))
        with pytest.raises(OSError) as raised:
            write_durably(path, "new")
    assert raised.value.errno == errno.ENOSPC
    assert found_in(path.parent) == {"file.txt": b"old"} and open_files() == descriptors


def test_only_unfinished_files_are_removed(tmp_path):
    for name in ("a", "b", "a.next", "c.safetensors.next", "next"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "d.next").write_bytes(b"of another folder")
    remove_unfinished(tmp_path)
    assert found_in(tmp_path) == {"a": b"a", "b": b"b", "next": b"next", "folder": None, "folder/d.next": b"of another folder"}


# New folders

OLD = {"best": None, "best/x": b"old", "best/y": b"old too"}
NEW = {"best": None, "best/x": b"new"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of OLD, alone in its parent, which is empty otherwise."""
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "x").write_bytes(b"old")
    (tmp_path / "run" / "best" / "y").write_bytes(b"old too")
    return tmp_path / "run" / "best"


def replace(folder: Path, durable: bool = False) -> None:
    """Writes NEW."""
    with new_folder(folder, durable) as partial:
        assert found_in(partial) == {}
        (partial / "x").write_bytes(b"new")


@pytest.mark.parametrize("durable", [True, False])
def test_a_new_folder_replaces_the_old_one_whole(folder, durable):
    replace(folder, durable)
    assert found_in(folder.parent) == NEW


def test_the_old_folder_is_there_until_the_block_ends(folder):
    with new_folder(folder) as partial:
        (partial / "x").write_bytes(b"new")
        assert found_in(folder) == {"x": b"old", "y": b"old too"}
    assert found_in(folder.parent) == NEW


def test_a_folder_and_its_parents_are_made(tmp_path):
    replace(tmp_path / "run" / "deep" / "best")
    assert found_in(tmp_path / "run" / "deep") == NEW


def test_a_block_that_raises_leaves_the_old_folder(folder):
    with pytest.raises(KeyboardInterrupt), new_folder(folder) as partial:
        (partial / "x").write_bytes(b"new")
        raise KeyboardInterrupt
    assert found_in(folder.parent) == OLD


def test_what_a_crash_left_is_not_in_the_new_folder(folder):
    for name in ("best.next", "best.old"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "stale").write_bytes(b"stale")
    finish_replacement(folder)
    next_to(folder).mkdir()
    (next_to(folder) / "stale").write_bytes(b"stale")
    replace(folder)
    assert found_in(folder.parent) == NEW


def test_a_durable_folders_files_are_on_disk_before_it_is_in_place(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append((os.pread(descriptor, 10, 0), found_in(folder.parent)["best/x"]))
    )
    replace(folder, durable=True)
    assert synced == [(b"new", b"old")]


@pytest.mark.parametrize("which", [0, 1], ids=["old one aside", "new one in place"])
def test_a_rename_that_fails_leaves_the_old_folder(folder, monkeypatch, which):
    rename, calls = Path.rename, []

    def some(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == which + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", some)
        with pytest.raises(OSError):
            replace(folder)
    assert found_in(folder.parent) == OLD


def snapshots(folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> list[Path]:
    """Copies of the folder's parent as a crash would leave it: before and after every step of act()."""
    taken: list[Path] = []
    rename, rmtree, mkdir = Path.rename, shutil.rmtree, Path.mkdir

    def snap() -> None:
        taken.append(into / str(len(taken)))
        shutil.copytree(folder.parent, taken[-1])

    def stepwise(step: Callable) -> Callable:
        def call(*arguments: object, **named: object) -> object:
            with monkeypatch.context() as patch:
                patch.setattr(Path, "rename", rename)
                patch.setattr(shutil, "rmtree", rmtree)
                patch.setattr(Path, "mkdir", mkdir)
                snap()
                result = step(*arguments, **named)
                snap()
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stepwise(rename))
        patch.setattr(shutil, "rmtree", stepwise(rmtree))
        patch.setattr(Path, "mkdir", stepwise(mkdir))
        act()
    return taken


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "made"])
def test_a_crash_anywhere_leaves_the_old_or_the_new_folder_complete(folder, tmp_path, monkeypatch, there):
    """`finish_replacement` repairs every state in between; it can be interrupted too, and done again."""
    old = OLD if there else {}
    if not there:
        shutil.rmtree(folder)
    states = snapshots(folder, tmp_path / "crashes", monkeypatch, lambda: replace(folder))
    assert any({path.name for path in state.iterdir()} == {"best.next", "best.old"} for state in states) == there
    found = []
    for number, state in enumerate(states):
        repaired = snapshots(
            state / "best", tmp_path / f"repairs-{number}", monkeypatch, lambda state=state: finish_replacement(state / "best")
        )
        for again in (state, *repaired):
            finish_replacement(again / "best")
        results = [found_in(again) for again in (state, *repaired)]
        assert all(result == results[0] for result in results) and results[0] in (old, NEW)
        found.append(results[0])
    assert found[0] == old and found[-1] == NEW
    assert found == sorted(found, key=lambda result: result == NEW), "first the old one, from some point on the new one"


def test_finishing_what_is_finished_changes_nothing(folder):
    finish_replacement(folder)
    assert found_in(folder.parent) == OLD
    finish_replacement(folder.parent / "missing")
    assert found_in(folder.parent) == OLD
