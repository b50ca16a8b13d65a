"""The layers on disk: the fp32 master or, if there is none, the bf16 or int8 weights themselves.

A file is never changed under its own name (`files`), so a crash leaves each layer complete at step t or t+1, and `advance_layer`
continues from there. Files are not fsynced: the checksum detects one that a power cut tore, and it is rebuilt from θ₀ and the
journal.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from es_lite.algorithm.formats import Storage
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.errors import DamagedFile, RunError, UserError
from es_lite.files import NewFile, Spare, read_fully, view_of
from es_lite.model.layout import Layer, Layout
from es_lite.model.source import Source
from es_lite.weights.layer_file import FileWriter, LayerFile, commit_front
from es_lite.weights.layer_format import LayerFormat
from es_lite.weights.parts import SLICE, Part
from es_lite.weights.reading import LayerReader
from es_lite.weights.working_copy import WorkingCopy

SECTION_BYTES = 4 * SLICE
"""The most bytes of a layer that an update has in memory at a time."""


class Store:
    """The files of all layers, in the layout's order."""

    def __init__(self, folder: Path, layout: Layout, storage: Storage, theta_0: Callable[[], Source] | None = None) -> None:
        """theta_0: opens θ₀, which `reader` needs for anchored records."""
        self.folder = folder
        self._theta_0 = theta_0
        self.files = [LayerFile(folder / f"{layer.name}.safetensors", LayerFormat(layer, storage)) for layer in layout.layers]

    def steps(self) -> list[int]:
        """The step that each layer is at; 0 if it has no file yet. Raises DamagedFile."""
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
        """Removes damaged files, which are rebuilt when needed; yields the error of each."""
        for file in self.files:
            if file.exists():
                try:
                    file.check()
                except DamagedFile as error:
                    file.path.unlink()
                    yield error

    def reader(self, layer: Layer, records: Sequence[Record], step: int, threads: Threads) -> LayerReader:
        """The layer at `step`, whatever step its file is at. Raises DamagedFile."""
        return LayerReader.of_file(self.files[layer.index], records, step, threads, theta_0=self._theta_0)


def advance_layer(
    file: LayerFile,
    theta_0: Callable[[], Source],
    records: Sequence[Record],
    step: int,
    working: WorkingCopy | None,
    threads: Threads,
    spare: Spare | None = None,
) -> None:
    """Brings the layer's file, and its part of the working copy if there is one, to `step`; verifies the checksum.

    theta_0: opens θ₀; called only if there is no file yet, or if a record is anchored. records: lead from the file's step (0 if
    there is none) to `step`.
    spare: a file to write over. Calling it again changes nothing, so a worker's unfinished work is simply repeated. One section
    is in memory at a time.

    Raises DamagedFile if the file is damaged, RunError if the disk is full; the file is then unchanged.
    """
    writer = None
    with LayerReader.of_either(file, theta_0, records, step, threads) as reader:
        try:
            writer = FileWriter(file, spare=spare) if reader.needed or not file.exists() else None
            for section in file.format.sections(SECTION_BYTES):
                data = np.empty(section.bytes, np.uint8)
                _copy(reader.section(section, data), working, threads)
                if writer:
                    writer.write(section, view_of(data))
            reader.verify()
            _copy(reader.small(), working, threads)
            if writer:
                writer.finish(reader.front, step)
        except BaseException as error:
            if writer:
                writer.discard()
            if isinstance(error, OSError):
                raise _not_written(file, error) from None
            raise


def section_count(file: LayerFile) -> int:
    """The number of sections that `advance_layer_sections` takes a range of."""
    return len(file.format.sections(SECTION_BYTES))


def advance_layer_sections(
    file: LayerFile,
    low: int,
    high: int,
    theta_0: Callable[[], Source],
    records: Sequence[Record],
    step: int,
    working: WorkingCopy | None,
    threads: Threads,
) -> None:
    """`advance_layer` for sections low … high - 1 alone, so several workers can share a layer. It too can be repeated.

    The new file stays incomplete, next to the old one, until `finish_layer` is called.
    """
    with LayerReader.of_either(file, theta_0, records, step, threads) as reader:
        changes = bool(reader.needed) or not file.exists()
        try:
            with NewFile(file.path, keep=True) if changes else contextlib.nullcontext() as new:
                for section in file.format.sections(SECTION_BYTES)[low:high]:
                    data = np.empty(section.bytes, np.uint8)
                    parts = reader.section(section, data)
                    _copy(parts, working, threads)
                    if new:
                        for part in (part for part in parts if part.scales.size):
                            first = part.start // part.tensor.width
                            new.write(view_of(part.own_scales), file.format.scales_offset(part.tensor) + 4 * first)
                        new.write(view_of(data), section.low)
                if new:
                    new.close()
        except OSError as error:
            raise _not_written(file, error) from None


def finish_layer(
    file: LayerFile,
    theta_0: Callable[[], Source],
    records: Sequence[Record],
    step: int,
    working: WorkingCopy | None,
    threads: Threads,
) -> None:
    """Completes `advance_layer_sections`, when all sections are done: replaces the old file, without verifying it."""
    with LayerReader.of_either(file, theta_0, records, step, threads) as reader:
        _copy(reader.small(), working, threads)
        if not reader.needed and file.exists():
            return
        try:
            with NewFile(file.path, keep=True) as new:
                front = reader.front
                for tensor in (t for t in file.format.matrices if t.name in front.scales):
                    scales = view_of(front.scales_of(tensor))
                    read_fully(new.descriptor, scales, file.format.scales_offset(tensor), len(scales))
                front.step = step
                front.checksum = file.format.checksum(file.hash_matrices(new.descriptor), front)
                commit_front(new, file.format, front)
        except OSError as error:
            raise _not_written(file, error) from None


def _copy(parts: Sequence[Part], working: WorkingCopy | None, threads: Threads) -> None:
    """Copies parts to the working copy, if there is one."""
    if working:
        for part in parts:
            working.write(part, threads)


def _not_written(file: LayerFile, error: OSError) -> RunError:
    return RunError(
        f"{file.path}: cannot be written ({error.strerror}); the file is as it was: free some space, then run it again "
        "(train: with --resume)"
    )
