"""The working copy: one physical copy of the weights in bfloat16, which every worker reads and none can write through.

Workers map it read-only; the update writes with positioned writes on the descriptor, so there is no
writable mapping in any process, ever. On Linux it lives in a memfd, which Docker's 64 MB of /dev/shm do not
bound; elsewhere in an unlinked file.
"""

import mmap
import os
import tempfile

import numpy as np

from es_lite.algorithm import kernels
from es_lite.errors import RunError
from es_lite.weights.layout import PAGE, Layout, Tensor

ITEMSIZE = 2


def allocate(layout: Layout) -> int:
    """Descriptor of a new, zeroed working copy for `layout`."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("es_lite-working-copy", os.MFD_CLOEXEC)
    else:
        with tempfile.NamedTemporaryFile(prefix="es_lite-") as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, _offsets(layout)[1])
    return descriptor


class WorkingCopy:
    """A process's view of the working copy behind `descriptor`."""

    def __init__(self, layout: Layout, descriptor: int) -> None:
        self._offsets, size = _offsets(layout)
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)

    def bits(self, tensor: Tensor) -> np.ndarray:
        """The tensor's bfloat16 bits, uint16 [size], read-only, seen as they are at any moment."""
        return np.frombuffer(self._map, np.uint16, tensor.size, self._offsets[tensor.name])

    def write(self, tensor: Tensor, start: int, values: np.ndarray) -> None:
        """Rounds float32 values to bfloat16 (nearest, ties to even) into elements start … of the tensor."""
        rounded = np.empty(values.size, np.uint16)
        kernels.to_bf16(rounded, values)
        view = memoryview(rounded).cast("B")
        position = self._offsets[tensor.name] + ITEMSIZE * start
        while view:
            try:
                written = os.pwrite(self._descriptor, view, position)
            except OSError as error:
                raise RunError(f"the working copy of the weights cannot be written ({error.strerror}): memory is short") from None
            view, position = view[written:], position + written


def size_bytes(layout: Layout) -> int:
    return _offsets(layout)[1]


def _offsets(layout: Layout) -> tuple[dict[str, int], int]:
    """Byte offset of each tensor (layers on pages, tensors on cache lines), and the size of all."""
    offsets, position = {}, 0
    for layer in layout.layers:
        position = -(-position // PAGE) * PAGE
        for tensor in layer.tensors:
            position = -(-position // 64) * 64
            offsets[tensor.name] = position
            position += ITEMSIZE * tensor.size
    return offsets, -(-position // PAGE) * PAGE
