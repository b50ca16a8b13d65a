"""The master: every layer in full precision, one safetensors file each, which says the step it stands at.

A file is replaced, never changed: written beside and renamed. So a crash leaves each layer whole at step t or t+1, and
`bring_level` takes it on. Files are not fsynced at each step: the journal is the truth, and a layer that a
power cut tore is made again from θ₀ and the journal once its file is removed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from es_lite.algorithm import kernels
from es_lite.algorithm.record import Record
from es_lite.errors import RunError, UserError
from es_lite.weights.layout import Layer, Tensor
from es_lite.weights.source import Source
from es_lite.weights.tensorfile import Reader, Writer, open_tensors
from es_lite.weights.working import WorkingCopy

CHUNK = 2**20
"""Elements that are read, moved and written at a time."""


def advance(theta: np.ndarray, tensor: Tensor, start: int, records: Sequence[Record], threads: kernels.Threads) -> None:
    """Takes elements start … of a tensor, float32 in place, through the steps of `records`, in order."""
    for record in records:
        pairs, coefficients = record.pairs()
        coefficients = coefficients * np.float32(tensor.coefficient)
        decay = np.float32(record.decay) * np.float32(tensor.alpha)
        if not (coefficients.any() or decay):
            continue

        def part(low: int, high: int, record=record, pairs=pairs, coefficients=coefficients, decay=decay) -> None:
            kernels.advance(
                theta[low:high],
                seed=record.seed,
                step=record.step,
                tensor=tensor.number,
                pairs=pairs,
                coefficients=coefficients,
                decay=decay,
                start=start + low,
            )

        threads.each(theta.size, part)


class MasterLayer:
    """A layer's file, opened and checked against the layer. Raises UserError where it is not whole."""

    def __init__(self, path: Path, layer: Layer) -> None:
        remedy = "remove it and resume: θ₀ and the journal make it again"
        try:
            self._entries, metadata = open_tensors(path)
        except UserError:
            raise UserError(f"{path}: truncated or damaged; {remedy}") from None
        self._reader = Reader()
        shapes = {name: entry.shape for name, entry in self._entries.items()}
        if shapes != {tensor.name: tensor.shape for tensor in layer.tensors} or not metadata.get("step", "").isdigit():
            raise UserError(f"{path}: is not {layer.name} of this model; {remedy}")
        self.step = int(metadata["step"])

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        return self._reader.float32(self._entries[tensor.name], start, count)

    def close(self) -> None:
        self._reader.close()


def file_of(directory: Path, layer: Layer) -> Path:
    return directory / f"{layer.name}.safetensors"


def standing(directory: Path, layer: Layer) -> int:
    """The step that a layer stands at; 0, θ₀'s, where there is no file yet."""
    path = file_of(directory, layer)
    return MasterLayer(path, layer).step if path.exists() else 0


def bring_level(
    directory: Path,
    layer: Layer,
    theta_0: Callable[[], Source],
    records: Sequence[Record],
    step: int,
    working: WorkingCopy,
    threads: kernels.Threads,
) -> None:
    """Brings the layer's file and its part of the working copy to `step`.

    theta_0: opens θ₀; called only where there is no file yet. records: consecutive steps that reach from where the file
    stands (from θ₀ where there is none) to `step`.
    Doing it again changes nothing, so a worker that died half-way is simply repeated.
    """
    path = file_of(directory, layer)
    held: MasterLayer | None = MasterLayer(path, layer) if path.exists() else None
    at = held.step if held else 0
    needed = [record for record in records if at <= record.step < step]
    assert [record.step for record in needed] == list(range(at, step)), f"{layer.name}: {at} to {step} lacks records"
    read = held.read if held else theta_0().read
    if held and not needed:
        for tensor, start, count in slices(layer):
            working.write(tensor, start, read(tensor, start, count))
    else:
        shapes = {tensor.name: tensor.shape for tensor in layer.tensors}
        try:
            with Writer(path, shapes, "F32", {"format": "pt", "step": str(step)}) as writer:
                for tensor, start, count in slices(layer):
                    theta = read(tensor, start, count)
                    advance(theta, tensor, start, needed, threads)
                    writer.write(theta)
                    working.write(tensor, start, theta)
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror}); the file is as it was before this step") from None
    if held:
        held.close()


def slices(layer: Layer) -> Iterator[tuple[Tensor, int, int]]:
    """(tensor, start, count) of at most CHUNK elements, covering the layer in order."""
    for tensor in layer.tensors:
        for start in range(0, tensor.size, CHUNK):
            yield tensor, start, min(CHUNK, tensor.size - start)


def remove_partial(directory: Path) -> None:
    """Removes what a killed writer left."""
    for path in directory.glob("*.next"):
        os.unlink(path)
