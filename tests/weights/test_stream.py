"""Layers that pass through memory: what scoring gets, what the files hold afterwards, and what is read and written.

The reference is always the other way to the same weights: `store.advance_layer` and a working copy.
"""

import contextlib
import os
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from layers import (
    ALONE,
    MODELS,
    ROWS,
    TYPES,
    Arrays,
    asked,
    bits_of,
    layout_of,
    open_files,
    records,
    resident,
    streamed,
    written,
)

from es_lite.files import next_to
from es_lite.weights import conveyor, store
from es_lite.weights.layer_file import LayerFile
from es_lite.weights.parts import dtype_of

STEPS = 3
pytestmark = pytest.mark.usefixtures("small_sections")
DIRECT = pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])


@MODELS
@TYPES
@DIRECT
def test_a_pass_provides_what_a_working_copy_does_and_leaves_what_store_advance_leaves(tmp_path, name, storage, working, direct):
    """From files at different steps, over several passes and several updates."""
    layout = layout_of(name)
    files = written(tmp_path / "streamed", layout, storage)
    store.advance_layer(files[1], Arrays(layout).open, records(2), 2, None, ALONE)
    weights = streamed(files, layout, working, STEPS, direct)
    assert len(conveyor.sections_of(files[0 if layout.tied else -1], layout)) > 1 or name == "gpt2"
    for step in (STEPS, STEPS + 1):
        wanted, wanted_files = resident(tmp_path / f"{step}", layout, storage, working, step)
        weights.advance(records(step), step)
        for _ in range(2):
            assert list(asked(weights, layout)) == wanted
            assert bits_of(files) == wanted_files


class Traffic:
    """How often each byte of each file is read and written, by the layer's name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: Sequence[LayerFile]) -> None:
        self.read = {file.layer.name: np.zeros(file.format.size, int) for file in files}
        self.written = {file.layer.name: np.zeros(file.format.size, int) for file in files}
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
            for path in (file.path, next_to(file.path)):
                with contextlib.suppress(FileNotFoundError):  # it may be renamed at any moment
                    if os.path.samestat(path.stat(), found):
                        counts[file.layer.name][position : position + size] += 1


@DIRECT
@pytest.mark.parametrize("name", ["tied", "untied"])
@TYPES
def test_each_byte_is_read_once_and_written_once(tmp_path, monkeypatch, name, storage, working, direct):
    """Except the fronts, and the rows of the embedding. If there is nothing to apply, nothing is written, and only those rows are
    read of an embedding that is not the head."""
    layout = layout_of(name)
    files = written(tmp_path, layout, storage)
    weights = streamed(files, layout, working, STEPS, direct)
    (embedding,) = layout.layers[0].tensors
    width = embedding.width * dtype_of(embedding, storage).itemsize
    for step, moves in ((STEPS, 1), (STEPS, 0), (STEPS + 2, 1)):
        weights.advance(records(step), step)
        with monkeypatch.context() as patch:
            traffic = Traffic(patch, files)
            list(asked(weights, layout))
        for file in files:
            front = file.format.front_bytes
            once = np.full(file.format.size - front, int(moves or file is not files[0] or layout.tied))
            if file is files[0]:
                for row in ROWS:
                    once[row * width : (row + 1) * width] += 1
            assert np.array_equal(traffic.read[file.layer.name][front:], once)
            assert (traffic.written[file.layer.name] == moves).all()


def test_no_thread_and_no_descriptor_is_left(tmp_path):
    layout = layout_of("untied")
    files = written(tmp_path, layout, "int8")
    weights = streamed(files, layout, "int8", STEPS)
    list(asked(weights, layout))
    threads, descriptors = threading.active_count(), open_files()
    weights.advance(records(STEPS + 1), STEPS + 1)
    list(asked(weights, layout))
    assert (threading.active_count(), open_files()) == (threads, descriptors)
