"""Which perturbed models are scored."""

from dataclasses import dataclass

import numpy as np
import torch

from es_lite.algorithm.noise.gaussian import NAME as GAUSSIAN
from es_lite.algorithm.noise.kinds import NoiseKind, kind_of
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.algorithm.noise.place import Place
from es_lite.model.layout import Tensor


@dataclass(frozen=True)
class Perturbation:
    """θ + sign·σ·ε(seed, step, pair) for each sign: both members of an antithetic pair, one member, or θ itself."""

    seed: int = 0
    step: int = 0
    pair: int = 0
    sigma: float = 0.0
    signs: tuple[int, ...] = (0,)
    """(1, -1), (1,), or (0,) for the unperturbed model."""
    kind: str = GAUSSIAN
    """The kind of noise."""
    rank: int = 0
    """Its rank, if it is "lowrank"; else 0."""

    @property
    def members(self) -> int:
        return len(self.signs)

    @property
    def factored(self) -> bool:
        """Whether linear maps are perturbed without their weights being touched: the noise is low-rank."""
        return self.rank > 0

    @property
    def noise(self) -> NoiseKind:
        return kind_of(self.kind, self.rank)

    def sigma_of(self, tensor: Tensor) -> float:
        """The factor of the tensor's noise for the first member."""
        return self.sigma * tensor.sigma_factor * self.signs[0]

    def factors(
        self, tensor: Tensor, first: int = 0, rows: int | None = None, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Of low-rank noise: A of rows first … (default: all), [rows, r], and B, [in, r], float32, and σ/√r of the matrix.

        device: draw them there, with torch operations; None: on the CPU, with the kernels.
        """
        noise, shape = self.noise, (tensor.shape[0], tensor.shape[1])
        assert isinstance(noise, LowRank)
        if device:
            left, right = noise.factors_on_device(self.place_of(tensor), shape, device, first, rows)
        else:
            left, right = map(torch.from_numpy, noise.factors(self.place_of(tensor), shape, first, rows))
        return left, right, float(np.float32(self.sigma * tensor.sigma_factor) * noise.root)

    def place_of(self, tensor: Tensor) -> Place:
        return Place(self.seed, self.step, self.pair, tensor.number)


UNPERTURBED = Perturbation()
