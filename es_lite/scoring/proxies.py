"""Proxies, which replace a model's modules that own parameters and run them on perturbed tensors, tile by tile.

Under noise that is drawn in full, a proxy makes its layer's perturbed tensors once per perturbation, runs its module on them,
and the next perturbation overwrites them. Under low-rank noise, it runs the module on the unperturbed matrices, with corrections
(`shared`). The members of all perturbations are folded into the batch dimension: row `member * samples + sample`.

Shapes: G members of all perturbations, B samples, T the longest sample.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from es_lite.model.layout import Layer, Tensor
from es_lite.scoring.arguments import Arguments
from es_lite.scoring.device import DeviceScratch
from es_lite.scoring.kept import KeptScratch
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.scratch import Scratch
from es_lite.scoring.sequences import SequenceRows, SequenceTile
from es_lite.scoring.shared import RowsMixed, Shared
from es_lite.scoring.tiles import Output, PerturbationGroup, SampleRows, Tile
from es_lite.scoring.weights import Weights
from es_lite.weights.parts import Part


@dataclass
class ScoringState:
    """What the proxies share: where weights come from, and during a pass, the perturbations and the shape of the batch."""

    weights: Weights
    scratch: Scratch | DeviceScratch | KeptScratch
    lanes: Lanes
    micro_batch: int
    tile_members: int
    """Members that share a tile, if their perturbations are factored: 1, or those of one or more perturbations."""
    perturbations: Sequence[Perturbation] = ()
    rows: SampleRows | SequenceRows = field(default_factory=lambda: SequenceRows(()))
    """The rows of the forward under way."""
    progress: Callable[[float], None] = lambda share: None
    """Called with the share of the work that is done."""
    work: float = 1.0
    """Parameters that pass in a call, summed over perturbations and passes; `done` likewise."""
    done: float = 0.0
    compute: torch.dtype = torch.float32
    """The type that is computed in."""

    def passed(self, parameters: int) -> None:
        """Adds `parameters`, used for one perturbation, to the work that is done."""
        self.done += parameters
        self.progress(self.done / self.work)

    @property
    def members(self) -> int:
        return sum(perturbation.members for perturbation in self.perturbations)

    def groups(self) -> Iterator[PerturbationGroup]:
        """The perturbations in order, in groups: factored ones of the same signs and rank, which share tiles; others alone."""
        first, low = 0, 0
        while low < len(self.perturbations):
            head, high = self.perturbations[low], low + 1
            if head.factored and head.sigma:
                most = max(1, self.tile_members // head.members)
                while high < min(low + most, len(self.perturbations)) and _alike(head, self.perturbations[high]):
                    high += 1
            group = PerturbationGroup(first, self.perturbations[low:high])
            yield group
            first, low = first + group.members, high


def _alike(one: Perturbation, other: Perturbation) -> bool:
    """Whether the members of both can share a tile."""
    return (one.signs, one.rank) == (other.signs, other.rank)


@dataclass(frozen=True)
class Wrapped:
    """The module that a proxy replaces."""

    modules: Sequence[nn.Module]
    """A copy per lane: functional_call changes a module while it runs."""
    shared: Sequence[Shared]
    """Likewise."""
    layer: Layer
    tensors: dict[str, Tensor]
    """By the parameter's name in the module."""
    state: ScoringState
    copies: int
    """States of each token that the module is given and returns."""


class Proxy(nn.Module):
    """Replaces a module and runs it on perturbed tensors; other attributes are the module's."""

    def __init__(self, module: nn.Module, layer: Layer, tensors: dict[str, Tensor], state: ScoringState, copies: int = 1) -> None:
        super().__init__()
        lanes = range(state.lanes.count)
        modules = [module, *(copy.deepcopy(module) for _ in lanes[1:])]
        shared = [Shared(module, tensors, state.lanes.threads) for _ in lanes]
        # Not registered as a submodule: the model must not list these parameters as its own.
        self.__dict__["wrapped"] = Wrapped(modules, shared, layer, tensors, state, copies)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["wrapped"].modules[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.wrapped.state
        arguments = Arguments.of(args, kwargs, state.rows.count, self.wrapped.copies)
        return self._each_row(arguments) if arguments.of_each_row(state.rows.count) else self._each_member(args, kwargs)

    def _each_row(self, arguments: Arguments) -> Any:
        """The module's output for every row."""
        state = self.wrapped.state
        output = state.rows.output()
        with state.weights.opened(self.wrapped.layer):
            parts = self._parts()
            linear = {name: parts[name] for name in self.wrapped.shared[0].linear}
            for group in state.groups():
                if not group.perturbations[0].factored:
                    self._full(group, parts, output, arguments)
                elif self.wrapped.shared[0].mixes:
                    self._one_by_one(group, parts, linear, output, arguments)
                else:
                    self._together(group, parts, linear, output, arguments)
                state.passed(len(group.perturbations) * sum(part.data.size for part in parts.values()))
        return arguments.result(output)

    def _full(
        self,
        group: PerturbationGroup,
        parts: Mapping[str, Part],
        output: Output,
        arguments: Arguments,
    ) -> None:
        """Runs the module on perturbed tensors of the group's only perturbation."""
        state, (perturbation,) = self.wrapped.state, group.perturbations
        members = state.scratch.tensors(perturbation, parts)

        def run(lane: int, tile: Tile | SequenceTile) -> None:
            values = members[tile.members.start]
            arguments.put(output, tile, functional_call(self.wrapped.modules[lane], values, *arguments.of_tile(tile)))

        state.lanes.run([partial(run, tile=tile) for tile in state.rows.tiles(group, apart=True)])

    def _together(
        self,
        group: PerturbationGroup,
        parts: Mapping[str, Part],
        linear: Mapping[str, Part],
        output: Output,
        arguments: Arguments,
    ) -> None:
        """Runs the module on the unperturbed matrices; a tile may have several members."""
        scratch = self.wrapped.state.scratch
        vectors = {name: part for name, part in parts.items() if name not in linear}
        made = [member for perturbation in group.perturbations for member in scratch.kept(perturbation, vectors)]
        self._shared(group, linear, made, output, arguments, apart=False)

    def _one_by_one(
        self,
        group: PerturbationGroup,
        parts: Mapping[str, Part],
        linear: Mapping[str, Part],
        output: Output,
        arguments: Arguments,
    ) -> None:
        """The same for a module that owns other tensors, which are perturbed in scratch: a tile has one member."""
        scratch = self.wrapped.state.scratch
        others = {name: part for name, part in parts.items() if name not in linear}
        first = group.first
        for perturbation in group.perturbations:
            alone = PerturbationGroup(first, [perturbation])
            self._shared(alone, linear, scratch.tensors(perturbation, others), output, arguments, apart=True)
            first += perturbation.members

    def _shared(
        self,
        group: PerturbationGroup,
        linear: Mapping[str, Part],
        made: Sequence[Mapping[str, torch.Tensor]],
        output: Output,
        arguments: Arguments,
        apart: bool,
    ) -> None:
        """Runs the group's tiles, and the members of a tile in turn if the module mixes its rows.

        made: for each of the group's members, the perturbed tensors of all but the linear maps' matrices.
        """
        state = self.wrapped.state
        base = state.scratch.base(linear)
        factors = {}
        for name, part in linear.items():
            if found := state.scratch.factors(group.perturbations, part.tensor):
                factors[name] = found

        def run_tile(shared: Shared, tile: Tile | SequenceTile) -> None:
            members = tile.members

            def make(name: str) -> torch.Tensor:
                perturbation = group.perturbations[tile.perturbations.start]
                return state.scratch.kept(perturbation, {name: linear[name]})[members.start % perturbation.members][name]

            own = {name: each[tile.perturbations] for name, each in factors.items()}
            shared.operands.set(tile, base, own, made[members.start : members.stop], make)
            arguments.put(output, tile, shared(*arguments.of_tile(tile)))

        def run(lane: int, tile: Tile | SequenceTile) -> None:
            shared = self.wrapped.shared[lane]
            try:
                run_tile(shared, tile)
            except RowsMixed:
                for alone in tile.apart():
                    run_tile(shared, alone)
            finally:
                shared.operands.clear()

        state.lanes.run([partial(run, tile=tile) for tile in state.rows.tiles(group, apart)])

    def _each_member(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The output of a module whose input is the same for all samples, such as learned positions, repeated for each."""
        state, found = self.wrapped.state, []
        assert isinstance(state.rows, SampleRows), "generation gives every row its positions"
        samples = state.rows.samples
        with state.weights.opened(self.wrapped.layer):
            parts = self._parts()
            for perturbation in state.perturbations:
                for values in state.scratch.tensors(perturbation, parts):
                    result = functional_call(self.wrapped.modules[0], values, args, kwargs)
                    found.append(result.expand(samples, -1, -1))
                state.passed(sum(part.data.size for part in parts.values()))
        return torch.cat(found)

    def _parts(self) -> dict[str, Part]:
        return {name: self.wrapped.state.weights.part(tensor) for name, tensor in self.wrapped.tensors.items()}
