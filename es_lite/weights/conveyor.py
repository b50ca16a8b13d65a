"""Sections of layers on their way from their files into buffers and back: a reader's and a writer's thread.

Three buffers go round: one is being filled, one is in use, one is being written. A buffer holds a block; the vocabulary's
matrices pass in sections of about that size. Sections come in the order they are used in.
"""

import contextlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from es_lite.algorithm.record import Record
from es_lite.errors import RunError, UserError
from es_lite.weights.layerfile import FileWriter, Front, LayerFile, Section
from es_lite.weights.layout import Layout
from es_lite.weights.rawio import ALIGNMENT, REMEDY, open_file, read_aligned
from es_lite.weights.stored import stored_bytes

BUFFERS = 3

VOCABULARY_ROWS = 2048
"""Sections of a vocabulary's matrix are multiples of this many rows, which the head takes at a time."""


def cut(file: LayerFile, layout: Layout) -> list[Section]:
    """The sections that a layer passes in: a block whole, a vocabulary's matrix in parts of about a block's size."""
    if file.layer.block or not file.matrices:
        return [file.whole]
    return file.sections(max(stored_bytes(block, file.storage) for block in layout.blocks), VOCABULARY_ROWS)


def buffer_bytes(files: Sequence[LayerFile], layout: Layout) -> int:
    """Size of one of the BUFFERS."""
    largest = max(section.high - section.low for file in files for section in cut(file, layout))
    return max(ALIGNMENT, -(-largest // ALIGNMENT) * ALIGNMENT)


@dataclass
class PassingLayer:
    """A layer on its way through."""

    file: LayerFile
    front: Front
    """Brought level as the layer passes."""
    found: Front
    """As it was read."""
    needed: list[Record]
    """What brings it level; where there is any, it is written."""
    hash: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)
    """Of what was read."""


class Buffer:
    """Page-aligned memory that goes round: free again when all that hold it have released it."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
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
    """Whoever took it still uses the buffer."""


class Conveyor:
    """One pass: `take` gives the sections in order, `send` has one written, `release` ends its use."""

    def __init__(
        self, buffers: Sequence[Buffer], layers: Callable[[], Iterable[PassingLayer]], layout: Layout, direct: bool, step: int
    ) -> None:
        """layers: those that pass, in order, met as the reader gets to them. step: at which they are written."""
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
        """Waits until all that was sent is in its file. Raises RunError where the disk did not take it."""
        self._free.put(None)  # for a reader that waits: the pass was cut short
        self._written.put(None)
        self._reader.join()
        self._writer.join()
        if self._failure and kind is None:
            raise self._failure

    def take(self) -> Filled:
        """The next section. Raises UserError where its file is damaged, RunError where the disk gives or takes no more."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        if self._failure:
            raise self._failure
        item.held, item.buffer.holders = True, 1
        return item

    def send(self, filled: Filled) -> None:
        """Has the section written, as it is from now on; a layer's last one puts its new file in place."""
        filled.buffer.holders += 1  # before the writer can see it
        self._written.put(filled)

    def release(self, filled: Filled) -> None:
        """Ends the use of a section that was taken; once more does nothing."""
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
                descriptor = open_file(layer.file.path, os.O_RDONLY, self._direct)
                try:
                    sections = cut(layer.file, self._layout)
                    for section in sections:
                        buffer = self._free.get()
                        if buffer is None:
                            return
                        size = section.high - section.low
                        read_aligned(descriptor, memoryview(buffer.array), section.low, size, layer.file.path)
                        layer.hash.update(buffer.array[:size])
                        last = section is sections[-1]
                        if last:
                            layer.file.check(layer.hash, layer.found)
                        self._ready.put(Filled(layer, section, last, buffer))
                finally:
                    os.close(descriptor)
        except OSError as error:
            self._ready.put(UserError(f"{error.filename}: cannot be read ({error.strerror}); {REMEDY}"))
        except BaseException as error:
            self._ready.put(error)

    def _write(self) -> None:
        """The writer's thread."""
        writer: FileWriter | None = None
        while filled := self._written.get():
            layer = filled.layer
            if not self._failure:
                try:
                    writer = writer or FileWriter(layer.file, self._direct)
                    writer.write(filled.section, memoryview(filled.buffer.array))
                    if filled.last:
                        writer.finish(layer.front, self._step)
                        writer = None
                except OSError as error:
                    self._failure = RunError(
                        f"{layer.file.path}: cannot be written ({error.strerror}); the journal has the step, and the layer "
                        "is as it was: resume when there is room"
                    )
            self._drop(filled.buffer)
        if writer:
            writer.discard()
