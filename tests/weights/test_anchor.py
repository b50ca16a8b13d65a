"""Anchored records, which decay towards θ₀: the same bits whichever way weights are read and advanced."""

import numpy as np
import pytest
from layers import (
    ALONE,
    IN_EVERY_STORAGE,
    MODELS,
    TYPES,
    Arrays,
    asked,
    bits_of,
    contents,
    expected,
    layout_of,
    records,
    same,
    working_copy,
    written,
)

from es_lite.algorithm.jit import Threads
from es_lite.weights import store
from es_lite.weights.reading import LayerReader
from es_lite.weights.stream import Stream

STEPS = 4
HISTORY = records(STEPS, anchored=True)
pytestmark = pytest.mark.usefixtures("small_sections")


@MODELS
@IN_EVERY_STORAGE
@pytest.mark.parametrize("stops", [[STEPS], [1, 2, 3, STEPS], [2, STEPS]], ids=["at once", "one by one", "in twos"])
def test_files_hold_what_plain_arithmetic_makes(tmp_path, name, storage, stops):
    layout = layout_of(name)
    theta_0, files = Arrays(layout), written(tmp_path, layout, storage)
    for file in files:
        for step in stops:
            store.advance_layer(file, theta_0.open, HISTORY, step, None, Threads(2))
        assert same(contents(file)[0], expected(file.layer, theta_0, storage, HISTORY))
        assert not same(contents(file)[0], expected(file.layer, theta_0, storage, records(STEPS)))


@MODELS
@IN_EVERY_STORAGE
def test_workers_that_share_a_layer_leave_what_one_alone_does(tmp_path, name, storage):
    layout = layout_of(name)
    theta_0, alone, shared = Arrays(layout), written(tmp_path / "1", layout, storage), written(tmp_path / "2", layout, storage)
    for one, other in zip(alone, shared, strict=True):
        store.advance_layer(one, theta_0.open, HISTORY, STEPS, None, ALONE)
        for section in range(store.section_count(other)):
            store.advance_layer_sections(other, section, section + 1, theta_0.open, HISTORY, STEPS, None, ALONE)
        store.finish_layer(other, theta_0.open, HISTORY, STEPS, None, ALONE)
    assert bits_of(alone) == bits_of(shared)


@MODELS
@TYPES
def test_a_stream_provides_what_a_working_copy_does(tmp_path, name, storage, working):
    layout = layout_of(name)
    theta_0, files = Arrays(layout), written(tmp_path / "resident", layout, storage)
    with working_copy(layout, working) as copy:
        for file in files:
            store.advance_layer(file, theta_0.open, HISTORY, STEPS, copy, ALONE)
        wanted = list(asked(copy, layout))
    passing = written(tmp_path / "streamed", layout, storage)
    stream = Stream(passing, layout, working, Threads(2), False, theta_0.open)
    stream.advance(HISTORY, STEPS)
    for _ in range(2):
        assert list(asked(stream, layout)) == wanted
    assert bits_of(passing) == bits_of(files)


@MODELS
@IN_EVERY_STORAGE
def test_a_slice_read_at_a_later_step_is_that_of_the_file_at_that_step(tmp_path, name, storage):
    layout = layout_of(name)
    theta_0, files = Arrays(layout), written(tmp_path, layout, storage)
    for file in files:
        wanted = expected(file.layer, theta_0, storage, HISTORY)
        with (
            LayerReader.of_file(file, HISTORY, STEPS, Threads(2), theta_0=theta_0.open) as late,
            LayerReader.of_theta_0(file.format, theta_0, HISTORY, ALONE) as replayed,
        ):
            for tensor in file.layer.tensors:
                start, count = (tensor.width, tensor.size - tensor.width) if tensor.rows > 1 else (0, tensor.size)
                for reader in (late, replayed):
                    assert np.array_equal(reader.part(tensor, start, count).data, wanted[tensor.name][0][start : start + count])


def test_theta_0_is_not_opened_for_other_records(tmp_path):
    layout = layout_of("tied")
    theta_0, files = Arrays(layout), written(tmp_path, layout, "fp32")
    store.advance_layer(files[1], theta_0.open, records(STEPS), STEPS, None, ALONE)
    assert not theta_0.opened
