"""A reader and a writer thread, which carry sections of layers from their files into buffers and back.

Three buffers circulate: one is being filled, one is in use, one is being written. A buffer holds a decoder block; the
vocabulary's matrices pass in sections of about that size.
"""

import contextlib
import mmap
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from es_lite.errors import RunError
from es_lite.files import ALIGNMENT, aligned, view_of
from es_lite.model.layout import Layout
from es_lite.weights.layer_file import FileWriter, LayerFile
from es_lite.weights.layer_format import Section
from es_lite.weights.parts import stored_bytes
from es_lite.weights.reading import LayerReader

BUFFERS = 3

VOCABULARY_ROWS = 2048
"""Sections of a vocabulary matrix are multiples of this many rows, which the head processes at a time."""


def sections_of(file: LayerFile, layout: Layout) -> list[Section]:
    """How a layer passes: a decoder block whole, a vocabulary matrix in sections of about a block's size."""
    if file.layer.block or not file.format.matrices:
        return [file.format.whole]
    largest = max(stored_bytes(block, file.format.storage) for block in layout.blocks)
    return file.format.sections(largest, VOCABULARY_ROWS)


def buffer_bytes(files: Sequence[LayerFile], layout: Layout) -> int:
    """Size of each of the BUFFERS."""
    largest = max(section.bytes for file in files for section in sections_of(file, layout))
    return max(ALIGNMENT, aligned(largest))


@dataclass(frozen=True)
class PassingLayer:
    """A layer on its way through memory."""

    file: LayerFile
    reader: LayerReader


class Buffer:
    """Page-aligned memory, free again when all its holders (the user, the writer) have released it."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.array = np.frombuffer(memory, np.uint8)
        self.holders = 0
        self.lock = threading.Lock()


@dataclass
class Filled:
    """A section of a layer in a buffer."""

    layer: PassingLayer
    section: Section
    last: bool
    buffer: Buffer
    held: bool = False
    """Whether the user has taken and not yet released it."""


class Conveyor:
    """One pass: `take` returns the sections in order, `send` queues one for writing, `release` ends its use."""

    def __init__(
        self, buffers: Sequence[Buffer], layers: Callable[[], Iterable[PassingLayer]], layout: Layout, direct: bool, step: int
    ) -> None:
        """layers: in the order of the pass, each opened when the reader reaches it. step: of the layers that are written."""
        self._layers = layers
        self._layout = layout
        self._direct = direct
        self._step = step
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Filled | BaseException] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[Filled | None] = queue.SimpleQueue()
        self._failure: RunError | None = None
        for buffer in buffers:
            buffer.holders = 0
            self._free.put(buffer)
        self._reader = threading.Thread(target=self._read, name="layer-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="layer-writer", daemon=True)

    def __enter__(self) -> "Conveyor":
        self._reader.start()
        self._writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits until everything that was sent is written. Raises RunError if the disk is full."""
        self._free.put(None)  # ends a reader that waits for a buffer, if the pass was cut short
        self._written.put(None)
        self._reader.join()
        self._writer.join()
        if self._failure and kind is None:
            raise self._failure

    def take(self) -> Filled:
        """The next section. Raises DamagedFile if its file is damaged, RunError if an earlier layer could not be written."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        if self._failure:
            raise self._failure
        item.held, item.buffer.holders = True, 1
        return item

    def send(self, filled: Filled) -> None:
        """Queues the section for writing; it must no longer change. A layer's last section puts its new file in place."""
        filled.buffer.holders += 1  # before the writer can see it
        self._written.put(filled)

    def release(self, filled: Filled) -> None:
        """Ends the use of a section that was taken; a second call does nothing."""
        if filled.held:
            filled.held = False
            self._drop(filled.buffer)

    def _drop(self, buffer: Buffer) -> None:
        with buffer.lock:
            buffer.holders -= 1
            if buffer.holders == 0:
                self._free.put(buffer)

    def _read(self) -> None:
        """The reader's thread."""
        try:
            for layer in self._layers():
                with layer.reader as reader:
                    sections = sections_of(layer.file, self._layout)
                    for section in sections:
                        buffer = self._free.get()
                        if buffer is None:
                            return
                        reader.load(section, buffer.array[: aligned(section.bytes)])
                        last = section is sections[-1]
                        if last:
                            reader.verify()
                        self._ready.put(Filled(layer, section, last, buffer))
        except BaseException as error:
            self._ready.put(error)

    def _write(self) -> None:
        """The writer's thread."""
        writer: FileWriter | None = None
        while filled := self._written.get():
            file = filled.layer.file
            if not self._failure:
                try:
                    writer = writer or FileWriter(file, self._direct)
                    writer.write(filled.section, view_of(filled.buffer.array))
                    if filled.last:
                        writer.finish(filled.layer.reader.front, self._step)
                        writer = None
                except OSError as error:
                    self._failure = RunError(
                        f"{file.path}: cannot be written ({error.strerror}); the journal has the step and the layer is as it "
                        "was: free some space, then add --resume"
                    )
            self._drop(filled.buffer)
        if writer:
            writer.discard()
