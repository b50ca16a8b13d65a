"""A stream that fails: passes cut short, damaged files, a full disk. Each layer stays whole; the next pass does the rest."""

import errno
import os
import threading
from collections.abc import Callable

import pytest
from layers import TYPES, asked, bits_of, flip, layout_of, open_files, resident, streamed, written

from es_lite.errors import DamagedFile, RunError
from es_lite.files import next_to
from es_lite.weights.conveyor import Conveyor, Filled
from es_lite.weights.layer_file import LayerFile

STEPS = 3
pytestmark = pytest.mark.usefixtures("small_sections")


@pytest.mark.parametrize("layer", ["embedding", "block-000", "block-001", "final"])
@TYPES
def test_a_pass_that_is_cut_short_leaves_every_layer_whole(tmp_path, storage, working, layer):
    """By an error while a layer is scored; the next pass does the rest."""
    layout = layout_of("untied")
    wanted, wanted_files = resident(tmp_path / "there", layout, storage, working, STEPS)
    files = written(tmp_path / "here", layout, storage)
    before, descriptors = bits_of(files), open_files()
    weights = streamed(files, layout, working, STEPS)

    def at(name: str) -> None:
        if name == layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(asked(weights, layout, at))
    after = bits_of(files)
    assert all(after[name] in (before[name], wanted_files[name]) for name in after)
    assert after.keys() == before.keys() and open_files() == descriptors
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
    position = damaged.format.size - 5  # in a matrix or, in a tied model's last layer, in the norm
    flip(damaged.path, position)
    before, descriptors = bits_of(files), open_files()
    weights = streamed(files, layout, working, STEPS)
    with pytest.raises(DamagedFile, match=f"{damaged.path}: its checksum does not match"):
        list(asked(weights, layout))
    after = bits_of(files)
    assert after.keys() == before.keys() and open_files() == descriptors
    assert after[damaged.path.name] == before[damaged.path.name]
    for file in files:
        if file is not damaged:
            file.check()
            assert after[file.path.name] in (before[file.path.name], wanted_files[file.path.name])
    flip(damaged.path, position)
    assert list(asked(weights, layout)) == wanted
    assert bits_of(files) == wanted_files


@pytest.mark.parametrize(("name", "layer"), [("tied", 0), ("tied", 1), ("tied", -1), ("untied", 2), ("untied", -1)])
def test_damage_is_found_even_if_there_is_nothing_to_apply(tmp_path, name, layer):
    """In whatever is read whole: everything except the embedding of a model that has another head."""
    layout = layout_of(name)
    files = written(tmp_path, layout, "int8")
    flip(files[layer].path, files[layer].format.size - 5)
    with pytest.raises(DamagedFile, match=f"{files[layer].path}: its checksum does not match"):
        list(asked(streamed(files, layout, "int8", 0), layout))


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_a_layer_whose_header_is_damaged_ends_the_pass(tmp_path, layer):
    """Or that is missing: there is nothing to score from."""
    layout = layout_of("tied")
    files = written(tmp_path, layout, "bf16")
    weights, descriptors = streamed(files, layout, "bf16", STEPS), open_files()
    flip(files[layer].path, 20)
    with pytest.raises(DamagedFile, match=str(files[layer].path)):
        list(asked(weights, layout))
    files[layer].path.unlink()
    with pytest.raises(DamagedFile, match=f"{files[layer].path}: cannot be read"):
        list(asked(weights, layout))
    assert open_files() == descriptors


def failing(monkeypatch: pytest.MonkeyPatch, file: LayerFile, fails: Callable[[int], bool], short: int = 0) -> None:
    """A disk that is full when the new version of `file` is written at a position for which fails(position) is true.

    short: that write still takes this many bytes, and the next one fails.
    """
    write = os.pwrite

    def pwrite(descriptor, data, position):
        partial = next_to(file.path)
        if partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor)):
            if position and position == short:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if fails(position):
                if not short:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                data = data[:short]
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)


def raised_by(call: Callable[[], object]) -> BaseException | None:
    """What `call` raises; fails if it never ends."""
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
    """The error names the layer; its file is as it was, the half-written one is gone, and the next pass does the rest."""
    layout = layout_of(name)
    wanted, wanted_files = resident(tmp_path / "there", layout, "bf16", "bf16", STEPS)
    files = written(tmp_path / "here", layout, "bf16")
    full, before = files[layer], bits_of(files)
    weights = streamed(files, layout, "bf16", STEPS)
    with monkeypatch.context() as patch:
        failing(
            patch, full, lambda position: (position > 0) == (place == "matrices"), 512 if place == "middle of the front" else 0
        )
        error = raised_by(lambda: list(asked(weights, layout)))
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
    before, descriptors, passed = bits_of(files), open_files(), threading.Semaphore(0)
    weights, release = streamed(files, layout, working, STEPS), Conveyor.release

    def releasing(self: Conveyor, filled: Filled) -> None:
        if filled.held:
            passed.release()
        release(self, filled)

    def fails(position: int) -> bool:
        return passed.acquire(timeout=20) and passed.acquire(timeout=20)

    with monkeypatch.context() as patch:
        patch.setattr(Conveyor, "release", releasing)
        failing(patch, files[1], fails)
        error = raised_by(lambda: list(asked(weights, layout)))
    assert isinstance(error, RunError) and str(files[1].path) in str(error)
    after = bits_of(files)
    assert after.keys() == before.keys() and open_files() == descriptors
    assert all(after[name] in (before[name], wanted_files[name]) for name in after)
    assert list(asked(weights, layout)) == wanted
    assert bits_of(files) == wanted_files
