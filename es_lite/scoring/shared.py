"""Modules that a tile of several members shares: a product of the unperturbed weights, corrected for each member.

Linear maps are corrected by low-rank factors (`factors`). Modules that own vectors (norms) are run with each member's own; the
unperturbed model is the case of no factors.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from es_lite.algorithm.jit import Threads
from es_lite.model.layout import Tensor
from es_lite.scoring.factors import LowRankFactors, MemberRows
from es_lite.scoring.sequences import SequenceTile
from es_lite.scoring.tiles import Tile


class RowsMixed(Exception):
    """A module does not keep the rows of members apart, or reads the weights of its linear maps: members must take turns."""


@dataclass
class Operands:
    """What the shared modules of one copy compute with, set for each tile and cleared after it."""

    threads: Threads
    """For kernels; the same for all tiles."""
    rows: int = 0
    """Rows of the tile: members times samples."""
    length: int = 0
    """Tokens of a row."""
    members: MemberRows = field(default_factory=lambda: MemberRows(()))
    base: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Unperturbed matrices of the linear maps, [out, in] ([in, out] if it is a Conv1D), by parameter name."""
    factors: Mapping[str, LowRankFactors] = field(default_factory=dict)
    """Their perturbations; none of a matrix that is not perturbed."""
    made: Sequence[Mapping[str, torch.Tensor]] = ()
    """For each member of the tile: the perturbed tensors of all other parameters."""
    make: Callable[[str], torch.Tensor] | None = None
    """Makes a linear map's perturbed matrix, if the tile has one member."""

    def set(
        self,
        tile: Tile | SequenceTile,
        base: Mapping[str, torch.Tensor],
        factors: Mapping[str, LowRankFactors],
        made: Sequence[Mapping[str, torch.Tensor]],
        make: Callable[[str], torch.Tensor],
    ) -> None:
        self.rows, self.length, self.members = tile.count, tile.length, MemberRows(tile.signs, tile.counts)
        self.base, self.factors, self.made, self.make = base, factors, made, make

    def clear(self) -> None:
        """Forgets all tensors, so that a layer's do not stay in memory while others are computed."""
        self.base, self.factors, self.made, self.make = {}, {}, (), None

    def only(self) -> Mapping[str, torch.Tensor]:
        """The tensors of the tile's only member. Raises RowsMixed if there are several."""
        if len(self.made) > 1:
            raise RowsMixed
        return self.made[0]

    def split(self, value: torch.Tensor) -> Sequence[torch.Tensor]:
        """The members' parts of a tile's rows or tokens."""
        each = value.shape[0] // self.rows
        return value.split([count * each for count in self.members.counts])

    def check(self, value: torch.Tensor) -> None:
        """Raises RowsMixed if the tile has several members and these are not its rows, [rows, ... length ...], or its tokens."""
        shape = value.shape
        tokens = shape[:1] == (self.rows * self.length,)
        rows = shape[:1] == (self.rows,) and self.length in shape[1:] and self.rows != self.length
        if len(self.made) > 1 and not (tokens or rows):
            raise RowsMixed


class SharedLinear(nn.Module):
    """A linear map, nn.Linear or GPT-2's Conv1D, for all members of a tile."""

    def __init__(self, module: nn.Module, name: str, operands: Operands) -> None:
        """name: the module's within the wrapped one, with a dot at its end, or ""."""
        super().__init__()
        self._transposed = isinstance(module, Conv1D)
        self._weight, self._bias = f"{name}weight", f"{name}bias" if module.bias is not None else ""
        self._operands = operands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operands, members = self._operands, len(self._operands.made)
        operands.check(x)
        flat = x.reshape(-1, x.shape[-1])
        base, factors = operands.base[self._weight], operands.factors.get(self._weight)
        bias = operands.made[0][self._bias] if self._bias and members == 1 else None
        y = functional.linear(flat, base.T if self._transposed else base, bias)
        if factors:
            factors = factors.transposed() if self._transposed else factors
            projected = factors.project(flat, operands.members, operands.threads)
            factors.add(y, projected, operands.members, operands.threads)
        if self._bias and members > 1:
            biases = torch.stack([made[self._bias] for made in operands.made])
            if operands.members.uneven:
                y.add_(operands.members.repeated(biases, y.shape[0]))
            else:
                y.view(members, -1, y.shape[-1]).add_(biases[:, None])
        return y.view(*x.shape[:-1], -1)

    @property
    def weight(self) -> torch.Tensor:
        """The perturbed matrix, for modules that read it; made each time it is read."""
        self._operands.only()
        assert self._operands.make
        return self._operands.make(self._weight)

    @property
    def bias(self) -> torch.Tensor | None:
        return self._operands.only()[self._bias] if self._bias else None


class VectorsShared(nn.Module):
    """A module that owns vectors, run on the rows of each member with that member's tensors.

    One that uses its vectors element by element (RMSNorm) runs once, with a vector for each row; others once a member.
    """

    def __init__(self, module: nn.Module, name: str, operands: Operands) -> None:
        super().__init__()
        self._element_by_element: bool | None = None
        """Whether it was found to be so; None: it has not been tried."""
        self._module = (module,)  # not registered as a submodule: its parameters have no memory
        self._names = {own: name + own for own, _ in module.named_parameters()}
        self._operands = operands

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.__dict__["_names"]:  # another module reads the tensor
                return self._operands.only()[self._names[name]]
            return getattr(self.__dict__["_module"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self._operands.made
        values = [{own: member[name] for own, name in self._names.items()} for member in made]
        if len(made) == 1:
            return self._run(values[0], args, kwargs)
        if any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            raise RowsMixed
        for value in args:
            if isinstance(value, torch.Tensor):
                self._operands.check(value)
        if len(args) == 1 and not kwargs and self._broadcasts(args[0]):
            own = {name: self._of_each_row(torch.stack([member[name] for member in values]), args[0]) for name in values[0]}
            return self._run(own, args, {})
        parts = [self._operands.split(value) if isinstance(value, torch.Tensor) else [value] * len(made) for value in args]
        results = [
            self._run(own, tuple(part), kwargs)
            for own, count, *part in zip(values, self._operands.members.counts, *parts, strict=True)
            if count
        ]
        if not all(isinstance(result, torch.Tensor) for result in results):
            raise RowsMixed
        return torch.cat(results)

    def _run(self, vectors: Mapping[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's output with these tensors, by its own names; `functional_call` takes longer than a norm of one token."""
        module = self._module[0]
        own = module._parameters
        module._parameters = {**own, **vectors}  # type: ignore[dict-item]
        try:
            return module(*args, **kwargs)
        finally:
            module._parameters = own

    def _of_each_row(self, vectors: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A vector for each row of x, [rows, 1, …, width]; vectors: [members, width]."""
        repeated = self._operands.members.repeated(vectors, x.shape[0])
        return repeated.view(x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])

    def _broadcasts(self, x: torch.Tensor) -> bool:
        """Whether the module can be run on the rows of all members at once, with the same bits; tried once."""
        own = self._module[0]._parameters
        if x.dim() < 2 or any(p is not None and p.shape != x.shape[-1:] for p in own.values()):
            return False
        if self._element_by_element is None:
            generator = torch.Generator(x.device).manual_seed(0)
            width = x.shape[-1]
            states = torch.randn(2, 3, width, generator=generator, device=x.device).to(x.dtype)
            vectors = {name: torch.randn(2, 1, width, generator=generator, device=x.device).to(x.dtype) for name in self._names}
            try:
                together = self._run(vectors, (states,), {})
                apart = [
                    self._run({name: each[i, 0] for name, each in vectors.items()}, (states[i : i + 1],), {}) for i in range(2)
                ]
                self._element_by_element = torch.equal(together, torch.cat(apart))
            except (RuntimeError, TypeError):  # it checks the vectors' shapes, as nn.LayerNorm does
                self._element_by_element = False
        return self._element_by_element


class Shared:
    """A copy of a module in which linear maps are `SharedLinear`, and owners of vectors `VectorsShared`."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor], threads: Threads) -> None:
        """tensors: of the module's parameters, by name; threads: for kernels."""
        self.operands = Operands(threads)
        self.linear: list[str] = []
        """Matrices of linear maps, by parameter name."""
        self.others: list[str] = []
        """Parameters of modules that are neither linear maps nor owners of vectors only."""
        holder = nn.ModuleList([copy.deepcopy(module)])  # so that the module itself can be replaced
        for name, owner in list(holder.named_modules()):
            own = dict(owner.named_parameters(recurse=False))
            if not own:
                continue
            name, path = name.partition(".")[2], name
            name += "." if name else ""
            replacement: nn.Module
            if type(owner) in (nn.Linear, Conv1D):
                self.linear.append(name + "weight")
                replacement = SharedLinear(owner, name, self.operands)
            elif not list(owner.children()) and all(len(tensors[name + key].shape) < 2 for key in own):
                replacement = VectorsShared(owner, name, self.operands)
            else:
                self.others += [name + key for key in own]
                continue
            parent, _, attribute = path.rpartition(".")
            setattr(holder.get_submodule(parent), attribute, replacement)
        self.module = holder[0]
        lists = any(isinstance(part, nn.ModuleList) for part in self.module.modules())
        self.mixes = bool(self.others) or lists
        """Members take turns: it owns more than vectors and linear maps, or it may send rows to modules of a list (experts)."""

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs the module on a tile's rows with the operands."""
        if not self.others:
            return self.module(*args, **kwargs)
        others = {name: self.operands.made[0][name] for name in self.others}
        return functional_call(self.module, others, args, kwargs)
