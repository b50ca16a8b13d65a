"""The working copy: what it holds is the store rounded to nearest, nothing overlaps, and only the update can write to it."""

import errno
import os

import numpy as np
import pytest
from layers import ALONE, MODELS, TYPES, Arrays, expected, files_of, layout_of, records, seen, working_copy, written
from plain import as_float32, same_bits, stored_as

from es_lite.algorithm.jit import Threads
from es_lite.errors import RunError
from es_lite.weights import store
from es_lite.weights.parts import Part, dtype_of
from es_lite.weights.working_copy import PAGE, WorkingCopy, allocate, size_bytes

STEPS = 4


@MODELS
@TYPES
@pytest.mark.parametrize("fresh", [True, False], ids=["from theta_0", "from files"])
def test_it_is_the_layer_rounded_to_nearest(tmp_path, monkeypatch, name, storage, working, fresh):
    """Or the same bits, if both are stored alike; also if the files hold the step already, and in several sections."""
    layout = layout_of(name)
    theta_0 = Arrays(layout)
    monkeypatch.setattr(store, "SECTION_BYTES", 5000)
    files = files_of(tmp_path, layout, storage) if fresh else written(tmp_path, layout, storage, STEPS)
    with working_copy(layout, working) as copy:
        for file in files:
            store.advance_layer(file, theta_0.open, records(STEPS), STEPS, copy, Threads(2))
        for file in files:
            wanted = expected(file.layer, theta_0, storage, records(STEPS))
            for tensor in file.layer.tensors:
                stored, scales = wanted[tensor.name]
                if storage != working:
                    stored, scales = stored_as(dtype_of(tensor, working), as_float32(stored, scales, tensor.width), tensor.width)
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
@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_no_two_tensors_overlap_and_layers_begin_on_pages(name, storage):
    """Filling one tensor after the other with a value of its own leaves each with its value."""
    layout = layout_of(name)
    with working_copy(layout, storage) as copy:
        for number, tensor in enumerate(layout.tensors, start=1):
            part = Part.empty(tensor, 0, tensor.size, storage)
            part.data[:], part.scales[:] = number, number
            copy.write(part, ALONE)
        for number, tensor in enumerate(layout.tensors, start=1):
            part = copy.part(tensor)
            assert (part.data == number).all() and (part.scales == number).all()
        starts = [copy.part(layer.tensors[0]).data.ctypes.data for layer in layout.layers]
        assert all((start - starts[0]) % PAGE == 0 for start in starts)
        assert size_bytes(layout, storage) % PAGE == 0


def test_every_process_sees_what_is_written_through_the_descriptor():
    """A second view of the same descriptor, as another worker has, shows later writes."""
    layout = layout_of("tied")
    tensor = layout.layers[1].tensors[0]
    descriptor = allocate(layout, "int8")
    first, second = WorkingCopy(layout, "int8", descriptor), WorkingCopy(layout, "int8", descriptor)
    seen_by_second = second.part(tensor)
    assert not seen_by_second.data.any()
    some = Part.empty(tensor, 2 * tensor.width, 3 * tensor.width, "fp32")
    some.data[:] = np.arange(some.data.size) + 1
    first.write(some, ALONE)
    assert seen(seen_by_second) == seen(first.part(tensor))
    data = seen_by_second.data.reshape(tensor.shape)
    assert data[2:5].all() and not data[:2].any() and not data[5:].any()
    assert np.flatnonzero(seen_by_second.scales).tolist() == [2, 3, 4]
    os.close(descriptor)


def test_it_can_only_be_written_through_the_descriptor():
    layout = layout_of("tied")
    with working_copy(layout, "bf16") as copy:
        data = copy.part(layout.tensors[0]).data
        with pytest.raises(ValueError, match="read-only"):
            data[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            data.flags.writeable = True


def test_too_little_memory_is_an_error_of_the_run(monkeypatch):
    layout = layout_of("tied")

    def pwrite(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with working_copy(layout, "bf16") as copy:
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(RunError, match=r"working copy .*too little memory"):
            copy.write(Part.empty(layout.tensors[0], 0, layout.tensors[0].size, "bf16"), ALONE)


def test_without_memfd_it_is_an_unlinked_file(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    layout = layout_of("tied")
    with working_copy(layout, "bf16") as copy:
        assert list(tmp_path.iterdir()) == []
        part = Part.empty(layout.tensors[0], 0, layout.tensors[0].size, "bf16")
        part.data[:] = 3
        copy.write(part, ALONE)
        assert (copy.part(layout.tensors[0]).data == 3).all()
