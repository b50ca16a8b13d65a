"""The format of a layer's file: a safetensors file with these parts.

    header     JSON, padded with spaces; its metadata has layer, step, storage and xxh3, the checksum
    scales     of int8 tensors, float32 [rows], named as by bitsandbytes ("….SCB")
    small      all tensors that are not in `matrices`, such as vectors
    matrices   in a block all its matrices, in other layers the vocabulary's; they begin at a multiple of 4096 bytes

Header, scales and small tensors are the front: read first, in one piece, and written last, when the scales and the checksum
are known. The checksum is XXH3 (64 bits) of the matrices, scales and small tensors, and of layer, storage and step.
"""

import copy
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from es_lite.algorithm.formats import NO_SCALES, Storage
from es_lite.files import ALIGNMENT, aligned
from es_lite.model.layout import Layer, Tensor
from es_lite.weights.parts import Part, dtype_of, scales_of

_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.uint16): "BF16", np.dtype(np.int8): "I8"}
_LONGEST = {"step": "4294967295", "xxh3": "0" * 16}


@dataclass(frozen=True)
class Section:
    """Consecutive bytes of a layer's matrices: low … high - 1 of the file, whole rows of `parts`."""

    low: int
    high: int
    parts: tuple[tuple[Tensor, int, int], ...]
    """(tensor, start, count), in the file's order."""

    @property
    def bytes(self) -> int:
        return self.high - self.low


@dataclass
class Front:
    """The beginning of a layer's file, in memory: its step, its checksum, its scales and its small tensors."""

    step: int
    checksum: str
    scales: dict[str, np.ndarray]
    """float32 [rows] by the name of the tensor, for int8 tensors."""
    small: dict[str, Part]

    def scales_of(self, tensor: Tensor) -> np.ndarray:
        """The tensor's scales; empty if it has none."""
        return self.scales.get(tensor.name, NO_SCALES)

    def copy(self) -> "Front":
        return copy.deepcopy(self)


class LayerFormat:
    """Where everything is in a layer's file; the layer and its storage determine it.

    Attributes:
        scaled, small, matrices: the tensors that have scales, those in the front, and those after it.
        front_bytes, size: bytes of the front, and of the file.
    """

    def __init__(self, layer: Layer, storage: Storage) -> None:
        self.layer = layer
        self.storage: Storage = storage
        self.scaled = [t for t in layer.tensors if scales_of(t, storage)]
        self.matrices = [t for t in layer.tensors if (len(t.shape) > 1 if layer.block else t.vocabulary)]
        self.small = [t for t in layer.tensors if t not in self.matrices]
        self._tensors: dict[str, dict[str, Any]] = {}
        self._offsets: dict[str, int] = {}
        """Bytes from the header's end to each tensor and each tensor's scales, by name."""
        position = 0
        for tensor in self.scaled:
            position = self._place(_scale_name(tensor), "F32", (tensor.rows,), position, 4 * tensor.rows)
        for tensor in self.small:
            position = self._place_tensor(tensor, position)
        small_bytes = position
        for tensor in self.matrices:
            position = self._place_tensor(tensor, position)
        longest = len(self._header(_LONGEST)) + 8 + small_bytes
        self.front_bytes = aligned(longest)
        self._header_bytes = self.front_bytes - small_bytes - 8
        self.size = self.front_bytes + position - small_bytes

    def offset(self, tensor: Tensor) -> int:
        """The tensor's byte offset in the file."""
        return 8 + self._header_bytes + self._offsets[tensor.name]

    def scales_offset(self, tensor: Tensor) -> int:
        """The byte offset of the tensor's scales in the file."""
        return 8 + self._header_bytes + self._offsets[_scale_name(tensor)]

    @cached_property
    def whole(self) -> Section:
        """All matrices at once."""
        return Section(self.front_bytes, self.size, tuple((tensor, 0, tensor.size) for tensor in self.matrices))

    def sections(self, limit: int, unit: int = 1) -> list[Section]:
        """The matrices cut into sections of about `limit` bytes, a multiple of `unit` rows, each at an aligned offset."""
        sections = []
        for tensor in self.matrices:
            itemsize = dtype_of(tensor, self.storage).itemsize
            # Rows whose bytes are a multiple of ALIGNMENT.
            multiple = math.lcm(unit, ALIGNMENT // math.gcd(ALIGNMENT, tensor.width * itemsize))
            rows = max(1, limit // (tensor.width * itemsize) // multiple) * multiple
            offset = self.offset(tensor)
            for row in range(0, tensor.rows, rows):
                start, count = row * tensor.width, min(rows, tensor.rows - row) * tensor.width
                low = offset + start * itemsize
                sections.append(Section(low, low + count * itemsize, ((tensor, start, count),)))
        return sections

    def views(self, section: Section, data: np.ndarray, front: Front) -> list[Part]:
        """The section's parts as views of `data`, its bytes, uint8."""
        parts, position = [], 0
        for tensor, start, count in section.parts:
            dtype = dtype_of(tensor, self.storage)
            stored = data[position : position + count * dtype.itemsize].view(dtype)
            parts.append(Part(tensor, start, stored, front.scales_of(tensor)))
            position += stored.nbytes
        return parts

    def parse(self, data: bytes, file_bytes: int) -> Front:
        """The front of a file of `file_bytes` bytes. Raises ValueError if it is not this layer's."""
        if file_bytes != self.size:
            raise ValueError(f"has {file_bytes:,} bytes, but {self.layer.name} takes {self.size:,}")
        try:
            if int.from_bytes(data[:8], "little") != self._header_bytes:
                raise ValueError("another header's length")
            header = json.loads(data[8 : 8 + self._header_bytes])
            metadata = header.pop("__metadata__")
            claimed = metadata["layer"], metadata["storage"]
            step, checksum = int(metadata["step"]), str(metadata["xxh3"])
        except (ValueError, KeyError, TypeError):
            raise ValueError("its header is damaged, or of another version") from None
        written = self._header({"step": str(step), "xxh3": checksum}).ljust(self._header_bytes)
        if claimed != (self.layer.name, self.storage) or data[8 : 8 + self._header_bytes] != written:
            found, wanted = " in ".join(claimed), f"{self.layer.name} in {self.storage}"
            raise ValueError(f"it has {found}, but not the tensors of this model's {wanted}")
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

    def serialise(self, front: Front) -> bytes:
        """The front's `front_bytes` bytes."""
        header = self._header({"step": str(front.step), "xxh3": front.checksum}).ljust(self._header_bytes)
        return b"".join([len(header).to_bytes(8, "little"), header, *map(np.ndarray.tobytes, self._front_arrays(front))])

    def checksum(self, matrices: "xxhash.xxh3_64", front: Front) -> str:
        """The file's checksum. matrices: the hash of all their bytes, in order."""
        whole = matrices.copy()
        for array in self._front_arrays(front):
            whole.update(array.tobytes())
        whole.update(f"{self.layer.name} {self.storage} {front.step}".encode())
        return whole.hexdigest()

    def _front_arrays(self, front: Front) -> list[np.ndarray]:
        """The front's tensors in the file's order."""
        scales = [front.scales[tensor.name] for tensor in self.scaled]
        return [*scales, *(front.small[tensor.name].data for tensor in self.small)]

    def _place_tensor(self, tensor: Tensor, position: int) -> int:
        dtype = dtype_of(tensor, self.storage)
        return self._place(tensor.name, _NAMES[dtype], tensor.shape, position, tensor.size * dtype.itemsize)

    def _place(self, name: str, dtype: str, shape: tuple[int, ...], position: int, size: int) -> int:
        self._tensors[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        self._offsets[name] = position
        return position + size

    def _header(self, varying: dict[str, str]) -> bytes:
        metadata = {"format": "pt", "layer": self.layer.name, "storage": self.storage, **varying}
        return json.dumps({"__metadata__": metadata, **self._tensors}, separators=(",", ":")).encode()


def _scale_name(tensor: Tensor) -> str:
    owner, _, attribute = tensor.name.rpartition(".")
    return f"{owner}.SCB" if attribute == "weight" else f"{tensor.name}.SCB"
