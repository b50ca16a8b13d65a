"""Reads a layer at any step: its stored tensors, from its file or from θ₀, advanced by the records in between.

The update, the stream, exports and replay all read weights through this module.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.record import Record
from es_lite.model.layout import Tensor
from es_lite.model.source import Source
from es_lite.weights.layer_file import FileReader, LayerFile
from es_lite.weights.layer_format import Front, LayerFormat, Section
from es_lite.weights.parts import Part


class StoredLayer(Protocol):
    """A layer's stored tensors, at the step of `front`."""

    front: Front

    def part(self, tensor: Tensor, start: int, count: int) -> Part: ...
    def read_section(self, section: Section, out: np.ndarray) -> None: ...
    def verify(self) -> None: ...
    def close(self) -> None: ...


class InitialLayer:
    """A layer at step 0, converted from θ₀; the same operations as `FileReader`."""

    def __init__(self, format: LayerFormat, theta_0: Source, threads: Threads) -> None:
        self._format = format
        self._theta_0 = theta_0
        self._threads = threads
        self.front = format.empty_front()
        for part in self.front.small.values():
            self._fill(part)

    def part(self, tensor: Tensor, start: int, count: int) -> Part:
        part = Part.empty(tensor, start, count, self._format.storage)
        self._fill(part)
        return part

    def read_section(self, section: Section, out: np.ndarray) -> None:
        for part in self._format.views(section, out, self.front):
            self._fill(part)

    def verify(self) -> None:
        """There is no checksum to compare."""

    def close(self) -> None:
        pass

    def _fill(self, part: Part) -> None:
        part.put(self._theta_0.read(part.tensor, part.start, part.data.size), self._threads)


class LayerReader:
    """A layer at a step: slices of it (`part`), or all its sections in order (`section`), then `small` and `verify`.

    Attributes:
        front: the layer's front; its scales and small tensors are advanced by `section` and `small`.
        needed: the records that lead from the stored step to the reader's.
    """

    def __init__(
        self,
        stored: StoredLayer,
        format: LayerFormat,
        needed: Sequence[Record],
        threads: Threads,
        theta_0: Callable[[], Source] | None,
    ) -> None:
        """theta_0: opens θ₀; called only if one of the records is anchored."""
        self.front = stored.front
        self.needed = needed
        self.format = format
        self._stored = stored
        self._threads = threads
        self._theta_0 = theta_0
        self._reading = threading.Lock()  # several threads may ask for parts, but a source is read by one at a time

    @classmethod
    def of_file(
        cls,
        file: LayerFile,
        records: Sequence[Record],
        step: int,
        threads: Threads,
        direct: bool = False,
        theta_0: Callable[[], Source] | None = None,
    ) -> "LayerReader":
        """From the layer's file. records: all that may be needed. direct: read sections bypassing the page cache.
        theta_0: opens θ₀, which anchored records need.

        Raises DamagedFile if the file cannot be read, or if the records do not lead from its step to `step`.
        """
        stored = FileReader(file, direct)
        at = stored.front.step
        needed = _between(records, at, step)
        if needed is None:
            stored.close()
            raise file.damaged(f"holds step {at}, and the records at hand do not lead from there to step {step}")
        return cls(stored, file.format, needed, threads, theta_0)

    @classmethod
    def of_theta_0(cls, format: LayerFormat, theta_0: Source, records: Sequence[Record], threads: Threads) -> "LayerReader":
        """From θ₀, through `records`, which begin at step 0."""
        return cls(InitialLayer(format, theta_0, threads), format, records, threads, lambda: theta_0)

    @classmethod
    def of_either(
        cls, file: LayerFile, theta_0: Callable[[], Source], records: Sequence[Record], step: int, threads: Threads
    ) -> "LayerReader":
        """From the layer's file if there is one, else from θ₀, which is opened only then, or if a record is anchored."""
        if file.exists():
            return cls.of_file(file, records, step, threads, theta_0=theta_0)
        needed = _between(records, 0, step)
        if needed is None:
            raise file.damaged(f"is missing, and the records at hand do not lead from the beginning to step {step}")
        return cls.of_theta_0(file.format, theta_0(), needed, threads)

    def part(self, tensor: Tensor, start: int, count: int) -> Part:
        """A copy of the elements from `start` on, whole rows."""
        part = self._stored.part(tensor, start, count)
        self._advance(part)
        return part

    def section(self, section: Section, out: np.ndarray) -> list[Part]:
        """Reads the section into `out`, uint8, and returns its parts, advanced, as views of it."""
        self.load(section, out)
        return self.advance(section, out)

    def load(self, section: Section, out: np.ndarray) -> None:
        """The first half of `section`: reads the stored bytes into `out`."""
        self._stored.read_section(section, out)

    def advance(self, section: Section, out: np.ndarray) -> list[Part]:
        """The second half of `section`: returns the parts in `out`, advanced."""
        parts = self.format.views(section, out, self.front)
        for part in parts:
            self._advance(part)
        return parts

    def small(self) -> list[Part]:
        """The front's small tensors, advanced in place; to be called once."""
        parts = list(self.front.small.values())
        for part in parts:
            self._advance(part)
        return parts

    def _advance(self, part: Part) -> None:
        part.advance(self.needed, self._threads, self._read_theta_0)

    def _read_theta_0(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        assert self._theta_0 is not None, "anchored records need θ₀"
        with self._reading:
            return self._theta_0().read(tensor, start, count)

    def verify(self) -> None:
        """To be called after all sections. Raises DamagedFile if the checksum does not match."""
        self._stored.verify()

    def close(self) -> None:
        self._stored.close()

    def __enter__(self) -> "LayerReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _between(records: Sequence[Record], at: int, step: int) -> list[Record] | None:
    """The records that lead from step `at` to `step`; None if some are missing."""
    needed = [record for record in records if at <= record.step < step]
    return needed if [record.step for record in needed] == list(range(at, step)) else None
