"""A layer's tensors as the members of one noise pair see them, made in scratch and let go."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from es_lite.algorithm import kernels
from es_lite.weights.layout import Tensor
from es_lite.weights.working import WorkingCopy


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


class Scratch:
    """Makes perturbed tensors in buffers that it reuses: what it gives is valid until its next call."""

    def __init__(self, working: WorkingCopy, compute: torch.dtype, threads: kernels.Threads) -> None:
        self._working = working
        self._compute = compute
        self._threads = threads
        self._buffers: list[np.ndarray] = [np.empty(0, self._numpy_type) for _ in range(2)]
        self.perturbation = UNPERTURBED

    @property
    def _numpy_type(self) -> type:
        return np.uint16 if self._compute == torch.bfloat16 else np.float32

    def tensors(self, named: dict[str, Tensor]) -> list[dict[str, torch.Tensor]]:
        """For each member: name → tensor of the compute type. The noise of a pair is made once for both."""
        buffers = self._reserve(sum(tensor.size for tensor in named.values()))
        members: list[dict[str, torch.Tensor]] = [{} for _ in self.perturbation.signs]
        offset = 0
        for name, tensor in named.items():
            parts = [buffer[offset : offset + tensor.size] for buffer in buffers]
            self._perturb(parts, tensor, 0)
            for member, part in zip(members, parts, strict=True):
                member[name] = self._torch(part).view(tensor.shape)
            offset += tensor.size
        return members

    def block(self, tensor: Tensor, first: int, count: int) -> list[torch.Tensor]:
        """For each member: rows first … first + count - 1 of a tensor, [count, ...]."""
        width = tensor.size // tensor.shape[0]
        parts = self._reserve(count * width)
        self._perturb(parts, tensor, first * width)
        return [self._torch(part).view(count, *tensor.shape[1:]) for part in parts]

    def rows(self, tensor: Tensor, rows: np.ndarray) -> list[torch.Tensor]:
        """For each member: the given rows, int64 [R], of a matrix alone, [R, W]."""
        width = tensor.shape[1]
        weights = self._working.bits(tensor).reshape(tensor.shape)
        parts = [part.reshape(rows.size, width) for part in self._reserve(rows.size * width)]
        sigma = self.perturbation.sigma * tensor.sigma * self.perturbation.signs[0]
        place = self._place(tensor)

        def cut(low: int, high: int) -> None:
            minus = parts[1][low:high] if len(parts) == 2 else None
            kernels.perturb_rows(parts[0][low:high], minus, weights, rows[low:high], sigma=sigma, **place)

        self._threads.each(rows.size, cut, least=64)
        return [self._torch(part) for part in parts]

    def _perturb(self, parts: Sequence[np.ndarray], tensor: Tensor, start: int) -> None:
        weights = self._working.bits(tensor)[start : start + parts[0].size]
        sigma = self.perturbation.sigma * tensor.sigma * self.perturbation.signs[0]
        if sigma == 0:
            for part in parts:
                part[:] = weights if part.dtype == np.uint16 else kernels.as_float32(weights)
            return
        place = self._place(tensor)

        def cut(low: int, high: int) -> None:
            minus = parts[1][low:high] if len(parts) == 2 else None
            kernels.perturb(parts[0][low:high], minus, weights[low:high], sigma=sigma, start=start + low, **place)

        self._threads.each(weights.size, cut)

    def _place(self, tensor: Tensor) -> dict[str, int]:
        p = self.perturbation
        return {"seed": p.seed, "step": p.step, "pair": p.pair, "tensor": tensor.number}

    def _reserve(self, size: int) -> list[np.ndarray]:
        """A buffer of `size` elements for each member."""
        for index in range(self.perturbation.members):
            if self._buffers[index].size < size:
                self._buffers[index] = np.empty(size, self._numpy_type)
        return [buffer[:size] for buffer in self._buffers[: self.perturbation.members]]

    def _torch(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
