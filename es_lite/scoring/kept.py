"""Scratch for a generation, which uses a layer once a token: what is small, or what the plan has room for, is made only once."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from es_lite.model.layout import Tensor
from es_lite.scoring.device import DeviceGreatest, DeviceLogSumExp, DeviceScratch
from es_lite.scoring.factors import LowRankFactors
from es_lite.scoring.greatest import RunningGreatest
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.scratch import Scratch
from es_lite.weights.parts import Part

T = TypeVar("T")


class KeptScratch:
    """`Scratch` or `DeviceScratch` for one generation; see there. What it keeps is freed with it.

    Low-rank factors and perturbed vectors are always kept. Whole perturbed layers, and layers converted to the compute type, are
    kept if `whole`; else they are made at each token.
    """

    def __init__(self, scratch: Scratch | DeviceScratch, whole: bool) -> None:
        self.device = scratch.device
        self._scratch = scratch
        self._whole = whole
        self._made: dict[object, object] = {}

    def tensors(self, perturbation: Perturbation, parts: Mapping[str, Part]) -> list[dict[str, torch.Tensor]]:
        if not self._whole:
            return self._scratch.tensors(perturbation, parts)
        return self._once(("tensors", perturbation, _places(parts)), lambda: self._scratch.kept(perturbation, parts))

    def kept(self, perturbation: Perturbation, parts: Mapping[str, Part]) -> list[dict[str, torch.Tensor]]:
        if not self._whole and any(len(part.tensor.shape) > 1 for part in parts.values()):
            return self._scratch.kept(perturbation, parts)
        return self._once(("kept", perturbation, _places(parts)), lambda: self._scratch.kept(perturbation, parts))

    def base(self, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
        if not self._whole:
            return self._scratch.base(parts)
        return self._once(("base", _places(parts)), lambda: self._scratch.own_base(parts))

    def factors(
        self, perturbations: Sequence[Perturbation], tensor: Tensor, first: int = 0, rows: int | None = None
    ) -> LowRankFactors | None:
        key = "factors", tuple(perturbations), tensor.name, first, rows
        return self._once(key, lambda: self._scratch.factors(perturbations, tensor, first, rows))

    def block(self, perturbation: Perturbation, part: Part) -> list[torch.Tensor]:
        if not self._whole:
            return self._scratch.block(perturbation, part)
        return [own[""] for own in self.tensors(perturbation, {"": part})]

    def rows(
        self, perturbation: Perturbation, tensor: Tensor, rows: np.ndarray, weights: np.ndarray, scales: np.ndarray
    ) -> list[torch.Tensor]:
        return self._scratch.rows(perturbation, tensor, rows, weights, scales)

    def log_sum_exp(self, targets: np.ndarray) -> RunningLogSumExp | DeviceLogSumExp:
        return self._scratch.log_sum_exp(targets)

    def greatest(self, rows: int) -> RunningGreatest | DeviceGreatest:
        return self._scratch.greatest(rows)

    def _once(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]


def _places(parts: Mapping[str, Part]) -> tuple[tuple[str, int, int], ...]:
    return tuple((part.tensor.name, part.start, part.data.size) for part in parts.values())
