"""The kinds of noise by name. A kind is a module such as `gaussian` or, if it has parameters, a class such as `LowRank`."""

from typing import Protocol

import numpy as np
import torch

from es_lite.algorithm.noise import gaussian, rademacher
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.algorithm.noise.place import Place


class NoiseKind(Protocol):
    """What scoring and the update need of a kind of noise; arguments and results are those of `gaussian`'s functions.

    Every function takes the tensor's shape, on which ε may depend.
    """

    @property
    def NAME(self) -> str: ...

    @property
    def RANK(self) -> int:
        """The rank of "lowrank"; 0 for the other kinds."""
        ...

    def epsilon(self, place: Place, shape: tuple[int, ...], start: int, count: int) -> np.ndarray:
        """The definition of ε, in numpy."""
        ...

    def epsilon_on_device(self, elements: torch.Tensor, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
        """ε of elements of a tensor, with torch operations on their device."""
        ...

    def perturb(
        self,
        plus: np.ndarray,
        minus: np.ndarray | None,
        weights: np.ndarray,
        place: Place,
        sigma: float,
        shape: tuple[int, ...],
        *,
        start: int = ...,
        scales: np.ndarray = ...,
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
        shape: tuple[int, ...],
        *,
        scales: np.ndarray = ...,
    ) -> None:
        """The same for some rows of a matrix."""
        ...

    def block(self, shape: tuple[int, ...]) -> int:
        """Elements that `weighted_sum` is best asked for at a time."""
        ...

    def weighted_sum(
        self,
        out: np.ndarray,
        place: Place,
        pairs: np.ndarray,
        coefficients: np.ndarray,
        shape: tuple[int, ...],
        *,
        start: int = ...,
    ) -> None:
        """out = Σ_p c_p ε_p, for a slice of a tensor."""
        ...

    def drawn(self, shape: tuple[int, ...], *, update: bool = ...) -> int:
        """Elements of noise that are drawn for a tensor and a pair, to perturb it or to update it."""
        ...


FULL: dict[str, NoiseKind] = {gaussian.NAME: gaussian, rademacher.NAME: rademacher}
"""Kinds that draw every element of ε."""


def kind_of(name: str, rank: int = 0) -> NoiseKind:
    """The kind of this name; rank: at least 1 if it is "lowrank", else 0. Raises ValueError if there is none.

    rank may come from a journal, and so be anything that JSON has.
    """
    whole = type(rank) is int  # which True is not
    if name == LowRank.NAME and whole and rank >= 1:
        return LowRank(rank)
    if name in FULL and whole and rank == 0:
        return FULL[name]
    known = (*FULL, LowRank.NAME)
    if name in known:
        raise ValueError(
            f"noise of the kind {name!r} with rank {rank!r}: only {LowRank.NAME!r} has a rank, a whole number of at least 1"
        )
    raise ValueError(f"noise of the kind {name!r}, which this version of es_lite does not know (it knows {', '.join(known)})")
