"""Parts of stored tensors (float32, bfloat16, or int8 with one scale per row), and applying records to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from es_lite.algorithm import formats, update
from es_lite.algorithm.formats import NO_SCALES, Storage
from es_lite.algorithm.jit import CHUNK, Threads
from es_lite.algorithm.noise.place import Place
from es_lite.algorithm.record import Record
from es_lite.algorithm.update import NO_ORIGIN
from es_lite.model.layout import Layer, Tensor

SLICE = 2**20
"""Elements that are processed at a time if a layer need not be in memory whole."""


ReadTheta0 = Callable[[Tensor, int, int], np.ndarray]
"""θ₀ of a tensor's elements: (tensor, start, count) to float32 [count]."""


def dtype_of(tensor: Tensor, storage: Storage) -> np.dtype:
    """float32, uint16 (bfloat16 bits) or int8."""
    if storage == "int8":
        storage = "int8" if len(tensor.shape) > 1 else "bf16"
    return np.dtype({"fp32": np.float32, "bf16": np.uint16, "int8": np.int8}[storage])


def scales_of(tensor: Tensor, storage: Storage) -> int:
    """How many scales the tensor has: one per row if it is int8, else none."""
    return tensor.rows if dtype_of(tensor, storage) == np.int8 else 0


def stored_bytes(layer: Layer, storage: Storage) -> int:
    return sum(t.size * dtype_of(t, storage).itemsize + 4 * scales_of(t, storage) for t in layer.tensors)


@dataclass(frozen=True)
class Part:
    """Elements of a tensor from `start` on; whole rows if they are int8 and are modified."""

    tensor: Tensor
    start: int
    data: np.ndarray
    """float32, uint16 (bfloat16 bits) or int8, [n]."""
    scales: np.ndarray = field(default_factory=lambda: NO_SCALES)
    """float32, of all rows of the tensor, if it is int8; else empty."""

    @classmethod
    def empty(cls, tensor: Tensor, start: int, count: int, storage: Storage) -> "Part":
        scales = np.zeros(scales_of(tensor, storage), np.float32)
        return cls(tensor, start, np.empty(count, dtype_of(tensor, storage)), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's, with as many of its first dimension as there are; elements are whole rows or all of a tensor."""
        return (-1, *self.tensor.shape[1:]) if self.tensor.shape else ()

    def float32(self) -> np.ndarray:
        """The elements' values, [n]; `data` itself if it is float32."""
        if self.data.dtype == np.float32:
            return self.data
        return formats.as_float32(self.data, self.scales, self.tensor.width, self.start)

    def put(self, values: np.ndarray, threads: Threads) -> None:
        """Stores float32 values [n], rounded to nearest; int8 with new scales."""
        if self.data.dtype == np.float32:
            self.data[:] = values
        elif self.data.dtype == np.uint16:
            threads.each(values.size, lambda low, high: formats.to_bf16(self.data[low:high], values[low:high]))
        else:
            scales, width = self.own_scales, self.tensor.width

            def part(low: int, high: int) -> None:
                cut = slice(low * width, high * width)
                formats.quantise(self.data[cut], scales[low:high], values[cut])

            threads.each(scales.size, part, least=max(1, 16 * CHUNK // width))

    def advance(self, records: Sequence[Record], threads: Threads, theta_0: ReadTheta0 | None = None) -> None:
        """Applies `records`, in order and in place. theta_0: called, in slices, only if one of them is anchored."""
        if self.tensor.decay_factor and any(record.anchor for record in records):
            for start, count in slices(self.tensor, self.start, self.data.size):
                low = start - self.start
                part = Part(self.tensor, start, self.data[low : low + count], self.scales)
                assert theta_0 is not None, "anchored records need θ₀"
                origin = theta_0(self.tensor, start, count)
                for record in records:
                    part._apply(record, threads, origin if record.anchor else NO_ORIGIN)
        else:
            for record in records:
                self._apply(record, threads, NO_ORIGIN)

    def _apply(self, record: Record, threads: Threads, origin: np.ndarray) -> None:
        """origin: θ₀ of the same elements, float32 [n], if the record is anchored."""
        pairs, coefficients = record.pairs()
        coefficients = coefficients * np.float32(self.tensor.coefficient_factor)
        factor = np.float32(self.tensor.decay_factor)
        decay, anchor = (float(np.float32(pull) * factor) for pull in (record.decay, record.anchor))
        if not (coefficients.any() or decay or anchor):
            return
        int8 = self.data.dtype == np.int8
        unit = self.tensor.width if int8 else 1
        scales = self.own_scales

        noise, place = record.noise, Place(record.seed, record.step, 0, self.tensor.number)

        def part(low: int, high: int) -> None:
            update.advance(
                self.data[low * unit : high * unit],
                noise,
                place,
                pairs,
                coefficients,
                decay,
                self.tensor.shape,
                start=self.start + low * unit,
                scales=scales[low:high] if int8 else NO_SCALES,
                anchor=anchor,
                origin=origin[low * unit : high * unit],
            )

        threads.each(self.data.size // unit, part, least=max(1, 16 * CHUNK // unit))

    @property
    def own_scales(self) -> np.ndarray:
        """The scales of this part's rows; empty if there are none."""
        first = self.start // max(1, self.tensor.width)
        return self.scales[first : first + self.data.size // max(1, self.tensor.width)]


def slices(tensor: Tensor, first: int = 0, size: int | None = None) -> list[tuple[int, int]]:
    """(start, count) of about SLICE elements, whole rows, covering the tensor, or `size` elements from `first` on, in order."""
    step = max(1, SLICE // max(1, tensor.width)) * tensor.width
    end = first + (tensor.size if size is None else size)
    return [(start, min(step, end - start)) for start in range(first, end, step)]
