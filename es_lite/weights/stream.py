"""The weights of a model that need not fit in memory: layers that pass through, brought level on the way.

A pass takes every layer from its file once. What the journal holds beyond the step that a file stands at is applied
while the layer is in memory, so a step reads each byte of a weight at most once and writes it at most once, however many
members and samples there are:

    reader ──▶ section in a buffer ──▶ advance ──▶ the doors score from it ──▶ buffer free
                                          └──────▶ writer ──▶ file.next ──▶ rename

The rows of the embedding that a batch uses are read by themselves; its matrix passes only to be written, or as the head.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.weights.conveyor import BUFFERS, Buffer, Conveyor, Filled, PassingLayer, buffer_bytes
from es_lite.weights.layerfile import FileReader, LayerFile
from es_lite.weights.layout import Layer, Layout, Tensor
from es_lite.weights.store import due
from es_lite.weights.stored import Part, Storage, dtype_of, scales_of

_ALONE = Threads(1)


class Stream:
    """One pass at a time, used by one thread.

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
        self._buffers: list[Buffer] = []
        self._parts: dict[str, Part] = {}
        """What the doors can ask for whole: the small tensors beside the blocks, and those of the block that is open."""
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
            self._buffers = [Buffer(size) for _ in range(BUFFERS)]
        ends = [self._meet(self._files[0]), self._meet(self._files[-1])]
        self._parts = {}
        for end in ends:
            self._advance(end, list(end.front.small.values()))
            self._parts |= {name: self._convert([part], apart=True)[0] for name, part in end.front.small.items()}
        self._head, other = ends if self._layout.tied else ends[::-1]
        rest = [other] if other.needed or not other.file.matrices else []  # without matrices: to be checked

        def layers() -> Iterator[PassingLayer]:
            yield from map(self._meet, self._files[1:-1])
            yield from (self._head, *rest)

        with Conveyor(self._buffers, layers, self._layout, self._direct, self._step) as self._conveyor:
            yield
            for layer in rest:
                for filled in self._sections(layer):
                    self._bring_level(filled)
                    self._finish(filled)

    @contextlib.contextmanager
    def opened(self, layer: Layer) -> Iterator[None]:
        """While a block is used: its tensors can be asked for."""
        if not layer.block:
            yield
            return
        filled = self._conveyor.take()
        assert filled.layer.file.layer == layer, "blocks are asked for out of order"
        before, parts = self._parts, self._use(filled)
        small = [self._convert([part], apart=True)[0] for part in filled.layer.front.small.values()]
        self._parts = before | {part.tensor.name: part for part in [*parts, *small]}
        yield
        self._parts = before
        self._finish(filled)

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
            self._finish(filled)

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
        few = replace(tensor, shape=(rows.size, tensor.width))  # those rows as a matrix of their own
        (part,) = self._convert([Part(few, 0, data.reshape(-1))], apart=True)
        return part.data.reshape(few.shape), part.scales

    def _meet(self, file: LayerFile) -> PassingLayer:
        with FileReader(file) as reader:
            needed = due(file, self._records, reader.front.step, self._step)
            return PassingLayer(file, reader.front, reader.front.copy(), needed)

    def _sections(self, layer: PassingLayer) -> Iterator[Filled]:
        """The sections of a layer beside the blocks, as they come."""
        last = False
        while not last:
            filled = self._conveyor.take()
            assert filled.layer is layer, "layers are asked for out of order"
            last = filled.last
            yield filled

    def _bring_level(self, filled: Filled) -> list[Part]:
        """The section's parts, level with the target, and on their way to the file where they were not."""
        layer = filled.layer
        parts = layer.file.views(filled.section, filled.buffer.array, layer.front)
        self._advance(layer, parts)
        if layer.file.layer.block:
            self._advance(layer, list(layer.front.small.values()))
        if layer.needed:
            self._conveyor.send(filled)
        return parts

    def _advance(self, layer: PassingLayer, parts: Sequence[Part]) -> None:
        for part in parts:
            part.advance(layer.needed, self._threads)

    def _use(self, filled: Filled) -> list[Part]:
        """The section's parts as the doors take them, until it is finished."""
        parts = self._bring_level(filled)
        if self._working == filled.layer.file.storage:
            return parts
        converted = self._convert(parts)
        self._conveyor.release(filled)
        return converted

    def _finish(self, filled: Filled) -> None:
        self._conveyor.release(filled)
        self._progress(sum(count for _, _, count in filled.section.parts))

    def _convert(self, parts: Sequence[Part], apart: bool = False) -> list[Part]:
        """The parts as the doors take them: themselves, or conversions, in the arena unless they are to be `apart`."""
        types = [dtype_of(part.tensor, self._working) for part in parts]
        sizes = [-(-part.data.size * dtype.itemsize // 64) * 64 for part, dtype in zip(parts, types, strict=True)]
        if not apart and self._arena.size < sum(sizes):
            self._arena = np.empty(0, np.uint8)  # let go of the old one before
            self._arena = np.empty(sum(sizes), np.uint8)
        converted, position = [], 0
        for part, dtype, size in zip(parts, types, sizes, strict=True):
            if part.data.dtype == dtype:
                converted.append(part)
                continue
            room = np.empty(size, np.uint8) if apart else self._arena[position : position + size]
            position += size
            data = room[: part.data.size * dtype.itemsize].view(dtype)
            new = Part(part.tensor, part.start, data, np.zeros(scales_of(part.tensor, self._working), np.float32))
            new.put(part.float32(), self._threads)
            converted.append(new)
        return converted
