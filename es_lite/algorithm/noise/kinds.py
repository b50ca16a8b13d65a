"""The kinds of noise by name. A kind is a module with the functions of `NoiseKind`, such as `gaussian`."""

from typing import Protocol

import numpy as np
import torch

from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.place import Place


class NoiseKind(Protocol):
    """What scoring and the update need of a kind of noise; shapes and types are those of `gaussian`'s functions."""

    NAME: str

    def perturb(
        self,
        plus: np.ndarray,
        minus: np.ndarray | None,
        weights: np.ndarray,
        place: Place,
        sigma: float,
        *,
        start: int,
        scales: np.ndarray,
        width: int,
    ) -> None:
        """plus = round(weights + σε), minus = round(weights - σε), for a slice of a tensor."""
        ...

    def perturb_rows(
        self,
        plus: np.ndarray,
        minus: np.ndarray | None,
        weights: np.ndarray,
        rows: np.ndarray,
        place: Place,
        sigma: float,
        *,
        scales: np.ndarray,
    ) -> None:
        """The same for some rows of a matrix."""
        ...

    def weighted_sum(self, out: np.ndarray, place: Place, pairs: np.ndarray, coefficients: np.ndarray, *, start: int) -> None:
        """out = Σ_p c_p ε_p, for a slice of a tensor."""
        ...

    def epsilon_on_device(self, elements: torch.Tensor, place: Place) -> torch.Tensor:
        """ε of elements of a tensor, with torch operations on their device."""
        ...


KNOWN: dict[str, NoiseKind] = {gaussian.NAME: gaussian}


def kind_of(name: str) -> NoiseKind:
    """The kind of this name. Raises ValueError if this version does not know it."""
    if name not in KNOWN:
        raise ValueError(f"noise of the kind {name!r}, which this version of es_lite does not know (it knows {', '.join(KNOWN)})")
    return KNOWN[name]
