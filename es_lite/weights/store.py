"""The layers on disk: the fp32 master or, if there is none, the bf16 or int8 weights themselves.

A file is never changed in place (`files`). So a crash leaves each layer complete at step t or t+1, and `advance` takes it
on. Files are not fsynced at each step: the journal is the truth, the checksum finds a layer that a
power cut tore, and θ₀ and the journal make it again.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from es_lite.algorithm.formats import Storage
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.errors import DamagedFile, RunError, UserError
from es_lite.files import NewFile, read_fully, view_of
from es_lite.model.layout import Layer, Layout
from es_lite.model.source import Source
from es_lite.weights.layer_file import FileWriter, LayerFile, commit_front
from es_lite.weights.layer_format import LayerFormat
from es_lite.weights.parts import SLICE
from es_lite.weights.reading import LayerReader
from es_lite.weights.working_copy import WorkingCopy

SECTION_BYTES = 4 * SLICE
"""The most that an update has in memory at a time."""


class Store:
    """The files of all layers, in the layout's order."""

    def __init__(self, folder: Path, layout: Layout, storage: Storage) -> None:
        self.folder = folder
        self.files = [LayerFile(folder / f"{layer.name}.safetensors", LayerFormat(layer, storage)) for layer in layout.layers]

    def steps(self) -> list[int]:
        """The step that each layer's file holds; 0, θ₀'s, if there is no file yet. Raises DamagedFile."""
        return [file.front().step if file.exists() else 0 for file in self.files]

    def check_steps(self, last: int, journal: Path) -> None:
        """Raises UserError if a layer is ahead of the journal, which ends at step `last`."""
        highest = max(self.steps())
        if highest > last:
            raise UserError(
                f"{self.folder}: a layer is at step {highest}, but {journal} ends at step {last}; restore the journal, or remove "
                f"{self.folder} to make it again from the journal"
            )

    def remove_damaged(self) -> Iterator[DamagedFile]:
        """Removes the files that are not what was written, so that they are made again; says which."""
        for file in self.files:
            if file.exists():
                try:
                    file.check()
                except DamagedFile as error:
                    file.path.unlink()
                    yield error

    def reader(self, layer: Layer, records: Sequence[Record], step: int, threads: Threads) -> LayerReader:
        """The layer at `step`, wherever its file stands. Raises DamagedFile."""
        return LayerReader.of_file(self.files[layer.index], records, step, threads)


def advance(
    file: LayerFile,
    theta_0: Callable[[], Source],
    records: Sequence[Record],
    step: int,
    working: WorkingCopy | None,
    threads: Threads,
) -> None:
    """Brings the layer's file, and its part of the working copy if there is one, to `step`; compares the checksum.

    theta_0: opens θ₀; called only if there is no file yet. records: consecutive steps that lead from where the file
    stands (from θ₀ if there is none) to `step`. Doing it again changes nothing, so what a worker left half done is
    simply repeated. No more than a section is in memory.

    Raises DamagedFile if the file is damaged, RunError if the disk is full; the file is then as it was.
    """
    writer = None
    with LayerReader.of_either(file, theta_0, records, step, threads) as reader:
        try:
            writer = FileWriter(file) if reader.needed or not file.exists() else None
            for section in file.format.sections(SECTION_BYTES):
                data = np.empty(section.bytes, np.uint8)
                for part in reader.section(section, data):
                    if working:
                        working.write(part, threads)
                if writer:
                    writer.write(section, view_of(data))
            reader.verify()
            for part in reader.small():
                if working:
                    working.write(part, threads)
            if writer:
                writer.finish(reader.front, step)
        except BaseException as error:
            if writer:
                writer.discard()
            if isinstance(error, OSError):
                raise _not_written(file, error) from None
            raise


def sections(file: LayerFile) -> int:
    """How many sections the layer's matrices are cut into; `advance_sections` takes a range of them."""
    return len(file.format.sections(SECTION_BYTES))


def advance_sections(
    file: LayerFile,
    low: int,
    high: int,
    theta_0: Callable[[], Source],
    records: Sequence[Record],
    step: int,
    working: WorkingCopy | None,
    threads: Threads,
) -> None:
    """The part of `advance` that is about sections low … high - 1, so that several workers can share a layer.

    The new file stays incomplete, next to the old one, until `finish` has been called; what is repeated changes nothing.
    """
    with LayerReader.of_either(file, theta_0, records, step, threads) as reader:
        try:
            new = NewFile(file.path, keep=True) if reader.needed or not file.exists() else None
            try:
                for section in file.format.sections(SECTION_BYTES)[low:high]:
                    data = np.empty(section.bytes, np.uint8)
                    for part in reader.section(section, data):
                        if working:
                            working.write(part, threads)
                        if new and part.scales.size:
                            first = part.start // part.tensor.width
                            new.write(view_of(part.own_scales), file.format.scales_offset(part.tensor) + 4 * first)
                    if new:
                        new.write(view_of(data), section.low)
            except BaseException:
                if new:
                    new.discard()
                raise
            if new:
                new.close()
        except OSError as error:
            raise _not_written(file, error) from None


def finish(
    file: LayerFile,
    theta_0: Callable[[], Source],
    records: Sequence[Record],
    step: int,
    working: WorkingCopy | None,
    threads: Threads,
) -> None:
    """Completes what `advance_sections` did to all sections, and puts the new file in place; the old one is not checked."""
    with LayerReader.of_either(file, theta_0, records, step, threads) as reader:
        for part in reader.small():
            if working:
                working.write(part, threads)
        if not reader.needed and file.exists():
            return
        try:
            new = NewFile(file.path, keep=True)
            try:
                front = reader.front
                for tensor in (t for t in file.format.matrices if t.name in front.scales):
                    scales = view_of(front.scales_of(tensor))
                    read_fully(new.descriptor, scales, file.format.scales_offset(tensor), len(scales))
                front.step = step
                front.checksum = file.format.checksum(file.hash_matrices(new.descriptor), front)
                commit_front(new, file.format, front)
            except BaseException:
                new.discard()
                raise
        except OSError as error:
            raise _not_written(file, error) from None


def _not_written(file: LayerFile, error: OSError) -> RunError:
    return RunError(f"{file.path}: cannot be written ({error.strerror}); the file is as it was before this step")
