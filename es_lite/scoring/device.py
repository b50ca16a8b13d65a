"""Scratch on a device: a layer is copied there while the device still computes the previous one, and perturbed there.

Weights stay on the host, in the working copy or a stream's buffer. A layer goes through one of two pinned buffers and a separate
CUDA stream; the computation waits for the copy, but the host does not wait for the computation. The rest is torch operations that
run on any device, so the same code runs on the CPU (workers.device = "torch").
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import on_device
from es_lite.model.layout import Tensor
from es_lite.scoring.factors import LowRankFactors, factors_of
from es_lite.scoring.perturbation import Perturbation
from es_lite.weights.parts import Part


class _Staging:
    """A pinned buffer; it is filled again only after the copy out of it has ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def upload(self, arrays: list[np.ndarray], stream: "torch.cuda.Stream | None") -> list[torch.Tensor]:
        """Copies the arrays to the device; returns their bytes, uint8 each."""
        if self._copied:
            self._copied.synchronize()
        offsets = np.cumsum([0, *(-(-array.nbytes // 256) * 256 for array in arrays)])
        if self._memory.numel() < offsets[-1]:
            self._memory = torch.empty(int(offsets[-1]), dtype=torch.uint8, pin_memory=self._copied is not None)
        host = self._memory.numpy()
        for array, offset in zip(arrays, offsets, strict=False):
            host[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            copy = self._memory[: int(offsets[-1])].to(self._device, non_blocking=True, copy=True)
            if self._copied and stream:
                self._copied.record(stream)
        if stream:
            torch.cuda.current_stream(self._device).wait_stream(stream)
            copy.record_stream(torch.cuda.current_stream(self._device))
        return [copy[offset : offset + array.nbytes] for array, offset in zip(arrays, offsets, strict=False)]


class DeviceScratch:
    """`Scratch` with tensors on a device: what `tensors`, `block` and `rows` return is valid until the next call of one."""

    def __init__(self, device: torch.device, compute: torch.dtype) -> None:
        self.device = device
        self._compute = compute
        self._stagings = [_Staging(device), _Staging(device)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers = [torch.empty(0, dtype=compute, device=device) for _ in range(2)]
        self._last: object = None
        self._uploaded: list[tuple[Tensor, int, torch.Tensor, torch.Tensor | None]] = []
        self._based: Mapping[str, Part] | None = None
        self._base: dict[str, torch.Tensor] = {}
        """What `base` returned for the parts `_based`."""

    def tensors(self, perturbation: Perturbation, parts: Mapping[str, Part]) -> list[dict[str, torch.Tensor]]:
        """For each member: name → tensor of the compute type. Consecutive calls with the same `parts` copy them once."""
        if self._last is not parts:
            self._last, self._uploaded = parts, self._upload(list(parts.values()))
        buffers = self._reserve(perturbation.members, sum(part.data.size for part in parts.values()))
        return self._tensors(buffers, perturbation, parts, self._uploaded)

    def kept(self, perturbation: Perturbation, parts: Mapping[str, Part]) -> list[dict[str, torch.Tensor]]:
        """The same in new memory, for small tensors: valid for as long as it is held."""
        uploaded = self._upload(list(parts.values()))
        size = sum(part.data.size for part in parts.values())
        buffers = [torch.empty(size, dtype=self._compute, device=self.device) for _ in perturbation.signs]
        return self._tensors(buffers, perturbation, parts, uploaded)

    def base(self, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
        """name → unperturbed tensor of the compute type.

        Valid until the next call with other `parts`, which are compared by identity.
        """
        if self._based is not parts:
            self._based, self._base = parts, {}
            for (name, part), (tensor, _, stored, scales) in zip(parts.items(), self._upload(list(parts.values())), strict=True):
                self._base[name] = on_device.converted(stored, scales, tensor.width, self._compute).view(part.shape)
        return self._base

    def own_base(self, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
        """The same, valid for as long as it is held."""
        self._based = None
        return dict(self.base(parts))

    def factors(
        self, perturbations: Sequence[Perturbation], tensor: Tensor, first: int = 0, rows: int | None = None
    ) -> LowRankFactors | None:
        """The perturbations of a matrix (of rows first … first + rows - 1; default: all); None if it is not perturbed."""
        if perturbations[0].sigma_of(tensor) == 0:
            return None
        each = [perturbation.factors(tensor, first, rows, self.device) for perturbation in perturbations]
        return factors_of(each, self._compute, kernels=False)

    def block(self, perturbation: Perturbation, part: Part) -> list[torch.Tensor]:
        """For each member: the part, whole rows of a tensor, [rows, ...]."""
        if self._last is not part:
            self._last, self._uploaded = part, self._upload([part])
        tensor, start, stored, scales = self._uploaded[0]
        outs = self._reserve(perturbation.members, stored.numel())
        self._perturb(perturbation, outs, tensor, start, stored, scales)
        return [out.view(part.shape) for out in outs]

    def rows(
        self, perturbation: Perturbation, tensor: Tensor, rows: np.ndarray, weights: np.ndarray, scales: np.ndarray
    ) -> list[torch.Tensor]:
        """For each member: the rows `rows`, int64 [R], of a matrix, [R, W]. weights, scales: these rows as stored."""
        self._last = None
        width = weights.shape[1]
        few = replace(tensor, shape=weights.shape)
        ((_, _, stored, few_scales),) = self._upload([Part(few, 0, weights.reshape(-1), scales)])
        outs = self._reserve(perturbation.members, stored.numel())
        if width % 8:  # rows share counters with their neighbours
            for i, row in enumerate(rows):
                cut, own = slice(i * width, (i + 1) * width), None if few_scales is None else few_scales[i : i + 1]
                self._perturb(perturbation, [out[cut] for out in outs], tensor, int(row) * width, stored[cut], own)
        else:
            starts = torch.from_numpy(rows).to(self.device) * width
            elements = (starts[:, None] + torch.arange(width, device=self.device)).reshape(-1)
            self._perturb(perturbation, outs, tensor, elements, stored, few_scales)
        return [out.view(weights.shape) for out in outs]

    def log_sum_exp(self, targets: np.ndarray) -> "DeviceLogSumExp":
        return DeviceLogSumExp(targets, self.device)

    def greatest(self, rows: int) -> "DeviceGreatest":
        return DeviceGreatest(rows, self.device)

    def _upload(self, parts: list[Part]) -> list[tuple[Tensor, int, torch.Tensor, torch.Tensor | None]]:
        """The parts on the device: (tensor, start, stored elements, scales of their rows)."""
        arrays = [array for part in parts for array in (part.data, part.own_scales)]
        self._stagings.reverse()
        copies = iter(self._stagings[0].upload(arrays, self._stream))
        found = []
        for part in parts:
            stored, scales = next(copies), next(copies).view(torch.float32)
            stored = stored.view(torch.int8 if part.data.dtype == np.int8 else torch.bfloat16)
            found.append((part.tensor, part.start, stored, scales if scales.numel() else None))
        return found

    def _tensors(
        self,
        buffers: list[torch.Tensor],
        perturbation: Perturbation,
        parts: Mapping[str, Part],
        uploaded: list[tuple[Tensor, int, torch.Tensor, torch.Tensor | None]],
    ) -> list[dict[str, torch.Tensor]]:
        members: list[dict[str, torch.Tensor]] = [{} for _ in perturbation.signs]
        offset = 0
        for (name, part), (tensor, start, stored, scales) in zip(parts.items(), uploaded, strict=True):
            outs = [buffer[offset : offset + stored.numel()] for buffer in buffers]
            self._perturb(perturbation, outs, tensor, start, stored, scales)
            for member, out in zip(members, outs, strict=True):
                member[name] = out.view(part.shape)
            offset += stored.numel()
        return members

    def _perturb(
        self,
        perturbation: Perturbation,
        outs: list[torch.Tensor],
        tensor: Tensor,
        elements: torch.Tensor | int,
        stored: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> None:
        sigma = perturbation.sigma_of(tensor)
        if sigma == 0:
            for out in outs:
                out.copy_(on_device.as_float32(stored, scales, tensor.width))
            return
        draw, place = perturbation.noise.epsilon_on_device, perturbation.place_of(tensor)
        on_device.perturb(outs, stored, scales, tensor.shape, elements, draw, place, sigma)

    def _reserve(self, members: int, size: int) -> list[torch.Tensor]:
        for index in range(members):
            if self._buffers[index].numel() < size:
                self._buffers[index] = torch.empty(0, dtype=self._compute, device=self.device)
                self._buffers[index] = torch.empty(size, dtype=self._compute, device=self.device)
        return [buffer[:size] for buffer in self._buffers[:members]]


class DeviceLogSumExp:
    """`RunningLogSumExp` in float32 on a device."""

    def __init__(self, targets: np.ndarray, device: torch.device) -> None:
        """targets: int32 [tokens], the true next tokens."""
        self._targets = torch.from_numpy(targets.astype(np.int64)).to(device)
        self._greatest = torch.full((targets.size,), -torch.inf, device=device)
        self._total = torch.zeros(targets.size, device=device)
        self._chosen = torch.full((targets.size,), torch.nan, device=device)

    def update(self, logits: torch.Tensor, first: int, _: Threads) -> None:
        """Adds the logits of vocabulary entries first, first + 1, …: [tokens, block]."""
        values = logits.to(torch.float32)
        top = torch.maximum(self._greatest, values.amax(dim=1))
        self._total = self._total * torch.exp(self._greatest - top) + torch.exp(values - top[:, None]).sum(dim=1)
        self._greatest = top
        place = self._targets - first
        inside = (place >= 0) & (place < values.shape[1])
        here = values.gather(1, place.clamp(0, values.shape[1] - 1)[:, None])[:, 0]
        self._chosen = torch.where(inside, here, self._chosen)

    def log_probabilities(self) -> np.ndarray:
        """Log-probabilities of the targets, float64 [tokens]."""
        chosen, greatest, total = (t.to("cpu", torch.float64).numpy() for t in (self._chosen, self._greatest, self._total))
        return chosen - (greatest + np.log(total))


class DeviceGreatest:
    """`RunningGreatest` on a device."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._greatest = torch.full((rows,), -torch.inf, device=device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._broken = torch.zeros(rows, dtype=torch.bool, device=device)

    def update(self, logits: torch.Tensor, first: int, _: Threads) -> None:
        """Adds the logits of vocabulary entries first, first + 1, …: [rows, block]."""
        values, places = logits.max(dim=1)
        values = values.to(torch.float32)
        self._broken |= values.isnan()  # which the greatest is if any is
        greater = values > self._greatest
        self._greatest = torch.where(greater, values, self._greatest)
        self._tokens = torch.where(greater, places + first, self._tokens)

    def tokens(self) -> np.ndarray:
        """The token of each row, or -1 if one of its logits is not a number: int64 [rows]."""
        return torch.where(self._broken, -1, self._tokens).cpu().numpy()
