"""A layer's file: opening, checking, reading and replacing it."""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from es_lite.errors import DamagedFile
from es_lite.files import NewFile, Spare, aligned, next_to, open_file, read_fully, view_of
from es_lite.model.layout import Layer, Tensor
from es_lite.weights.layer_format import Front, LayerFormat, Section
from es_lite.weights.parts import Part

CHECK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class LayerFile:
    path: Path
    format: LayerFormat

    @property
    def layer(self) -> Layer:
        return self.format.layer

    def exists(self) -> bool:
        return self.path.exists()

    def damaged(self, reason: object) -> DamagedFile:
        """The error to raise for this file. reason: text, or the OSError of a read."""
        return DamagedFile(f"{self.path}: {f'cannot be read ({reason.strerror})' if isinstance(reason, OSError) else reason}")

    def front(self) -> Front:
        """The file's front, checked against the layer, but not against the checksum. Raises DamagedFile."""
        try:
            with self.path.open("rb", buffering=0) as file:
                return self.format.parse(file.read(self.format.front_bytes), os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            raise self.damaged(error) from None

    def verify(self, matrices: "xxhash.xxh3_64", front: Front) -> None:
        """Raises DamagedFile if the checksum does not match. matrices: the hash of all their bytes."""
        if self.format.checksum(matrices, front) != front.checksum:
            raise self.damaged("its checksum does not match: its contents have changed")

    def check(self, direct: bool = False) -> None:
        """Verifies the whole file, bypassing the page cache if `direct`. Raises DamagedFile."""
        front = self.front()
        try:
            descriptor = open_file(self.path, os.O_RDONLY, direct)
            try:
                self.verify(self.hash_matrices(descriptor), front)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self.damaged(error) from None

    def hash_matrices(self, descriptor: int) -> "xxhash.xxh3_64":
        """The hash of the matrices' bytes in the open file. Raises OSError."""
        found = xxhash.xxh3_64()
        view = memoryview(mmap.mmap(-1, CHECK_BYTES))
        for low in range(self.format.front_bytes, self.format.size, CHECK_BYTES):
            size = min(CHECK_BYTES, self.format.size - low)
            read_fully(descriptor, view[: aligned(size)], low, size)
            found.update(view[:size])
        return found


class FileReader:
    """Reads a layer's file: any slice, or all sections in order, which are hashed."""

    def __init__(self, file: LayerFile, direct: bool = False) -> None:
        """direct: read sections into aligned memory, bypassing the page cache. Raises DamagedFile."""
        self.file = file
        self.front = file.front()
        self._found = self.front.copy()  # as in the checksum; the caller advances the other
        self._direct = direct
        self._hash = xxhash.xxh3_64()
        try:
            self._descriptor = open_file(file.path, os.O_RDONLY, direct)
        except OSError as error:
            raise file.damaged(error) from None

    def part(self, tensor: Tensor, start: int, count: int) -> Part:
        """A copy of the stored elements from `start` on; whole rows if they are int8."""
        part = Part.empty(tensor, start, count, self.file.format.storage)
        small = self._found.small.get(tensor.name)
        if small:
            part.data[:] = small.data[start : start + count]
        else:
            view = view_of(part.data)
            self._read(view, self.file.format.offset(tensor) + start * part.data.itemsize, len(view))
        part.own_scales[:] = Part(tensor, start, part.data, self._found.scales_of(tensor)).own_scales
        return part

    def read_section(self, section: Section, out: np.ndarray) -> None:
        """Reads the section's bytes into `out`, uint8, which may be larger."""
        view = view_of(out)
        self._read(view[: aligned(section.bytes)] if self._direct else view, section.low, section.bytes)
        self._hash.update(view[: section.bytes])

    def verify(self) -> None:
        """To be called after all sections. Raises DamagedFile if the checksum does not match."""
        self.file.verify(self._hash, self._found)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _read(self, view: memoryview, position: int, size: int) -> None:
        try:
            read_fully(self._descriptor, view, position, size)
        except OSError as error:
            raise self.file.damaged(error) from None


class FileWriter:
    """Writes a layer's new file section by section; `finish` puts it in place, `discard` leaves everything as it was."""

    def __init__(self, file: LayerFile, direct: bool = False, spare: Spare | None = None) -> None:
        """direct: bypass the page cache if possible; memory to write must then be aligned. spare: is written over, if it fits.

        All methods raise OSError.
        """
        self._file = file
        self._spare = spare
        taken = spare is not None and spare.take(next_to(file.path), file.format.size)
        self._new = NewFile(file.path, direct, keep=taken)
        self._hash = xxhash.xxh3_64()

    def write(self, section: Section, view: memoryview) -> None:
        """Writes the next section. view: its bytes, for direct writes padded to a multiple of ALIGNMENT."""
        self._hash.update(view[: section.bytes])
        self._new.write(view[: aligned(section.bytes)], section.low)

    def finish(self, front: Front, step: int) -> None:
        """Completes the file, with the layer at `step`, and replaces the old one."""
        front.step = step
        front.checksum = self._file.format.checksum(self._hash, front)
        if self._spare:
            self._spare.keep(self._file.path)
        commit_front(self._new, self._file.format, front)

    def discard(self) -> None:
        """Removes what was written, and the spare file, which may be another name of the old one."""
        self._new.discard()
        if self._spare:
            self._spare.remove()


def commit_front(new: NewFile, format: LayerFormat, front: Front) -> None:
    """Writes the front of a file whose matrices are written, and replaces the old file. Raises OSError."""
    data = format.serialise(front)
    page_aligned = mmap.mmap(-1, len(data))
    page_aligned[:] = data
    new.write(memoryview(page_aligned), 0)
    new.commit(size=format.size)
