"""Makes a layer's perturbed tensors for the members of one perturbation, or what they share, in reused memory."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from es_lite.algorithm import formats
from es_lite.algorithm.jit import Threads
from es_lite.model.layout import Tensor
from es_lite.scoring.arrays import as_tensor
from es_lite.scoring.factors import LowRankFactors, factors_of
from es_lite.scoring.greatest import RunningGreatest
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.perturbation import Perturbation
from es_lite.weights.parts import Part

# The working copy's arrays are read-only, and nobody writes to the tensors that are made of them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class Scratch:
    """What `tensors`, `block` and `rows` return is valid until the next call of one of them."""

    device = torch.device("cpu")

    def __init__(self, compute: torch.dtype, threads: Threads) -> None:
        self._compute = compute
        self._threads = threads
        self._buffers: list[np.ndarray] = [np.empty(0, self._numpy_type) for _ in range(2)]
        self._base_buffer: np.ndarray = np.empty(0, self._numpy_type)
        self._base: dict[str, torch.Tensor] = {}
        self._based: Mapping[str, Part] | None = None
        """What `_base` holds."""

    @property
    def _numpy_type(self) -> type:
        return np.uint16 if self._compute == torch.bfloat16 else np.float32

    def tensors(self, perturbation: Perturbation, parts: Mapping[str, Part]) -> list[dict[str, torch.Tensor]]:
        """For each member: name → tensor of the compute type. The noise of a pair is drawn once for both."""
        return self._tensors(
            self._reserve(perturbation.members, sum(part.data.size for part in parts.values())), perturbation, parts
        )

    def kept(self, perturbation: Perturbation, parts: Mapping[str, Part]) -> list[dict[str, torch.Tensor]]:
        """The same in new memory, for small tensors: valid for as long as it is held."""
        size = sum(part.data.size for part in parts.values())
        buffers: list[np.ndarray] = [np.empty(size, self._numpy_type) for _ in perturbation.signs]
        return self._tensors(buffers, perturbation, parts)

    def base(self, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
        """name → unperturbed tensor of the compute type: the stored one, or if that has another type, converted.

        Valid until the next call with other `parts`, which are compared by identity.
        """
        if self._based is not parts:
            self._based, self._base = None, {}  # or the buffer could not be freed
            size = self._conversion_size(parts)
            if self._base_buffer.size < size:
                self._base_buffer = np.empty(0, self._numpy_type)  # free the old one first
                self._base_buffer = np.empty(size, self._numpy_type)
            self._base = self._converted(parts, self._base_buffer)
            self._based = parts
        return self._base

    def own_base(self, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
        """The same; what has to be converted is in new memory, valid for as long as it is held."""
        return self._converted(parts, np.empty(self._conversion_size(parts), self._numpy_type))

    def factors(
        self, perturbations: Sequence[Perturbation], tensor: Tensor, first: int = 0, rows: int | None = None
    ) -> LowRankFactors | None:
        """The perturbations of a matrix (of rows first … first + rows - 1; default: all); None if it is not perturbed."""
        if perturbations[0].sigma_of(tensor) == 0:
            return None
        return factors_of([each.factors(tensor, first, rows) for each in perturbations], self._compute)

    def _conversion_size(self, parts: Mapping[str, Part]) -> int:
        """Elements of the parts that have to be converted."""
        return sum(part.data.size for part in parts.values() if part.data.dtype != self._numpy_type)

    def _converted(self, parts: Mapping[str, Part], buffer: np.ndarray) -> dict[str, torch.Tensor]:
        found, offset = {}, 0
        for name, part in parts.items():
            data = part.data
            if data.dtype != self._numpy_type:
                data = buffer[offset : offset + part.data.size]
                offset += data.size
                self._dequantise(data, part)
            found[name] = as_tensor(data).view(part.shape)
        return found

    def _dequantise(self, out: np.ndarray, part: Part) -> None:
        """Converts a part to the compute type."""

        def cut(low: int, high: int) -> None:
            stored, start = part.data[low:high], part.start + low
            formats.dequantise(out[low:high], stored, scales=part.scales, width=part.tensor.width, start=start)

        self._threads.each(part.data.size, cut)

    def _tensors(
        self, buffers: list[np.ndarray], perturbation: Perturbation, parts: Mapping[str, Part]
    ) -> list[dict[str, torch.Tensor]]:
        members: list[dict[str, torch.Tensor]] = [{} for _ in perturbation.signs]
        offset = 0
        for name, part in parts.items():
            outs = [buffer[offset : offset + part.data.size] for buffer in buffers]
            self._perturb(perturbation, outs, part)
            for member, out in zip(members, outs, strict=True):
                member[name] = as_tensor(out).view(part.shape)
            offset += part.data.size
        return members

    def block(self, perturbation: Perturbation, part: Part) -> list[torch.Tensor]:
        """For each member: the part, whole rows of a tensor, [rows, ...]."""
        outs = self._reserve(perturbation.members, part.data.size)
        self._perturb(perturbation, outs, part)
        return [as_tensor(out).view(part.shape) for out in outs]

    def rows(
        self, perturbation: Perturbation, tensor: Tensor, rows: np.ndarray, weights: np.ndarray, scales: np.ndarray
    ) -> list[torch.Tensor]:
        """For each member: the rows `rows`, int64 [R], of a matrix, [R, W]. weights, scales: these rows as stored."""
        outs = [out.reshape(weights.shape) for out in self._reserve(perturbation.members, weights.size)]
        noise, place, sigma = perturbation.noise, perturbation.place_of(tensor), perturbation.sigma_of(tensor)

        def cut(low: int, high: int) -> None:
            some, minus = slice(low, high), outs[1][low:high] if len(outs) == 2 else None
            noise.perturb_rows(outs[0][some], minus, weights[some], rows[some], place, sigma, tensor.shape, scales=scales[some])

        self._threads.each(rows.size, cut, least=64)
        return [as_tensor(out) for out in outs]

    def log_sum_exp(self, targets: np.ndarray) -> RunningLogSumExp:
        return RunningLogSumExp(targets)

    def greatest(self, rows: int) -> RunningGreatest:
        return RunningGreatest(rows)

    def _perturb(self, perturbation: Perturbation, outs: list[np.ndarray], part: Part) -> None:
        sigma = perturbation.sigma_of(part.tensor)
        if sigma == 0:
            for out in outs:
                if part.data.dtype == out.dtype:
                    out[:] = part.data
                else:
                    self._dequantise(out, part)
            return
        noise, place, shape = perturbation.noise, perturbation.place_of(part.tensor), part.tensor.shape

        def cut(low: int, high: int) -> None:
            start, minus = part.start + low, outs[1][low:high] if len(outs) == 2 else None
            noise.perturb(outs[0][low:high], minus, part.data[low:high], place, sigma, shape, start=start, scales=part.scales)

        self._threads.each(part.data.size, cut)

    def _reserve(self, members: int, size: int) -> list[np.ndarray]:
        """A buffer of `size` elements for each member."""
        for index in range(members):
            if self._buffers[index].size < size:
                self._buffers[index] = np.empty(0, self._numpy_type)  # free the old one first
                self._buffers[index] = np.empty(size, self._numpy_type)
        return [buffer[:size] for buffer in self._buffers[:members]]
