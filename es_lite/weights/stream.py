"""Layers that pass through memory: read ahead in the order of their use, brought level as they pass, written behind.

A pass takes every layer from its file once. What the journal holds beyond the step that a file stands at is applied
while the layer is in memory, so a step reads each byte of a weight at most once and writes it at most once, however many
members and samples there are. Two threads beside the computation, and three buffers that go round: one is being
filled, one is in use, one is being written. A buffer holds a block; the vocabulary's matrices pass in sections of that size.

    reader ──▶ section in a buffer ──▶ advance ──▶ the doors score from it ──▶ buffer free
                                          └──────▶ writer ──▶ file.next ──▶ rename

The rows of the embedding that a batch uses are read by themselves; its matrix passes only to be written, or as the head.
"""

import contextlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.errors import RunError, UserError
from es_lite.weights.layerfile import ALIGNMENT, REMEDY, FileReader, FileWriter, Front, LayerFile, Section, open_direct
from es_lite.weights.layout import Layer, Layout, Tensor
from es_lite.weights.store import due
from es_lite.weights.stored import Part, Storage, dtype_of, scales_of, stored_bytes

BUFFERS = 3

READ_BYTES = 16 * 2**20
"""Bytes asked of the disk at a time."""

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
class _Layer:
    """A layer on its way through."""

    file: LayerFile
    front: Front
    """Brought level as the layer passes."""
    found: Front
    """As it was read."""
    needed: list[Record]
    hash: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)
    """Of what was read."""
    writer: FileWriter | None = None


@dataclass
class _Filled:
    """A section of a layer in a buffer."""

    layer: _Layer
    section: Section
    last: bool
    buffer: "_Buffer"
    in_use: bool = False
    """The doors score from the buffer itself."""


class _Buffer:
    """Page-aligned memory that goes round: free again when all that hold it have released it."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.array = np.frombuffer(memory, np.uint8)
        self.holders = 0
        self.lock = threading.Lock()


class Stream:
    """The weights of a model that need not fit in memory. One pass at a time, used by one thread.

    In a pass, what is asked for must come in the model's own order: rows of the embedding, the blocks, the final norm, the head.
    """

    def __init__(
        self,
        files: Sequence[LayerFile],
        layout: Layout,
        working: Storage,
        threads: Threads,
        direct: bool,
        progress: Callable[[int], None],
    ) -> None:
        """files: of the layers, in order; working: what the doors are given, "bf16" or "int8".

        direct: go past the page cache, where the file system can. progress: is told the parameters of each section that is done.
        """
        self._files = files
        self._layout = layout
        self._working: Storage = working
        self._threads = threads
        self._direct = direct
        self._progress = progress
        self._records: Sequence[Record] = ()
        self._step = 0
        self._buffers: list[_Buffer] = []
        self._arena = np.empty(0, np.uint8)
        """Where the store is not what the doors are given: the converted section, as long as it is in use."""

    def target(self, records: Sequence[Record], step: int) -> None:
        """What the next passes bring the layers to: `step`, by records that reach there from wherever a file stands."""
        self._records, self._step = records, step

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """One pass over all layers, at whose end every file stands at the target's step.

        Raises UserError where a file is damaged, RunError where the disk does not take it; layers that have passed
        then stand at the target's step, the others where they stood.
        """
        if not self._buffers:
            size = buffer_bytes(self._files, self._layout)
            self._buffers = [_Buffer(size) for _ in range(BUFFERS)]
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Filled | BaseException] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[_Filled | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        for buffer in self._buffers:
            self._free.put(buffer)
        ends = [self._meet(self._files[0]), self._meet(self._files[-1])]
        self._parts: dict[str, Part] = {}
        """What the doors can ask for whole: the small tensors beside the blocks, and those of the block that is open."""
        for end in ends:
            for part in end.front.small.values():
                part.advance(end.needed, self._threads)
                self._parts[part.tensor.name] = self._convert([part], apart=True)[0]
        self._head, other = ends if self._layout.tied else ends[::-1]
        rest = [other] if other.needed else []
        reader = threading.Thread(target=self._read, args=(self._head, rest), name="layer-reader", daemon=True)
        writer = threading.Thread(target=self._write, name="layer-writer", daemon=True)
        reader.start()
        writer.start()
        try:
            yield
            for layer in rest:
                for filled in self._sections(layer):
                    self._bring_level(filled)
                    self._finished(filled)
        finally:
            self._free.put(None)  # for a reader that waits: the pass was cut short
            self._written.put(None)
            reader.join()
            writer.join()
        if self._failure:
            raise self._failure

    @contextlib.contextmanager
    def opened(self, layer: Layer) -> Iterator[None]:
        """While a block is used: its tensors can be asked for."""
        if not layer.block:
            yield
            return
        filled = self._take()
        assert filled.layer.file.layer == layer, "blocks are asked for out of order"
        before = self._parts
        parts = self._use(filled)
        small = [self._convert([part], apart=True)[0] for part in filled.layer.front.small.values()]
        self._parts = before | {part.tensor.name: part for part in [*parts, *small]}
        yield
        self._parts = before
        self._finished(filled)

    def part(self, tensor: Tensor) -> Part:
        """The whole tensor: of the open block, or a small one beside the blocks."""
        return self._parts[tensor.name]

    def blocks(self, tensor: Tensor, rows: int) -> Iterator[Part]:
        """The head's matrix in blocks of `rows` rows, a divisor of VOCABULARY_ROWS, in order."""
        step = rows * tensor.width
        for filled in self._sections(self._head):
            (whole,) = self._use(filled)
            for low in range(0, whole.data.size, step):
                yield Part(tensor, whole.start + low, whole.data[low : low + step], whole.scales)
            self._finished(filled)

    def rows(self, tensor: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows `rows`, int64 [R], of the embedding, brought level, for the doors: [R, W], and scales, [R] or empty."""
        file = self._files[0]
        data = np.empty((rows.size, tensor.width), dtype_of(tensor, file.storage))
        scales = np.empty(rows.size if scales_of(tensor, file.storage) else 0, np.float32)
        with FileReader(file) as reader:
            needed = due(file, self._records, reader.front.step, self._step)

            def some(low: int, high: int) -> None:
                for i in range(low, high):
                    part = reader.part(tensor, int(rows[i]) * tensor.width, tensor.width)
                    part.advance(needed, _ALONE)
                    data[i] = part.data
                    if scales.size:
                        scales[i] = part.scales[rows[i]]

            self._threads.each(rows.size, some, least=16)
        if data.dtype == dtype_of(tensor, self._working):
            return data, scales
        few = Tensor(tensor.name, (rows.size, tensor.width), 0, 1.0, 1.0, 1.0)  # those rows as a matrix of their own
        (part,) = self._convert([Part(few, 0, data.reshape(-1))], apart=True)
        return part.data.reshape(few.shape), part.scales

    def _meet(self, file: LayerFile) -> _Layer:
        with FileReader(file) as reader:
            found = file.parse(file.front(reader.front), file.size)
            return _Layer(file, reader.front, found, due(file, self._records, reader.front.step, self._step))

    def _read(self, head: _Layer, rest: Sequence[_Layer]) -> None:
        """The reader's thread: every section, in the order of its use."""
        try:
            for layer in (*map(self._meet, self._files[1:-1]), head, *rest):
                flags = os.O_RDONLY | os.O_CLOEXEC
                descriptor = open_direct(layer.file.path, flags) if self._direct else os.open(layer.file.path, flags)
                try:
                    sections = cut(layer.file, self._layout)
                    for section in sections:
                        buffer = self._free.get()
                        if buffer is None:
                            return
                        _fill(descriptor, memoryview(buffer.array), section, layer.file)
                        layer.hash.update(buffer.array[: section.high - section.low])
                        last = section is sections[-1]
                        if last:
                            layer.file.check(layer.hash, layer.found)
                        self._ready.put(_Filled(layer, section, last, buffer))
                finally:
                    os.close(descriptor)
        except OSError as error:
            self._ready.put(RunError(f"{error.filename or 'a layer'}: cannot be read ({error.strerror})"))
        except BaseException as error:
            self._ready.put(error)

    def _write(self) -> None:
        """The writer's thread: sections that were brought level, each layer's in order."""
        layer: _Layer | None = None
        while filled := self._written.get():
            layer = filled.layer
            if not self._failure:
                try:
                    if layer.writer is None:
                        layer.writer = FileWriter(layer.file, self._direct)
                    layer.writer.write(filled.section, memoryview(filled.buffer.array))
                    if filled.last:
                        layer.writer.finish(layer.front, self._step)
                        layer.writer = None
                except OSError as error:
                    self._failure = RunError(
                        f"{layer.file.path}: cannot be written ({error.strerror}); the journal has the step, and the layer "
                        "is as it was: resume when there is room"
                    )
            self._release(filled.buffer)
        if layer and layer.writer:
            layer.writer.discard()

    def _take(self) -> _Filled:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        if self._failure:
            raise self._failure
        return item

    def _sections(self, layer: _Layer) -> Iterator[_Filled]:
        """The sections of a layer beside the blocks, as they come."""
        last = False
        while not last:
            filled = self._take()
            assert filled.layer is layer, "layers are asked for out of order"
            last = filled.last
            yield filled

    def _bring_level(self, filled: _Filled) -> list[Part]:
        """The section's parts, level with the target, and on their way to the file where they were not."""
        layer = filled.layer
        parts = layer.file.views(filled.section, filled.buffer.array, layer.front)
        if layer.needed:
            for part in [*parts, *(layer.front.small.values() if layer.file.layer.block else ())]:
                part.advance(layer.needed, self._threads)
        filled.in_use = True
        filled.buffer.holders = 1 + bool(layer.needed)
        if layer.needed:
            self._written.put(filled)
        return parts

    def _use(self, filled: _Filled) -> list[Part]:
        """The section's parts as the doors take them, until it is finished."""
        parts = self._bring_level(filled)
        if self._working == filled.layer.file.storage:
            return parts
        converted = self._convert(parts)
        filled.in_use = False
        self._release(filled.buffer)
        return converted

    def _finished(self, filled: _Filled) -> None:
        if filled.in_use:
            self._release(filled.buffer)
        self._progress(sum(count for _, _, count in filled.section.parts))

    def _release(self, buffer: _Buffer) -> None:
        with buffer.lock:
            buffer.holders -= 1
            if buffer.holders == 0:
                self._free.put(buffer)

    def _convert(self, parts: Sequence[Part], apart: bool = False) -> list[Part]:
        """The parts as the doors take them: themselves, or conversions, in the arena unless they are to be `apart`."""
        types = [dtype_of(part.tensor, self._working) for part in parts]
        size = sum(-(-part.data.size * dtype.itemsize // 64) * 64 for part, dtype in zip(parts, types, strict=True))
        if not apart and self._arena.size < size:
            self._arena = np.empty(size, np.uint8)
        converted, position = [], 0
        for part, dtype in zip(parts, types, strict=True):
            if part.data.dtype == dtype:
                converted.append(part)
                continue
            bytes_ = part.data.size * dtype.itemsize
            room = np.empty(bytes_, np.uint8) if apart else self._arena[position : position + bytes_]
            position += -(-bytes_ // 64) * 64
            new = Part(part.tensor, part.start, room.view(dtype), np.zeros(scales_of(part.tensor, self._working), np.float32))
            new.put(part.float32(), self._threads)
            converted.append(new)
        return converted


def _fill(descriptor: int, view: memoryview, section: Section, file: LayerFile) -> None:
    """Reads a section, in aligned pieces, which may reach beyond its end."""
    size, done = section.high - section.low, 0
    while done < size:
        end = min(done + READ_BYTES, -(-size // ALIGNMENT) * ALIGNMENT)
        got = os.preadv(descriptor, [view[done:end]], section.low + done)
        if got == 0:
            raise UserError(f"{file.path}: ends too soon; {REMEDY}")
        done += got


_ALONE = Threads(1)
