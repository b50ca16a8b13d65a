"""The layers on disk: the fp32 master or, where there is none, the bf16 or int8 weights themselves; and bringing them level.

A file is replaced, never changed: written beside and renamed. So a crash leaves each layer whole at step t or t+1, and
`bring_level` takes it on. Files are not fsynced at each step: the journal is the truth, the checksum finds a layer that a
power cut tore, and θ₀ and the journal make it again.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.errors import RunError, UserError
from es_lite.weights.layerfile import FileReader, FileWriter, LayerFile, Section
from es_lite.weights.layout import Tensor
from es_lite.weights.rawio import REMEDY, open_file, read_aligned, read_fully
from es_lite.weights.source import Source
from es_lite.weights.stored import SLICE, Part, Storage
from es_lite.weights.working import WorkingCopy

SECTION_BYTES = 4 * SLICE

CHECK_BYTES = 16 * 2**20


def standing(file: LayerFile) -> int:
    """The step that a layer stands at; 0, θ₀'s, where there is no file yet. Raises UserError where the file is not whole."""
    if not file.path.exists():
        return 0
    with FileReader(file) as reader:
        return reader.front.step


def due(file: LayerFile, records: Sequence[Record], at: int, step: int) -> list[Record]:
    """The records that take the layer from step `at` to `step`. Raises UserError where some are not among `records`."""
    needed = [record for record in records if at <= record.step < step]
    if [record.step for record in needed] != list(range(at, step)):
        raise UserError(f"{file.path}: says it stands at step {at}, from where it cannot be brought to {step}; {REMEDY}")
    return needed


def bring_level(
    file: LayerFile,
    theta_0: Callable[[], Source],
    records: Sequence[Record],
    step: int,
    working: WorkingCopy | None,
    threads: Threads,
) -> None:
    """Brings the layer's file, and its part of the working copy where there is one, to `step`; checks the checksum.

    theta_0: opens θ₀; called only where there is no file yet. records: consecutive steps that reach from where the file
    stands (from θ₀ where there is none) to `step`. Doing it again changes nothing, so a worker that died half-way is
    simply repeated. No more than a slice is in memory.

    Raises UserError where the file is damaged, RunError where the disk does not take it; the file is then as it was.
    """
    fresh = _Fresh(file, theta_0(), threads) if not file.path.exists() else None
    with fresh or _Held(file) as held:
        needed = due(file, records, held.front.step, step)
        writer = None
        try:
            writer = FileWriter(file) if needed or fresh else None
            for section in file.sections(SECTION_BYTES):
                data = held.read(section)
                for part in file.views(section, data, held.front):
                    part.advance(needed, threads)
                    if working:
                        working.write(part, threads)
                if writer:
                    writer.write(section, memoryview(data))
            held.check()
            for part in held.front.small.values():
                part.advance(needed, threads)
                if working:
                    working.write(part, threads)
            if writer:
                writer.finish(held.front, step)
        except OSError as error:
            if writer:
                writer.discard()
            raise RunError(f"{file.path}: cannot be written ({error.strerror}); the file is as it was before this step") from None
        except BaseException:
            if writer:
                writer.discard()
            raise


def check(file: LayerFile, direct: bool = False) -> None:
    """Reads the whole file, past the page cache where `direct`; raises UserError where it is not what was written."""
    with FileReader(file) as reader:
        front = reader.front
    found = xxhash.xxh3_64()
    descriptor = open_file(file.path, os.O_RDONLY, direct)
    try:
        view = memoryview(mmap.mmap(-1, CHECK_BYTES))
        for low in range(file.front_bytes, file.size, CHECK_BYTES):
            size = min(CHECK_BYTES, file.size - low)
            read_aligned(descriptor, view, low, size, file.path)
            found.update(view[:size])
    finally:
        os.close(descriptor)
    file.check(found, front)


class _Held:
    """A layer that has a file: its sections in order, and whether the checksum agrees."""

    def __init__(self, file: LayerFile) -> None:
        self._file = file
        self._reader = FileReader(file)
        self._hash = xxhash.xxh3_64()
        self.front = self._reader.front
        self._found = self.front.copy()  # as read: the other one is changed

    def read(self, section: Section) -> np.ndarray:
        """Its bytes, uint8."""
        data = np.empty(section.high - section.low, np.uint8)
        read_fully(self._reader.descriptor, memoryview(data), section.low, data.size, self._file.path)
        self._hash.update(data)
        return data

    def check(self) -> None:
        self._file.check(self._hash, self._found)

    def __enter__(self) -> "_Held":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()


class _Fresh:
    """A layer that has none yet: the same, from θ₀."""

    def __init__(self, file: LayerFile, theta_0: Source, threads: Threads) -> None:
        self._file = file
        self._theta_0 = theta_0
        self._threads = threads
        self.front = file.empty_front()
        for part in self.front.small.values():
            part.put(theta_0.read(part.tensor, 0, part.tensor.size), threads)

    def read(self, section: Section) -> np.ndarray:
        data = np.empty(section.high - section.low, np.uint8)
        for part in self._file.views(section, data, self.front):
            part.put(self._theta_0.read(part.tensor, part.start, part.data.size), self._threads)
        return data

    def check(self) -> None:
        pass

    def __enter__(self) -> "_Fresh":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Finished:
    """A layer at the journal's end, read in slices from wherever its file stands; nothing is written."""

    def __init__(self, file: LayerFile, records: Sequence[Record], step: int, threads: Threads) -> None:
        self._reader = FileReader(file)
        self._needed = due(file, records, self._reader.front.step, step)
        self._threads = threads

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        """float32 [count]; whole rows."""
        part = self._reader.part(tensor, start, count)
        if self._needed:
            part = Part(tensor, start, part.data.copy(), part.scales.copy())
            part.advance(self._needed, self._threads)
        return part.float32()

    def close(self) -> None:
        self._reader.close()


class Replayed:
    """A layer's storage after `records`, computed slice by slice from θ₀ alone."""

    def __init__(self, theta_0: Source, storage: Storage, records: Sequence[Record], threads: Threads) -> None:
        self._theta_0 = theta_0
        self._storage: Storage = storage
        self._records = records
        self._threads = threads

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        """float32 [count]; whole rows."""
        part = Part.empty(tensor, start, count, self._storage)
        part.put(self._theta_0.read(tensor, start, count), self._threads)
        part.advance(self._records, self._threads)
        return part.float32()

    def close(self) -> None:
        pass


def remove_partial(directory: Path) -> None:
    """Removes what a killed writer left."""
    for path in directory.glob("*.next"):
        os.unlink(path)
