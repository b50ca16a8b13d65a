"""Weights that need not fit in memory: layers pass through it, and are brought to the current step on the way.

While a layer is in memory, the records that its file lacks are applied, so a pass reads each byte of a weight at most once and
writes it at most once, however many members and samples it scores:

    reader ──▶ section in a buffer ──▶ advance ──▶ scoring ──▶ buffer free
                                          └──────▶ writer ──▶ file.next ──▶ rename

The rows of the embedding that a batch uses are read separately; its matrix passes only to be updated, or as the head.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from es_lite.algorithm.formats import Storage
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.model.layout import Layer, Layout, Tensor
from es_lite.model.source import Source
from es_lite.weights.conveyor import BUFFERS, Buffer, Conveyor, Filled, PassingLayer, buffer_bytes
from es_lite.weights.layer_file import LayerFile
from es_lite.weights.parts import Part, dtype_of, scales_of
from es_lite.weights.reading import LayerReader

_ALONE = Threads(1)


class Stream:
    """One pass at a time, used by one thread.

    Within a pass, tensors must be requested in the model's order: rows of the embedding, blocks, final norm, head.
    """

    def __init__(
        self,
        files: Sequence[LayerFile],
        layout: Layout,
        working: Storage,
        threads: Threads,
        direct: bool,
        theta_0: Callable[[], Source] | None = None,
    ) -> None:
        """files: of the layers, in order; working: the type that scoring takes, "bf16" or "int8".

        direct: bypass the page cache if possible. theta_0: opens θ₀, which anchored records need.
        """
        self._files = files
        self._layout = layout
        self._working: Storage = working
        self._threads = threads
        self._direct = direct
        self._theta_0 = theta_0
        self._records: Sequence[Record] = ()
        self._step = 0
        self._buffers: list[Buffer] = []
        self._parts: dict[str, Part] = {}
        """What `part` returns: the small tensors outside the blocks, and the tensors of the open block."""
        self._arena = np.empty(0, np.uint8)
        """A section converted to the type that scoring takes, if files have another."""

    def advance(self, records: Sequence[Record], step: int) -> None:
        """Defers an update: the next pass brings the layers to `step`. records: they lead there from every file's step."""
        self._records, self._step = records, step

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """One pass over all layers; afterwards every file is at the step given to `advance`.

        Raises DamagedFile if a file is damaged, RunError if the disk is full; layers that have passed are then at that step,
        the others unchanged.
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
            # The other one passes only to be updated or, if it has no matrices, to be verified.
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
        """While it is open, `part` returns a block's tensors."""
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
        """A whole tensor of the open block, or a small one outside the blocks."""
        return self._parts[tensor.name]

    def blocks(self, tensor: Tensor, rows: int) -> Iterator[Part]:
        """The head's matrix in blocks of `rows` rows, in order; `rows` divides VOCABULARY_ROWS."""
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
        with LayerReader.of_file(file, self._records, self._step, _ALONE, theta_0=self._theta_0) as reader:

            def some(low: int, high: int) -> None:
                for i in range(low, high):
                    part = reader.part(tensor, int(rows[i]) * tensor.width, tensor.width)
                    data[i] = part.data
                    if scales.size:
                        scales[i] = part.scales[rows[i]]

            self._threads.each(rows.size, some, least=16)
        if data.dtype == dtype_of(tensor, self._working):
            return data, scales
        few = replace(tensor, shape=(rows.size, tensor.width))  # these rows as a smaller matrix
        (part,) = self._convert([Part(few, 0, data.reshape(-1))], own_memory=True)
        return part.data.reshape(few.shape), part.scales

    def _open(self, file: LayerFile) -> PassingLayer:
        how = self._threads, self._direct, self._theta_0
        return PassingLayer(file, LayerReader.of_file(file, self._records, self._step, *how))

    def _sections(self, layer: PassingLayer) -> Iterator[Filled]:
        """The sections of a layer outside the blocks, as they arrive."""
        last = False
        while not last:
            filled = self._conveyor.take()
            assert filled.layer is layer, "layers are asked for out of order"
            last = filled.last
            yield filled

    def _advance(self, filled: Filled) -> list[Part]:
        """Brings the section's parts to the current step and, if the file is behind, sends them to it."""
        reader = filled.layer.reader
        parts = reader.advance(filled.section, filled.buffer.array)
        if filled.layer.file.layer.block:
            reader.small()
        if reader.needed:
            self._conveyor.send(filled)
        return parts

    def _use(self, filled: Filled) -> list[Part]:
        """The section's parts, advanced, in the type that scoring takes; valid until the next section."""
        parts = self._advance(filled)
        if self._working == filled.layer.file.format.storage:
            return parts
        converted = self._convert(parts)
        self._conveyor.release(filled)
        return converted

    def _convert(self, parts: Sequence[Part], own_memory: bool = False) -> list[Part]:
        """The parts in the type that scoring takes, converted if necessary: in the arena, or with `own_memory` in new memory."""
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
