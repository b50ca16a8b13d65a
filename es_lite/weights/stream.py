"""The weights of a model that need not fit in memory: layers pass through it, and are brought to the current step on the way.

A pass reads every layer from its file once. The records beyond the step that a file stands at are applied
while the layer is in memory, so a step reads each byte of a weight at most once and writes it at most once, however many
members and samples there are:

    reader ──▶ section in a buffer ──▶ advance ──▶ it is scored from ──▶ buffer free
                                          └──────▶ writer ──▶ file.next ──▶ rename

The rows of the embedding that a batch uses are read on their own; its matrix passes only to be written, or as the head.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from es_lite.algorithm.formats import Storage
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.model.layout import Layer, Layout, Tensor
from es_lite.weights.conveyor import BUFFERS, Buffer, Conveyor, Filled, PassingLayer, buffer_bytes
from es_lite.weights.layer_file import LayerFile
from es_lite.weights.parts import Part, dtype_of, scales_of
from es_lite.weights.reading import LayerReader

_ALONE = Threads(1)


class Stream:
    """One pass at a time, used by one thread.

    Within a pass, tensors must be asked for in the model's own order: rows of the embedding, blocks, final norm, head.
    """

    def __init__(
        self,
        files: Sequence[LayerFile],
        layout: Layout,
        working: Storage,
        threads: Threads,
        direct: bool,
    ) -> None:
        """files: of the layers, in order; working: what scoring is given, "bf16" or "int8".

        direct: bypass the page cache if possible.
        """
        self._files = files
        self._layout = layout
        self._working: Storage = working
        self._threads = threads
        self._direct = direct
        self._records: Sequence[Record] = ()
        self._step = 0
        self._buffers: list[Buffer] = []
        self._parts: dict[str, Part] = {}
        """What can be asked for whole: the small tensors outside the blocks, and the tensors of the open block."""
        self._arena = np.empty(0, np.uint8)
        """If the store is not what scoring is given: the converted section, while it is in use."""

    def advance(self, records: Sequence[Record], step: int) -> None:
        """Defers an update: the next pass brings the layers to `step`, by records that lead there from wherever a file stands."""
        self._records, self._step = records, step

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """One pass over all layers; at its end every file stands at the step that `advance` was given.

        Raises DamagedFile if a file is damaged, RunError if the disk is full; layers that have passed
        then stand at that step, the others where they stood.
        """
        if not self._buffers:
            size = buffer_bytes(self._files, self._layout)
            self._buffers = [Buffer(size) for _ in range(BUFFERS)]
        with contextlib.ExitStack() as opened:
            ends: list[PassingLayer] = []
            self._parts = {}
            for file in (self._files[0], self._files[-1]):
                end = self._open(file)
                opened.callback(end.reader.close)
                ends.append(end)
                self._parts |= {part.tensor.name: self._convert([part], own_memory=True)[0] for part in end.reader.small()}
            self._head, other = ends if self._layout.tied else ends[::-1]
            # It passes only to be written or, if it has no matrices, to be checked.
            rest = [other] if other.reader.needed or not other.file.format.matrices else []

            def layers() -> Iterator[PassingLayer]:
                yield from map(self._open, self._files[1:-1])
                yield from (self._head, *rest)

            with Conveyor(self._buffers, layers, self._layout, self._direct, self._step) as self._conveyor:
                yield
                for layer in rest:
                    for filled in self._sections(layer):
                        self._advance(filled)
                        self._conveyor.release(filled)

    @contextlib.contextmanager
    def opened(self, layer: Layer) -> Iterator[None]:
        """While a block is used: its tensors can be asked for."""
        if not layer.block:
            yield
            return
        filled = self._conveyor.take()
        assert filled.layer.file.layer == layer, "blocks are asked for out of order"
        before, parts = self._parts, self._use(filled)
        small = [self._convert([part], own_memory=True)[0] for part in filled.layer.reader.front.small.values()]
        self._parts = before | {part.tensor.name: part for part in [*parts, *small]}
        yield
        self._parts = before
        self._conveyor.release(filled)

    def part(self, tensor: Tensor) -> Part:
        """The whole tensor: one of the open block, or a small one outside the blocks."""
        return self._parts[tensor.name]

    def blocks(self, tensor: Tensor, rows: int) -> Iterator[Part]:
        """The head's matrix in blocks of `rows` rows, which divide VOCABULARY_ROWS, in order."""
        step = rows * tensor.width
        for filled in self._sections(self._head):
            (whole,) = self._use(filled)
            for low in range(0, whole.data.size, step):
                yield Part(tensor, whole.start + low, whole.data[low : low + step], whole.scales)
            self._conveyor.release(filled)

    def rows(self, tensor: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows `rows`, int64 [R], of the embedding at the current step: [R, W], and their scales, [R] or empty."""
        file = self._files[0]
        data = np.empty((rows.size, tensor.width), dtype_of(tensor, file.format.storage))
        scales = np.empty(rows.size if scales_of(tensor, file.format.storage) else 0, np.float32)
        with LayerReader.of_file(file, self._records, self._step, _ALONE) as reader:

            def some(low: int, high: int) -> None:
                for i in range(low, high):
                    part = reader.part(tensor, int(rows[i]) * tensor.width, tensor.width)
                    data[i] = part.data
                    if scales.size:
                        scales[i] = part.scales[rows[i]]

            self._threads.each(rows.size, some, least=16)
        if data.dtype == dtype_of(tensor, self._working):
            return data, scales
        few = replace(tensor, shape=(rows.size, tensor.width))  # those rows as a matrix of their own
        (part,) = self._convert([Part(few, 0, data.reshape(-1))], own_memory=True)
        return part.data.reshape(few.shape), part.scales

    def _open(self, file: LayerFile) -> PassingLayer:
        return PassingLayer(file, LayerReader.of_file(file, self._records, self._step, self._threads, self._direct))

    def _sections(self, layer: PassingLayer) -> Iterator[Filled]:
        """The sections of a layer outside the blocks, as they come."""
        last = False
        while not last:
            filled = self._conveyor.take()
            assert filled.layer is layer, "layers are asked for out of order"
            last = filled.last
            yield filled

    def _advance(self, filled: Filled) -> list[Part]:
        """The section's parts, brought to the current step, and on their way to the file if they were not there yet."""
        reader = filled.layer.reader
        parts = reader.advance(filled.section, filled.buffer.array)
        if filled.layer.file.layer.block:
            reader.small()
        if reader.needed:
            self._conveyor.send(filled)
        return parts

    def _use(self, filled: Filled) -> list[Part]:
        """The section's parts as scoring takes them, until it is finished."""
        parts = self._advance(filled)
        if self._working == filled.layer.file.format.storage:
            return parts
        converted = self._convert(parts)
        self._conveyor.release(filled)
        return converted

    def _convert(self, parts: Sequence[Part], own_memory: bool = False) -> list[Part]:
        """The parts as scoring takes them: themselves, or converted, in the arena unless they need memory of their own."""
        types = [dtype_of(part.tensor, self._working) for part in parts]
        sizes = [-(-part.data.size * dtype.itemsize // 64) * 64 for part, dtype in zip(parts, types, strict=True)]
        if not own_memory and self._arena.size < sum(sizes):
            self._arena = np.empty(0, np.uint8)  # free the old one first
            self._arena = np.empty(sum(sizes), np.uint8)
        converted, position = [], 0
        for part, dtype, size in zip(parts, types, sizes, strict=True):
            if part.data.dtype == dtype:
                converted.append(part)
                continue
            room = np.empty(size, np.uint8) if own_memory else self._arena[position : position + size]
            position += size
            data = room[: part.data.size * dtype.itemsize].view(dtype)
            new = Part(part.tensor, part.start, data, np.zeros(scales_of(part.tensor, self._working), np.float32))
            new.put(part.float32(), self._threads)
            converted.append(new)
        return converted
