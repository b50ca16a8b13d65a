"""A layer's tensors as the members of one noise pair see them, made in scratch and let go."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from es_lite.algorithm import formats, kernels
from es_lite.algorithm.jit import Threads
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.weights.layout import Layer, Tensor
from es_lite.weights.stored import Part


@dataclass(frozen=True)
class Perturbation:
    """θ + sign·σ·ε(seed, step, pair) for each sign: both members of an antithetic pair, one member, or θ itself."""

    seed: int = 0
    step: int = 0
    pair: int = 0
    sigma: float = 0.0
    signs: tuple[int, ...] = (0,)
    """(1, -1), (1,), or (0,) for the unperturbed model."""

    @property
    def members(self) -> int:
        return len(self.signs)


UNPERTURBED = Perturbation()


class Weights(Protocol):
    """What scoring takes weights from: the working copy, or a stream of layers.

    Within a pass, a stream wants to be asked in the model's own order.
    """

    def passing(self) -> contextlib.AbstractContextManager[None]:
        """One pass of a batch through the model."""
        ...

    def opened(self, layer: Layer) -> contextlib.AbstractContextManager[None]:
        """While the tensors of a layer are used."""
        ...

    def part(self, tensor: Tensor) -> Part:
        """The whole tensor as it is stored."""
        ...

    def rows(self, tensor: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows, int64 [R], of the embedding: [R, W] as stored, and their scales, [R] or empty."""
        ...

    def blocks(self, tensor: Tensor, rows: int) -> Iterator[Part]:
        """The head's matrix in blocks of `rows` rows, in order."""
        ...


class Scratch:
    """Makes perturbed tensors in buffers that it reuses: what it gives is valid until its next call."""

    device = torch.device("cpu")

    def __init__(self, compute: torch.dtype, threads: Threads) -> None:
        self._compute = compute
        self._threads = threads
        self._buffers: list[np.ndarray] = [np.empty(0, self._numpy_type) for _ in range(2)]

    @property
    def _numpy_type(self) -> type:
        return np.uint16 if self._compute == torch.bfloat16 else np.float32

    def tensors(self, perturbation: Perturbation, parts: dict[str, Part]) -> list[dict[str, torch.Tensor]]:
        """For each member: name → tensor of the compute type. The noise of a pair is made once for both."""
        buffers = self._reserve(perturbation.members, sum(part.data.size for part in parts.values()))
        members: list[dict[str, torch.Tensor]] = [{} for _ in perturbation.signs]
        offset = 0
        for name, part in parts.items():
            outs = [buffer[offset : offset + part.data.size] for buffer in buffers]
            self._perturb(perturbation, outs, part)
            for member, out in zip(members, outs, strict=True):
                member[name] = self._torch(out).view(part.tensor.shape)
            offset += part.data.size
        return members

    def block(self, perturbation: Perturbation, part: Part) -> list[torch.Tensor]:
        """For each member: some rows of a tensor, [rows, ...]."""
        outs = self._reserve(perturbation.members, part.data.size)
        self._perturb(perturbation, outs, part)
        return [self._torch(out).view(-1, *part.tensor.shape[1:]) for out in outs]

    def rows(
        self, perturbation: Perturbation, tensor: Tensor, rows: np.ndarray, weights: np.ndarray, scales: np.ndarray
    ) -> list[torch.Tensor]:
        """For each member: the rows `rows`, int64 [R], of a matrix, [R, W], from those rows and their scales as stored."""
        outs = [out.reshape(weights.shape) for out in self._reserve(perturbation.members, weights.size)]
        sigma = sigma_of(perturbation, tensor)
        place = place_of(perturbation, tensor)

        def cut(low: int, high: int) -> None:
            some, minus = slice(low, high), outs[1][low:high] if len(outs) == 2 else None
            kernels.perturb_rows(outs[0][some], minus, weights[some], rows[some], sigma=sigma, scales=scales[some], **place)

        self._threads.each(rows.size, cut, least=64)
        return [self._torch(out) for out in outs]

    def log_sum_exp(self, targets: np.ndarray) -> RunningLogSumExp:
        return RunningLogSumExp(targets)

    def _perturb(self, perturbation: Perturbation, outs: list[np.ndarray], part: Part) -> None:
        sigma = sigma_of(perturbation, part.tensor)
        if sigma == 0 and part.data.dtype == outs[0].dtype:
            for out in outs:
                out[:] = part.data
            return
        place, width = place_of(perturbation, part.tensor), part.tensor.width

        def cut(low: int, high: int) -> None:
            start, minus = part.start + low, outs[1][low:high] if len(outs) == 2 else None
            stored = part.data[low:high]
            if sigma == 0:
                for out in outs:
                    formats.dequantise(out[low:high], stored, scales=part.scales, width=width, start=start)
                return
            kernels.perturb(outs[0][low:high], minus, stored, sigma=sigma, start=start, scales=part.scales, width=width, **place)

        self._threads.each(part.data.size, cut)

    def _reserve(self, members: int, size: int) -> list[np.ndarray]:
        """A buffer of `size` elements for each member."""
        for index in range(members):
            if self._buffers[index].size < size:
                self._buffers[index] = np.empty(0, self._numpy_type)  # let go of the old one before
                self._buffers[index] = np.empty(size, self._numpy_type)
        return [buffer[:size] for buffer in self._buffers[:members]]

    def _torch(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def sigma_of(perturbation: Perturbation, tensor: Tensor) -> float:
    """What the tensor's noise is multiplied by, for the first of the members."""
    return perturbation.sigma * tensor.sigma * perturbation.signs[0]


def place_of(perturbation: Perturbation, tensor: Tensor) -> dict[str, int]:
    """The arguments that say which noise it is."""
    return {"seed": perturbation.seed, "step": perturbation.step, "pair": perturbation.pair, "tensor": tensor.number}
