"""Which perturbed models are scored."""

from dataclasses import dataclass

from es_lite.algorithm.noise.gaussian import NAME as GAUSSIAN
from es_lite.algorithm.noise.kinds import NoiseKind, kind_of
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

    @property
    def members(self) -> int:
        return len(self.signs)

    @property
    def noise(self) -> NoiseKind:
        return kind_of(self.kind)

    def sigma_of(self, tensor: Tensor) -> float:
        """The factor of the tensor's noise for the first member."""
        return self.sigma * tensor.sigma_factor * self.signs[0]

    def place_of(self, tensor: Tensor) -> Place:
        return Place(self.seed, self.step, self.pair, tensor.number)


UNPERTURBED = Perturbation()
