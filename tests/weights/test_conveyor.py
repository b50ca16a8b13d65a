"""The conveyor: how layers are cut into sections, and three buffers that circulate between reader, user and writer."""

import os
import threading
from collections import Counter

import pytest
from layers import ALONE, MODELS, STORAGES, TYPES, asked, bits_of, flip, layout_of, records, streamed, written

from es_lite.errors import DamagedFile
from es_lite.files import ALIGNMENT
from es_lite.weights import conveyor, store, stream
from es_lite.weights.conveyor import Buffer, Conveyor, PassingLayer
from es_lite.weights.parts import stored_bytes
from es_lite.weights.reading import LayerReader

STEPS = 3
pytestmark = pytest.mark.usefixtures("small_sections")


@MODELS
@pytest.mark.parametrize("storage", STORAGES)
def test_a_block_passes_whole_and_a_vocabulary_in_parts_that_fit_a_buffer(tmp_path, name, storage):
    layout = layout_of(name)
    files = store.Store(tmp_path, layout, storage).files
    size = conveyor.buffer_bytes(files, layout)
    assert size % ALIGNMENT == 0
    largest = max(stored_bytes(block, storage) for block in layout.blocks)
    for file in files:
        sections = conveyor.sections_of(file, layout)
        if file.layer.block or not file.format.matrices:
            assert sections == [file.format.whole]
        else:
            assert sections == file.format.sections(largest, conveyor.VOCABULARY_ROWS)
        assert (sections[0].low, sections[-1].high) == (file.format.front_bytes, file.format.size)
        assert all(section.bytes <= size for section in sections)


@TYPES
def test_three_buffers_circulate(tmp_path, monkeypatch, storage, working):
    """They are as large as the largest section; any number of passes uses the same three."""
    layout, made = layout_of("untied"), []
    files = written(tmp_path, layout, storage)
    original, loading = stream.Buffer, LayerReader.load
    filled: Counter[int] = Counter()
    monkeypatch.setattr(stream, "Buffer", lambda size: made.append(original(size)) or made[-1])

    def load(self, section, out):
        filled[out.ctypes.data] += 1
        loading(self, section, out)

    monkeypatch.setattr(LayerReader, "load", load)
    weights = streamed(files, layout, working, STEPS)
    for step in (1, 2, 2, STEPS):
        weights.advance(records(step), step)
        list(asked(weights, layout))
    assert len(made) == conveyor.BUFFERS == 3
    assert filled.keys() == {buffer.array.ctypes.data for buffer in made}
    assert {buffer.array.size for buffer in made} == {conveyor.buffer_bytes(files, layout)}
    assert all(section.bytes <= made[0].array.size for file in files for section in conveyor.sections_of(file, layout))
    assert sum(filled.values()) > 3 * len(made), "each of them has been used several times"


class Passing:
    """A pass over all layers of a tiny model, in the layout's order."""

    def __init__(self, folder, step: int) -> None:
        self.layout = layout_of("tied")
        self.files = written(folder, self.layout, "bf16")
        self.opened: list[str] = []
        buffers = [Buffer(conveyor.buffer_bytes(self.files, self.layout)) for _ in range(conveyor.BUFFERS)]

        def layers():
            for file in self.files:
                self.opened.append(file.layer.name)
                yield PassingLayer(file, LayerReader.of_file(file, records(step), step, ALONE, direct=True))

        self.conveyor = Conveyor(buffers, layers, self.layout, True, step)


def test_sections_come_in_order_and_layers_are_opened_when_the_reader_gets_to_them(tmp_path):
    passing = Passing(tmp_path, 0)
    before = bits_of(passing.files)
    with passing.conveyor as taking:
        for file in passing.files:
            sections = conveyor.sections_of(file, passing.layout)
            for section in sections:
                filled = taking.take()
                assert (filled.layer.file, filled.section, filled.last) == (file, section, section is sections[-1])
                data = filled.buffer.array[: section.bytes].tobytes()
                assert data == before[file.path.name][section.low : section.high]
                taking.release(filled)
    assert passing.opened == [layer.name for layer in passing.layout.layers]
    assert bits_of(passing.files) == before, "nothing was sent"


def test_no_more_sections_are_read_than_there_are_buffers(tmp_path):
    """The reader waits until a buffer is free."""
    passing = Passing(tmp_path, 0)
    with passing.conveyor as taking:
        held = [taking.take() for _ in range(conveyor.BUFFERS)]
        assert len({id(filled.buffer) for filled in held}) == conveyor.BUFFERS
        assert taking._ready.empty()
        taking.release(held[0])
        assert taking.take().buffer is held[0].buffer
        assert taking._ready.empty()


def test_what_is_sent_is_written_even_if_it_is_released_at_once(tmp_path):
    passing = Passing(tmp_path / "passed", 2)
    wanted = bits_of(written(tmp_path / "advanced", passing.layout, "bf16", 2))
    with passing.conveyor as taking:
        for file in passing.files:
            last = False
            while not last:
                filled = taking.take()
                last, reader = filled.last, filled.layer.reader
                reader.advance(filled.section, filled.buffer.array)
                if last:
                    reader.small()
                taking.send(filled)
                taking.release(filled)
            assert filled.layer.file == file
    assert bits_of(passing.files) == wanted


def test_a_buffer_is_not_free_before_it_is_written_however_often_it_is_released(tmp_path, monkeypatch):
    passing, write, may_write = Passing(tmp_path, 2), os.pwrite, threading.Event()
    monkeypatch.setattr(os, "pwrite", lambda *arguments: may_write.wait(20) and write(*arguments))
    with passing.conveyor as taking:
        filled = taking.take()
        taking.send(filled)
        for _ in range(3):
            taking.release(filled)
            assert filled.buffer.holders == 1, "the writer"
        may_write.set()
    assert filled.buffer.holders == 0


def test_a_damaged_layer_is_an_error_of_take(tmp_path):
    """Instead of its last section, so the layer cannot be written."""
    passing = Passing(tmp_path, 0)
    damaged = passing.files[0]
    flip(damaged.path, damaged.format.size - 5)
    sections = conveyor.sections_of(damaged, passing.layout)
    assert len(sections) > 1
    with passing.conveyor as taking:
        for _ in sections[:-1]:
            taking.release(taking.take())
        with pytest.raises(DamagedFile, match=f"{damaged.path}: its checksum does not match"):
            taking.take()
