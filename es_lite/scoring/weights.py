"""What scoring needs of its weights, which are a working copy or a stream."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from es_lite.model.layout import Layer, Tensor
from es_lite.weights.parts import Part


class Weights(Protocol):
    """Within a pass, tensors must be requested in the model's order, since a stream has them in no other."""

    def passing(self) -> contextlib.AbstractContextManager[None]:
        """One pass of a batch through the model."""
        ...

    def opened(self, layer: Layer) -> contextlib.AbstractContextManager[None]:
        """Entered while a layer's tensors are used."""
        ...

    def part(self, tensor: Tensor) -> Part:
        """The whole stored tensor."""
        ...

    def rows(self, tensor: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows, int64 [R], of the embedding: [R, W] as stored, and their scales, [R] or empty."""
        ...

    def blocks(self, tensor: Tensor, rows: int) -> Iterator[Part]:
        """The head's matrix in blocks of `rows` rows, in order."""
        ...
