"""The working copy: one physical copy of the weights, which every worker reads and none can write to by accident.

Workers map it read-only, and the update uses pwrite, so no process has a writable mapping. On Linux it is in a memfd, which
Docker's limit of 64 MB for /dev/shm does not apply to; elsewhere in an unlinked file.
"""

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator

import numpy as np

from es_lite.algorithm.formats import NO_SCALES, Storage
from es_lite.algorithm.jit import Threads
from es_lite.errors import RunError
from es_lite.files import view_of, write_fully
from es_lite.model.layout import Layer, Layout, Tensor
from es_lite.weights.parts import Part, dtype_of, scales_of

PAGE = 65536
"""Layers begin at multiples of this many bytes, a multiple of every machine's page size."""


def allocate(layout: Layout, storage: Storage) -> int:
    """Descriptor of a new, zeroed working copy for `layout`; storage: "bf16" or "int8"."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("es_lite-working-copy", os.MFD_CLOEXEC)
    else:
        with tempfile.NamedTemporaryFile(prefix="es_lite-") as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size_bytes(layout, storage))
    return descriptor


class WorkingCopy:
    """A process's view of the working copy behind `descriptor`."""

    def __init__(self, layout: Layout, storage: Storage, descriptor: int) -> None:
        self._storage: Storage = storage
        self._offsets, size = _offsets(layout, storage)
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self._parts: dict[str, Part] = {}
        """What `part` has made: a generation asks for every tensor at every token."""

    def part(self, tensor: Tensor) -> Part:
        """The whole stored tensor: a read-only view, which shows later writes."""
        if tensor.name not in self._parts:
            at, scales_at = self._offsets[tensor.name]
            data = np.frombuffer(self._map, dtype_of(tensor, self._storage), tensor.size, at)
            count = scales_of(tensor, self._storage)
            scales = np.frombuffer(self._map, np.float32, count, scales_at) if count else NO_SCALES
            self._parts[tensor.name] = Part(tensor, 0, data, scales)
        return self._parts[tensor.name]

    def rows(self, tensor: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows `rows`, int64 [R], of a matrix: [R, W] as stored, and their scales, [R] or empty."""
        part = self.part(tensor)
        return part.data.reshape(tensor.shape)[rows], part.scales[rows] if part.scales.size else part.scales

    def blocks(self, tensor: Tensor, rows: int) -> Iterator[Part]:
        """The matrix in blocks of `rows` rows, in order."""
        part = self.part(tensor)
        step = rows * tensor.width
        for start in range(0, tensor.size, step):
            yield Part(tensor, start, part.data[start : start + step], part.scales)

    def passing(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: all layers are always available."""
        return contextlib.nullcontext()

    def opened(self, layer: Layer) -> contextlib.AbstractContextManager[None]:
        """Does nothing, likewise."""
        return contextlib.nullcontext()

    def write(self, part: Part, threads: Threads) -> None:
        """Copies a part from the store; rounds it to nearest if the types differ."""
        dtype, tensor = dtype_of(part.tensor, self._storage), part.tensor
        if part.data.dtype != dtype:
            values = part.float32()
            part = Part.empty(tensor, part.start, part.data.size, self._storage)
            part.put(values, threads)
        at, scales_at = self._offsets[tensor.name]
        first, count = part.start // max(1, tensor.width), part.data.size // max(1, tensor.width)
        try:
            write_fully(self._descriptor, view_of(part.data), at + dtype.itemsize * part.start)
            if part.scales.size:
                scales = view_of(part.scales[first : first + count])
                write_fully(self._descriptor, scales, scales_at + 4 * first)
        except OSError as error:
            raise RunError(
                f"the working copy of the weights cannot be written ({error.strerror}): there is too little memory; free some, "
                'or set memory.residency = "streamed"'
            ) from None


def size_bytes(layout: Layout, storage: Storage) -> int:
    return _offsets(layout, storage)[1]


def _offsets(layout: Layout, storage: Storage) -> tuple[dict[str, tuple[int, int]], int]:
    """Byte offsets of each tensor and its scales (layers on pages, tensors on cache lines), and the size of all."""
    offsets, position = {}, 0
    for layer in layout.layers:
        position = -(-position // PAGE) * PAGE
        for tensor in layer.tensors:
            at = -(-position // 64) * 64
            scales_at = -(-(at + dtype_of(tensor, storage).itemsize * tensor.size) // 64) * 64
            offsets[tensor.name] = at, scales_at
            position = scales_at + 4 * scales_of(tensor, storage)
    return offsets, -(-position // PAGE) * PAGE
