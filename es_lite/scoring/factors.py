"""Low-rank perturbations in factors, and what they add to a product of the unperturbed weights for the rows of several members.

A linear map under a perturbation of low rank is x Wᵀ ± (σ/√r)(x B)Aᵀ (EGGROLL, arXiv 2511.16652): x Wᵀ is one product for the
rows of all members, and W is never changed.

Shapes: P perturbations of the tile, S members of each, R rows of each member (samples times tokens, in the order of the members).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from es_lite.algorithm.jit import Threads
from es_lite.scoring import corrections
from es_lite.scoring.arrays import as_array


@dataclass(frozen=True)
class MemberRows:
    """How rows, [rows, ...], belong to members, which come one after the other."""

    signs: Sequence[int]
    """Of each perturbation's members."""
    counts: Sequence[int] = ()
    """Rows of each member; none: all have the same number."""
    _ends: dict[int, np.ndarray] = field(default_factory=dict, compare=False)
    """What `ends` has found: every linear map asks."""

    @property
    def uneven(self) -> bool:
        return len(set(self.counts)) > 1

    @cached_property
    def sign_array(self) -> np.ndarray:
        """The signs, float32."""
        return np.array(self.signs, np.float32)

    def ends(self, rows: int, members: int) -> np.ndarray:
        """Where each member's rows end, int64 [members]; rows: of all members."""
        if rows not in self._ends:
            counts = np.array(self.counts or (1,) * members)
            self._ends[rows] = counts.cumsum() * (rows // counts.sum())
        return self._ends[rows]

    def places(self, rows: int, device: torch.device) -> tuple[torch.Tensor, int]:
        """Where rows are if each member is given as many as the one that has most, int64 [rows]; and how many there are then.

        rows: of all members, a multiple of the sum of counts.
        """
        each, most = rows // sum(self.counts), max(self.counts)
        found = [torch.arange(count * each) + member * most * each for member, count in enumerate(self.counts)]
        return torch.cat(found).to(device), len(self.counts) * most * each

    def repeated(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """A member's value for each of its rows, [rows, ...]; values: [members, ...]."""
        if not self.uneven:
            return values.repeat_interleave(rows // values.shape[0], dim=0)
        counts = torch.tensor(self.counts, device=values.device) * (rows // sum(self.counts))
        return values.repeat_interleave(counts, dim=0)


@dataclass(frozen=True)
class LowRankFactors:
    """A matrix's perturbations in factors."""

    right: torch.Tensor
    """B, [P, in, r]."""
    left: torch.Tensor
    """(σ/√r)·Aᵀ, [P, r, out]."""
    kernels: bool = True
    """Compute with the kernels of `corrections`; else with torch operations, on any device."""

    def __getitem__(self, which: slice) -> "LowRankFactors":
        """Those of some perturbations."""
        if (which.start, which.stop) == (0, self.right.shape[0]):
            return self
        return LowRankFactors(self.right[which], self.left[which], self.kernels)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """B, [P, r, in], and (σ/√r)·Aᵀ, as the kernels take them."""
        return as_array(self.right.transpose(1, 2).contiguous()), as_array(self.left.contiguous())

    def transposed(self) -> "LowRankFactors":
        """Of the transposed matrix."""
        return LowRankFactors(self.left.transpose(1, 2), self.right.transpose(1, 2), self.kernels)

    def project(self, x: torch.Tensor, rows: MemberRows, threads: Threads) -> torch.Tensor:
        """±x B of each row, for `add`; x: [P·S·R, in], or fewer rows if they are uneven.

        The result is float32 [rows, r]; without kernels, [P, S·R, r] in x's type, where R is the most that a member has.
        """
        if self.kernels:
            right = self._arrays[0]
            ends = rows.ends(x.shape[0], right.shape[0] * len(rows.signs))
            return torch.from_numpy(corrections.project(as_array(x.contiguous()), right, ends, rows.sign_array, threads))
        if rows.uneven:
            places, size = rows.places(x.shape[0], x.device)
            x = x.new_zeros(size, x.shape[-1]).index_copy_(0, places, x)
        projected = torch.bmm(x.view(self.right.shape[0], -1, x.shape[-1]), self.right)
        for part, sign in zip(projected.chunk(len(rows.signs), dim=1), rows.signs, strict=True):
            if sign < 0:
                part.neg_()
        return projected

    def add(self, y: torch.Tensor, projected: torch.Tensor, rows: MemberRows, threads: Threads) -> None:
        """y += (σ/√r)(±x B)Aᵀ, in place; y: [P·S·R, out], contiguous, or fewer rows if they are uneven."""
        if self.kernels:
            left = self._arrays[1]
            ends = rows.ends(y.shape[0], left.shape[0] * len(rows.signs))
            corrections.add(as_array(y), projected.numpy(), left, ends, len(rows.signs), threads)
            return
        if rows.uneven:
            places, _ = rows.places(y.shape[0], y.device)
            y.add_(torch.bmm(projected, self.left).flatten(0, 1)[places])
            return
        y.view(projected.shape[0], -1, y.shape[-1]).baddbmm_(projected, self.left)


def factors_of(
    each: Sequence[tuple[torch.Tensor, torch.Tensor, float]], compute: torch.dtype, kernels: bool = True
) -> LowRankFactors:
    """The factors in the compute type; each: A [out, r], B [in, r] and σ/√r of a perturbation, float32."""
    right = torch.stack([right.T for _, right, _ in each]).to(compute).transpose(1, 2)
    left = torch.stack([left.T * scale for left, _, scale in each]).to(compute)
    return LowRankFactors(right, left, kernels)
