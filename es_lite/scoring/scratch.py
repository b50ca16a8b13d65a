"""Makes a layer's perturbed tensors for the members of one perturbation, in reused memory."""

import numpy as np
import torch

from es_lite.algorithm import formats
from es_lite.algorithm.jit import Threads
from es_lite.model.layout import Tensor
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.perturbation import Perturbation
from es_lite.weights.parts import Part


class Scratch:
    """What it returns is valid until the next call."""

    device = torch.device("cpu")

    def __init__(self, compute: torch.dtype, threads: Threads) -> None:
        self._compute = compute
        self._threads = threads
        self._buffers: list[np.ndarray] = [np.empty(0, self._numpy_type) for _ in range(2)]

    @property
    def _numpy_type(self) -> type:
        return np.uint16 if self._compute == torch.bfloat16 else np.float32

    def tensors(self, perturbation: Perturbation, parts: dict[str, Part]) -> list[dict[str, torch.Tensor]]:
        """For each member: name → tensor of the compute type. The noise of a pair is drawn once for both."""
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
        """For each member: the part, whole rows of a tensor, [rows, ...]."""
        outs = self._reserve(perturbation.members, part.data.size)
        self._perturb(perturbation, outs, part)
        return [self._torch(out).view(-1, *part.tensor.shape[1:]) for out in outs]

    def rows(
        self, perturbation: Perturbation, tensor: Tensor, rows: np.ndarray, weights: np.ndarray, scales: np.ndarray
    ) -> list[torch.Tensor]:
        """For each member: the rows `rows`, int64 [R], of a matrix, [R, W]. weights, scales: these rows as stored."""
        outs = [out.reshape(weights.shape) for out in self._reserve(perturbation.members, weights.size)]
        noise, place, sigma = perturbation.noise, perturbation.place_of(tensor), perturbation.sigma_of(tensor)

        def cut(low: int, high: int) -> None:
            some, minus = slice(low, high), outs[1][low:high] if len(outs) == 2 else None
            noise.perturb_rows(outs[0][some], minus, weights[some], rows[some], place, sigma, scales=scales[some])

        self._threads.each(rows.size, cut, least=64)
        return [self._torch(out) for out in outs]

    def log_sum_exp(self, targets: np.ndarray) -> RunningLogSumExp:
        return RunningLogSumExp(targets)

    def _perturb(self, perturbation: Perturbation, outs: list[np.ndarray], part: Part) -> None:
        sigma = perturbation.sigma_of(part.tensor)
        if sigma == 0 and part.data.dtype == outs[0].dtype:
            for out in outs:
                out[:] = part.data
            return
        noise, place, width = perturbation.noise, perturbation.place_of(part.tensor), part.tensor.width

        def cut(low: int, high: int) -> None:
            start, minus = part.start + low, outs[1][low:high] if len(outs) == 2 else None
            stored = part.data[low:high]
            if sigma == 0:
                for out in outs:
                    formats.dequantise(out[low:high], stored, scales=part.scales, width=width, start=start)
                return
            noise.perturb(outs[0][low:high], minus, stored, place, sigma, start=start, scales=part.scales, width=width)

        self._threads.each(part.data.size, cut)

    def _reserve(self, members: int, size: int) -> list[np.ndarray]:
        """A buffer of `size` elements for each member."""
        for index in range(members):
            if self._buffers[index].size < size:
                self._buffers[index] = np.empty(0, self._numpy_type)  # free the old one first
                self._buffers[index] = np.empty(size, self._numpy_type)
        return [buffer[:size] for buffer in self._buffers[:members]]

    def _torch(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
