"""Proxies, which replace a model's modules that own parameters and run them on perturbed tensors.

A proxy makes its layer's perturbed tensors once per perturbation, runs its module on them micro-batch by micro-batch, and frees
them. The members of all perturbations are folded into the batch dimension: row `member * samples + sample`.

Shapes: G members of all perturbations, B samples, T the longest sample.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from es_lite.model.layout import Layer, Tensor
from es_lite.scoring.device import DeviceScratch
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.scratch import Scratch
from es_lite.scoring.weights import Weights


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one member, cut to its longest sample."""

    rows: slice
    """Which of the G·B rows."""
    samples: slice
    """Which of the B samples."""
    length: int
    """Tokens."""
    total: int
    """G·B."""

    def cut(self, value: Any) -> Any:
        """The part of a module's argument that belongs to these rows.

        Tensors are [G·B or 1, T, ...] states or positions, or [G·B or 1, heads or 1, T, T] masks; others stay as they are.
        """
        if isinstance(value, torch.Tensor):
            if value.dim() and value.shape[0] == self.total:
                value = value[self.rows]
            if value.dim() == 4:
                return value[..., : self.length, : self.length]
            return value[:, : self.length] if value.dim() > 1 else value
        if isinstance(value, tuple):
            return tuple(map(self.cut, value))
        if isinstance(value, dict):
            return {name: self.cut(item) for name, item in value.items()}
        return value


@dataclass
class ScoringState:
    """What the proxies share: where weights come from, and during a pass, the perturbations and the shape of the batch."""

    weights: Weights
    scratch: Scratch | DeviceScratch
    lanes: Lanes
    micro_batch: int
    perturbations: Sequence[Perturbation] = ()
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Lengths of the samples, int32 [B], longest first."""
    progress: Callable[[float], None] = lambda share: None
    """Called with the share of the work that is done."""
    work: float = 1.0
    """Parameters that pass in a call, summed over perturbations and passes; `done` likewise."""
    done: float = 0.0

    def passed(self, parameters: int) -> None:
        """Adds `parameters`, used for one perturbation, to the work that is done."""
        self.done += parameters
        self.progress(self.done / self.work)

    @property
    def samples(self) -> int:
        return self.lengths.size

    @property
    def members(self) -> int:
        return sum(perturbation.members for perturbation in self.perturbations)

    def folded(self) -> Iterator[tuple[int, Perturbation]]:
        """(first, perturbation): its members have numbers first, first + 1, … among the G."""
        first = 0
        for perturbation in self.perturbations:
            yield first, perturbation
            first += perturbation.members

    def micro_batches(self, member: int) -> Iterator[MicroBatch]:
        """The member's micro-batches."""
        first, total = member * self.samples, self.members * self.samples
        for low in range(0, self.samples, self.micro_batch):
            high = min(low + self.micro_batch, self.samples)
            yield MicroBatch(slice(first + low, first + high), slice(low, high), int(self.lengths[low]), total)


@dataclass(frozen=True)
class Wrapped:
    """The module that a proxy replaces."""

    modules: Sequence[nn.Module]
    """A copy per lane: functional_call changes a module while it runs."""
    layer: Layer
    tensors: dict[str, Tensor]
    """By the parameter's name in the module."""
    state: ScoringState


class Output:
    """The output of a module for all rows, put together from its micro-batches."""

    def __init__(self, rows: int, length: int) -> None:
        self._shape = rows, length
        self._making = threading.Lock()
        self._states: torch.Tensor | None = None
        self._tuple = False

    def put(self, rows: MicroBatch, result: Any) -> None:
        """result: the module's states, [rows, length, ...], or a tuple that begins with them."""
        if isinstance(result, tuple):
            self._tuple, result = True, result[0]
        with self._making:
            if self._states is None:
                self._states = result.new_zeros(*self._shape, *result.shape[2:])
        self._states[rows.rows, : rows.length] = result

    def result(self) -> Any:
        return (self._states,) if self._tuple else self._states


class Proxy(nn.Module):
    """Replaces a module and runs it on perturbed tensors; other attributes are the module's."""

    def __init__(self, module: nn.Module, layer: Layer, tensors: dict[str, Tensor], state: ScoringState) -> None:
        super().__init__()
        modules = [module, *(copy.deepcopy(module) for _ in range(1, state.lanes.count))]
        # Not registered as a submodule: the model must not list these parameters as its own.
        self.__dict__["wrapped"] = Wrapped(modules, layer, tensors, state)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["wrapped"].modules[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.wrapped.state
        rows = state.members * state.samples
        if any(isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) for value in args):
            return self._each_row(rows, args, kwargs)
        return self._each_member(args, kwargs)

    def _each_row(self, rows: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's output for every row."""
        state = self.wrapped.state
        output = Output(rows, int(state.lengths[0]))

        def micro_batch(lane: int, rows: MicroBatch, values: dict[str, torch.Tensor]) -> None:
            output.put(rows, functional_call(self.wrapped.modules[lane], values, rows.cut(args), rows.cut(kwargs)))

        for members in self._perturbed():
            work = [
                partial(micro_batch, rows=rows, values=values)
                for member, values in members
                for rows in state.micro_batches(member)
            ]
            state.lanes.run(work)
        return output.result()

    def _each_member(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The output of a module whose input is the same for all samples, such as learned positions, repeated for each."""
        module, samples = self.wrapped.modules[0], self.wrapped.state.samples
        return torch.cat(
            [
                functional_call(module, values, args, kwargs).expand(samples, -1, -1)
                for members in self._perturbed()
                for _, values in members
            ]
        )

    def _perturbed(self) -> Iterator[list[tuple[int, dict[str, torch.Tensor]]]]:
        """For each perturbation, its members with their perturbed tensors, which are valid until the next."""
        state = self.wrapped.state
        with state.weights.opened(self.wrapped.layer):
            parts = {name: state.weights.part(tensor) for name, tensor in self.wrapped.tensors.items()}
            for first, perturbation in state.folded():
                yield list(enumerate(state.scratch.tensors(perturbation, parts), start=first))
                state.passed(sum(part.data.size for part in parts.values()))


class EmbeddingProxy(Proxy):
    """The token embedding: only the rows that the batch uses are perturbed."""

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        state, tensor = self.wrapped.state, self.wrapped.tensors["weight"]
        used, positions = torch.unique(ids[: state.samples], return_inverse=True)
        rows = used.cpu().numpy()
        weights, scales = state.weights.rows(tensor, rows)
        return torch.cat(
            [
                functional_call(self.wrapped.modules[0], {"weight": values}, (positions,))
                for _, perturbation in state.folded()
                for values in state.scratch.rows(perturbation, tensor, rows, weights, scales)
            ]
        )
