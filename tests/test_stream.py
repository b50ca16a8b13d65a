"""Layers that pass through memory: what the doors get, what the files are then, and what is read and written.

The reference is always the other way to the same weights: `store.bring_level` and a working copy.
"""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from layers import ALONE, COMBINATIONS, ROWS, Arrays, asked, bits_of, layout_of, records, resident, streamed, written

from es_lite.weights import conveyor, store, stream
from es_lite.weights.layerfile import LayerFile
from es_lite.weights.stored import dtype_of

STEPS = 3
TYPES = pytest.mark.parametrize(("storage", "working"), COMBINATIONS, ids=map("-".join, COMBINATIONS))
MODELS = pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])


@pytest.fixture(autouse=True)
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head passes in several sections, whatever is stored."""
    monkeypatch.setattr(conveyor, "VOCABULARY_ROWS", 64)


@MODELS
@TYPES
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_a_pass_gives_what_a_working_copy_gives_and_leaves_what_bring_level_leaves(tmp_path, name, storage, working, direct):
    """From files that stand at different steps, over several passes and targets."""
    layout = layout_of(name)
    files = written(tmp_path / "streamed", layout, storage)
    store.bring_level(files[1], Arrays(layout).open, records(2), 2, None, ALONE)
    weights = streamed(files, layout, working, STEPS, direct)
    assert len(conveyor.cut(files[0 if layout.tied else -1], layout)) > 1 or name == "gpt2"
    for step in (STEPS, STEPS + 1):
        wanted, wanted_files = resident(tmp_path / f"{step}", layout, storage, working, step)
        weights.target(records(step), step)
        for _ in range(2):
            assert list(asked(weights, layout)) == wanted
            assert bits_of(files) == wanted_files


class Traffic:
    """How often each byte of each file is read and written, by the file's first name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: Sequence[LayerFile]) -> None:
        self.read = {file.layer.name: np.zeros(file.size, int) for file in files}
        self.written = {file.layer.name: np.zeros(file.size, int) for file in files}
        reading, writing = os.preadv, os.pwrite

        def preadv(descriptor, buffers, position):
            got = reading(descriptor, buffers, position)
            self._count(self.read, descriptor, position, got)
            return got

        def pwrite(descriptor, data, position):
            done = writing(descriptor, data, position)
            self._count(self.written, descriptor, position, done)
            return done

        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr(os, "pwrite", pwrite)
        self._files = files

    def _count(self, counts: dict[str, np.ndarray], descriptor: int, position: int, size: int) -> None:
        found = os.fstat(descriptor)
        for file in self._files:
            for path in (file.path, file.path.with_name(file.path.name + ".next")):
                with contextlib.suppress(FileNotFoundError):  # it may be renamed at any moment
                    if os.path.samestat(path.stat(), found):
                        counts[file.layer.name][position : position + size] += 1


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("name", ["tied", "untied"])
@TYPES
def test_each_byte_is_read_once_and_written_once(tmp_path, monkeypatch, name, storage, working, direct):
    """But for the fronts, and the rows of the embedding; with nothing to apply, nothing is written, and of an embedding that is
    not the head, those rows alone are read."""
    layout = layout_of(name)
    files = written(tmp_path, layout, storage)
    weights = streamed(files, layout, working, STEPS, direct)
    (embedding,) = layout.layers[0].tensors
    width = embedding.width * dtype_of(embedding, storage).itemsize
    for step, moves in ((STEPS, 1), (STEPS, 0), (STEPS + 2, 1)):
        weights.target(records(step), step)
        with monkeypatch.context() as patch:
            traffic = Traffic(patch, files)
            list(asked(weights, layout))
        for file in files:
            once = np.full(file.size - file.front_bytes, int(moves or file is not files[0] or layout.tied))
            if file is files[0]:
                for row in ROWS:
                    once[row * width : (row + 1) * width] += 1
            assert np.array_equal(traffic.read[file.layer.name][file.front_bytes :], once)
            assert (traffic.written[file.layer.name] == moves).all()


@TYPES
def test_progress_tells_of_every_matrix(tmp_path, storage, working):
    layout, told = layout_of("tied"), []
    files = written(tmp_path, layout, storage)
    list(asked(streamed(files, layout, working, STEPS, progress=told.append), layout))
    assert sum(told) == sum(tensor.size for file in files for tensor in file.matrices)


@TYPES
def test_three_buffers_go_round(tmp_path, monkeypatch, storage, working):
    """Of the largest section's size, whatever the passes, and never more sections in memory than that."""
    layout, made = layout_of("untied"), []
    files = written(tmp_path, layout, storage)
    original, filling = stream.Buffer, conveyor.read_aligned
    held: Counter[int] = Counter()
    monkeypatch.setattr(stream, "Buffer", lambda size: made.append(original(size)) or made[-1])

    def fill(descriptor, view, position, size, path):
        held[id(view.obj)] += 1
        filling(descriptor, view, position, size, path)

    monkeypatch.setattr(conveyor, "read_aligned", fill)
    weights = streamed(files, layout, working, STEPS)
    for step in (1, 2, 2, STEPS):
        weights.target(records(step), step)
        list(asked(weights, layout))
    assert len(made) == conveyor.BUFFERS == 3 == len(held)
    assert {buffer.array.size for buffer in made} == {conveyor.buffer_bytes(files, layout)}
    assert all(section.high - section.low <= made[0].array.size for file in files for section in conveyor.cut(file, layout))
    assert sum(held.values()) > 3 * len(made), "they did go round"


def test_no_thread_and_no_descriptor_is_left(tmp_path):
    layout = layout_of("untied")
    files = written(tmp_path, layout, "int8")
    weights = streamed(files, layout, "int8", STEPS)
    list(asked(weights, layout))
    threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
    weights.target(records(STEPS + 1), STEPS + 1)
    list(asked(weights, layout))
    assert (threading.active_count(), len(os.listdir("/dev/fd"))) == (threads, descriptors)
