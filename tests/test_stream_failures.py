"""A stream of layers in trouble: cut short, damaged files, a full disk. Each layer stays whole; the next pass does the rest."""

import errno
import os
import threading
from collections.abc import Callable

import pytest
from layers import COMBINATIONS, asked, bits_of, flip, layout_of, resident, streamed, written

from es_lite.errors import RunError, UserError
from es_lite.weights import conveyor, store
from es_lite.weights.layerfile import LayerFile

STEPS = 3
TYPES = pytest.mark.parametrize(("storage", "working"), COMBINATIONS, ids=map("-".join, COMBINATIONS))


@pytest.fixture(autouse=True)
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head passes in several sections, whatever is stored."""
    monkeypatch.setattr(conveyor, "VOCABULARY_ROWS", 64)


@pytest.mark.parametrize("layer", ["embedding", "block-000", "block-001", "final"])
@TYPES
def test_a_pass_that_is_cut_short_leaves_every_layer_whole(tmp_path, storage, working, layer):
    """By an error of whoever scores; the next pass does the rest."""
    layout = layout_of("untied")
    wanted, wanted_files = resident(tmp_path / "there", layout, storage, working, STEPS)
    files = written(tmp_path / "here", layout, storage)
    before = bits_of(files)
    weights = streamed(files, layout, working, STEPS)

    def at(name: str) -> None:
        if name == layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(asked(weights, layout, at))
    after = bits_of(files)
    assert all(after[name] in (before[name], wanted_files[name]) for name in after)
    assert after.keys() == before.keys()
    assert list(asked(weights, layout)) == wanted
    assert bits_of(files) == wanted_files


@pytest.mark.parametrize("layer", [0, 1, 2, -1])
@pytest.mark.parametrize("name", ["tied", "untied"])
@TYPES
def test_a_damaged_layer_ends_the_pass_and_the_others_stay_whole(tmp_path, name, layer, storage, working):
    layout = layout_of(name)
    wanted, wanted_files = resident(tmp_path / "there", layout, storage, working, STEPS)
    files = written(tmp_path / "here", layout, storage)
    damaged = files[layer]
    position = damaged.size - 5  # a matrix's, or of a tied model's last layer the norm's
    flip(damaged.path, position)
    before = bits_of(files)
    weights = streamed(files, layout, working, STEPS)
    with pytest.raises(UserError, match=f"{damaged.path}: its checksum does not agree"):
        list(asked(weights, layout))
    after = bits_of(files)
    assert after.keys() == before.keys()
    assert after[damaged.path.name] == before[damaged.path.name]
    for file in files:
        if file is not damaged:
            store.check(file)
            assert after[file.path.name] in (before[file.path.name], wanted_files[file.path.name])
    flip(damaged.path, position)
    assert list(asked(weights, layout)) == wanted
    assert bits_of(files) == wanted_files


@pytest.mark.parametrize(("name", "layer"), [("tied", 0), ("tied", 1), ("tied", -1), ("untied", 2), ("untied", -1)])
def test_damage_is_found_where_nothing_is_applied_too(tmp_path, name, layer):
    """In whatever is read whole: all but the embedding of a model that has another head."""
    layout = layout_of(name)
    files = written(tmp_path, layout, "int8")
    flip(files[layer].path, files[layer].size - 5)
    with pytest.raises(UserError, match=f"{files[layer].path}: its checksum does not agree"):
        list(asked(streamed(files, layout, "int8", 0), layout))


def failing(monkeypatch: pytest.MonkeyPatch, file: LayerFile, fails: Callable[[int], bool], short: int = 0) -> None:
    """A disk that is full when `file` is written where fails(position); before, it takes `short` bytes of that."""
    write = os.pwrite

    def pwrite(descriptor, data, position):
        partial = file.path.with_name(file.path.name + ".next")
        if partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor)):
            if position and position == short:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if fails(position):
                if not short:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                data = data[:short]
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)


def refused(call: Callable[[], object]) -> BaseException | None:
    """What `call` raises; it is given up where it never ends."""
    raised: list[BaseException | None] = [None]

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised[0] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the pass hangs"
    return raised[0]


@pytest.mark.parametrize("place", ["matrices", "front", "middle of the front"])
@pytest.mark.parametrize(("name", "layer"), [("tied", 0), ("tied", 1), ("untied", 0), ("untied", 3), ("untied", -1)])
def test_a_full_disk_ends_the_pass_and_leaves_every_layer_whole(tmp_path, monkeypatch, name, place, layer):
    """The error names the layer; its file is as it was, what was half written is gone, and the next pass does the rest."""
    layout = layout_of(name)
    wanted, wanted_files = resident(tmp_path / "there", layout, "bf16", "bf16", STEPS)
    files = written(tmp_path / "here", layout, "bf16")
    full, before = files[layer], bits_of(files)
    weights = streamed(files, layout, "bf16", STEPS)
    with monkeypatch.context() as patch:
        failing(
            patch, full, lambda position: (position > 0) == (place == "matrices"), 512 if place == "middle of the front" else 0
        )
        error = refused(lambda: list(asked(weights, layout)))
    assert isinstance(error, RunError) and f"{full.path}: cannot be written" in str(error)
    after = bits_of(files)
    assert after.keys() == before.keys()
    assert after[full.path.name] == before[full.path.name]
    assert all(after[name] in (before[name], wanted_files[name]) for name in after)
    assert list(asked(weights, layout)) == wanted
    assert bits_of(files) == wanted_files


@TYPES
def test_a_disk_that_is_found_full_late_leaves_nothing_half_written(tmp_path, monkeypatch, storage, working):
    """The write of one layer fails when the next ones are waiting to be written."""
    layout = layout_of("tied")
    wanted, wanted_files = resident(tmp_path / "there", layout, storage, working, STEPS)
    files = written(tmp_path / "here", layout, storage)
    before, descriptors, passed = bits_of(files), len(os.listdir("/dev/fd")), threading.Semaphore(0)
    weights = streamed(files, layout, working, STEPS, progress=lambda parameters: passed.release())

    def fails(position: int) -> bool:
        return passed.acquire(timeout=20) and passed.acquire(timeout=20)

    with monkeypatch.context() as patch:
        failing(patch, files[1], fails)
        error = refused(lambda: list(asked(weights, layout)))
    assert isinstance(error, RunError) and str(files[1].path) in str(error)
    after = bits_of(files)
    assert after.keys() == before.keys() and len(os.listdir("/dev/fd")) == descriptors
    assert all(after[name] in (before[name], wanted_files[name]) for name in after)
    assert list(asked(weights, layout)) == wanted
    assert bits_of(files) == wanted_files
