"""A layer's file: a safetensors file that says what it holds, at which step, and proves it by a checksum.

    header     JSON, padded with spaces; its metadata has layer, step, storage and xxh3
    scales     of int8 tensors, float32 [rows], under the names that bitsandbytes gives them ("….SCB")
    small      vectors, and all else that is not a matrix as below
    matrices   of a block all, beside the blocks the vocabulary's: they begin at a multiple of 4096 bytes

Header, scales and small tensors are the front: read first, in one piece, and written last, when the scales and the checksum
are known. The checksum is XXH3 (64 bit) of the matrices and the front's tensors, in the file's order, and of what the file claims
to be. A file is replaced, never changed: written beside and renamed.
"""

import copy
import json
import math
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from es_lite.algorithm.formats import NO_SCALES
from es_lite.errors import UserError
from es_lite.weights.layout import Layer, Tensor
from es_lite.weights.rawio import ALIGNMENT, REMEDY, open_file, read_fully, write_fully
from es_lite.weights.stored import Part, Storage, dtype_of, scales_of

_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.uint16): "BF16", np.dtype(np.int8): "I8"}
_LONGEST = {"step": "4294967295", "xxh3": "0" * 16}


@dataclass(frozen=True)
class Section:
    """Consecutive bytes of a layer's matrices: low … high - 1 of the file, whole rows of `parts`."""

    low: int
    high: int
    parts: tuple[tuple[Tensor, int, int], ...]
    """(tensor, start, count), in the file's order."""


@dataclass
class Front:
    """What a layer's file begins with, in memory: its step, its checksum, its scales and its small tensors."""

    step: int
    checksum: str
    scales: dict[str, np.ndarray]
    """float32 [rows] by the name of the tensor, for int8 tensors."""
    small: dict[str, Part]

    def scales_of(self, tensor: Tensor) -> np.ndarray:
        """The tensor's; empty where it has none."""
        return self.scales.get(tensor.name, NO_SCALES)

    def copy(self) -> "Front":
        return copy.deepcopy(self)


class LayerFile:
    """Where everything is in the file of `layer`, which depends on the layer and its storage alone."""

    def __init__(self, directory: Path, layer: Layer, storage: Storage) -> None:
        self.layer = layer
        self.storage: Storage = storage
        self.path = directory / f"{layer.name}.safetensors"
        self.scaled = [t for t in layer.tensors if scales_of(t, storage)]
        self.matrices = [t for t in layer.tensors if (len(t.shape) > 1 if layer.block else t.vocabulary)]
        self.small = [t for t in layer.tensors if t not in self.matrices]
        self._tensors: dict[str, dict[str, Any]] = {}
        self.offsets: dict[str, int] = {}
        """Bytes from the front's end to each matrix."""
        position = 0
        for tensor in self.scaled:
            position = self._place(_scale_name(tensor), "F32", (tensor.rows,), position, 4 * tensor.rows)
        for tensor in self.small:
            position = self._place_tensor(tensor, position)
        small_bytes = position
        for tensor in self.matrices:
            self.offsets[tensor.name] = position - small_bytes
            position = self._place_tensor(tensor, position)
        longest = len(self._header(_LONGEST)) + 8 + small_bytes
        self.front_bytes = -(-longest // ALIGNMENT) * ALIGNMENT
        self._header_bytes = self.front_bytes - small_bytes - 8
        self.size = self.front_bytes + position - small_bytes

    def _place_tensor(self, tensor: Tensor, position: int) -> int:
        dtype = dtype_of(tensor, self.storage)
        return self._place(tensor.name, _NAMES[dtype], tensor.shape, position, tensor.size * dtype.itemsize)

    def _place(self, name: str, dtype: str, shape: tuple[int, ...], position: int, size: int) -> int:
        self._tensors[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        return position + size

    def _header(self, varying: dict[str, str]) -> bytes:
        metadata = {"format": "pt", "layer": self.layer.name, "storage": self.storage, **varying}
        return json.dumps({"__metadata__": metadata, **self._tensors}, separators=(",", ":")).encode()

    @cached_property
    def whole(self) -> Section:
        """All matrices at once."""
        parts = tuple((tensor, 0, tensor.size) for tensor in self.matrices)
        return Section(self.front_bytes, self.size, parts)

    def sections(self, limit: int, unit: int = 1) -> list[Section]:
        """The matrices cut at rows: parts of about `limit` bytes, a multiple of `unit` rows, at aligned places of a matrix."""
        sections = []
        for tensor in self.matrices:
            row = tensor.width * dtype_of(tensor, self.storage).itemsize
            unit_rows = math.lcm(unit, ALIGNMENT // math.gcd(ALIGNMENT, row))
            rows = max(1, limit // row // unit_rows) * unit_rows
            base = self.front_bytes + self.offsets[tensor.name]
            for first in range(0, tensor.rows, rows):
                last = min(first + rows, tensor.rows)
                part = (tensor, first * tensor.width, (last - first) * tensor.width)
                sections.append(Section(base + first * row, base + last * row, (part,)))
        return sections

    def parse(self, data: bytes, size: int) -> Front:
        """The front from its bytes; size: of the whole file. Raises UserError where it is not this layer's."""
        if size != self.size:
            raise UserError(f"{self.path}: has {size:,} bytes where {self.layer.name} takes {self.size:,}; {REMEDY}")
        try:
            if int.from_bytes(data[:8], "little") != self._header_bytes:
                raise ValueError("another header's length")
            header = json.loads(data[8 : 8 + self._header_bytes])
            metadata = header.pop("__metadata__")
            claimed = metadata["layer"], metadata["storage"]
            step, checksum = int(metadata["step"]), str(metadata["xxh3"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: its header is damaged, or of another version; {REMEDY}") from None
        written = self._header({"step": str(step), "xxh3": checksum}).ljust(self._header_bytes)
        if claimed != (self.layer.name, self.storage) or data[8 : 8 + self._header_bytes] != written:
            raise UserError(f"{self.path}: is not {self.layer.name} of this model in {self.storage} but {claimed}; {REMEDY}")
        front, position = self.empty_front(), 8 + self._header_bytes
        front.step, front.checksum = step, checksum
        for array in self._front_arrays(front):
            array[:] = np.frombuffer(data[position : position + array.nbytes], array.dtype)
            position += array.nbytes
        return front

    def empty_front(self) -> Front:
        """A front to be filled."""
        front = Front(0, "", {tensor.name: np.zeros(tensor.rows, np.float32) for tensor in self.scaled}, {})
        for tensor in self.small:
            stored = np.empty(tensor.size, dtype_of(tensor, self.storage))
            front.small[tensor.name] = Part(tensor, 0, stored, front.scales_of(tensor))
        return front

    def front(self, front: Front) -> bytes:
        """The front as it is written."""
        header = self._header({"step": str(front.step), "xxh3": front.checksum}).ljust(self._header_bytes)
        return b"".join([len(header).to_bytes(8, "little"), header, *map(np.ndarray.tobytes, self._front_arrays(front))])

    def checksum(self, matrices: "xxhash.xxh3_64", front: Front) -> str:
        """Of the file. matrices: fed with all their bytes, in order."""
        whole = matrices.copy()
        for array in self._front_arrays(front):
            whole.update(array.tobytes())
        whole.update(f"{self.layer.name} {self.storage} {front.step}".encode())
        return whole.hexdigest()

    def check(self, matrices: "xxhash.xxh3_64", front: Front) -> None:
        """Raises UserError where the bytes are not those that were written."""
        if self.checksum(matrices, front) != front.checksum:
            raise UserError(f"{self.path}: its checksum does not agree: bits in it have changed; {REMEDY}")

    def views(self, section: Section, data: np.ndarray, front: Front) -> list[Part]:
        """The section's parts, as views of its bytes, uint8."""
        parts, position = [], 0
        for tensor, start, count in section.parts:
            dtype = dtype_of(tensor, self.storage)
            stored = data[position : position + count * dtype.itemsize].view(dtype)
            parts.append(Part(tensor, start, stored, front.scales_of(tensor)))
            position += stored.nbytes
        return parts

    def _front_arrays(self, front: Front) -> list[np.ndarray]:
        """The front's tensors in the file's order."""
        scales = [front.scales[tensor.name] for tensor in self.scaled]
        return [*scales, *(front.small[tensor.name].data for tensor in self.small)]


def _scale_name(tensor: Tensor) -> str:
    owner, _, attribute = tensor.name.rpartition(".")
    return f"{owner}.SCB" if attribute == "weight" else f"{tensor.name}.SCB"


class FileReader:
    """An open layer file, its front read and checked against the layer (but not its checksum)."""

    def __init__(self, file: LayerFile) -> None:
        self.file = file
        try:
            self.descriptor = open_file(file.path, os.O_RDONLY, direct=False)
        except OSError as error:
            raise UserError(f"{file.path}: cannot be read ({error.strerror})") from None
        try:
            self.front = file.parse(os.pread(self.descriptor, file.front_bytes, 0), os.fstat(self.descriptor).st_size)
        except OSError as error:
            self.close()
            raise UserError(f"{file.path}: cannot be read ({error.strerror}); {REMEDY}") from None
        except BaseException:
            self.close()
            raise

    def part(self, tensor: Tensor, start: int, count: int) -> Part:
        """Elements start … as they are stored; the scales of a matrix are the front's own."""
        if tensor.name in self.front.small:
            small = self.front.small[tensor.name]
            return Part(tensor, start, small.data[start : start + count], small.scales)
        data = np.empty(count, dtype_of(tensor, self.file.storage))
        offset = self.file.front_bytes + self.file.offsets[tensor.name] + start * data.itemsize
        read_fully(self.descriptor, memoryview(data).cast("B"), offset, data.nbytes, self.file.path)
        return Part(tensor, start, data, self.front.scales_of(tensor))

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileWriter:
    """Writes a layer's file beside the old one; `finish` puts it in its place, `discard` leaves all as it was."""

    def __init__(self, file: LayerFile, direct: bool = False) -> None:
        """direct: past the page cache, where the file system can; what is written is then aligned memory."""
        self.file = file
        self._partial = file.path.with_name(file.path.name + ".next")
        self._hash = xxhash.xxh3_64()
        self._descriptor = open_file(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, direct)

    def write(self, section: Section, view: memoryview) -> None:
        """The section's bytes, in order. view: has room for them and to the next multiple of ALIGNMENT."""
        size = section.high - section.low
        self._hash.update(view[:size])
        write_fully(self._descriptor, view[: -(-size // ALIGNMENT) * ALIGNMENT], section.low)

    def finish(self, front: Front, step: int) -> None:
        """Ends the file, which stands at `step`, and puts it in the old one's place."""
        front.step = step
        front.checksum = self.file.checksum(self._hash, front)
        data = self.file.front(front)
        aligned = mmap.mmap(-1, len(data))
        aligned[:] = data
        write_fully(self._descriptor, memoryview(aligned), 0)
        os.ftruncate(self._descriptor, self.file.size)
        self._close()
        self._partial.replace(self.file.path)

    def discard(self) -> None:
        """Removes what was written; the old file is as it was."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
