"""Doors: proxies that stand in a model for the modules that own parameters, and run them on perturbed tensors.

A door makes its layer's perturbed tensors once a perturbation, runs its module on them micro-batch by micro-batch, and lets
them go. The head's door keeps only the log-probabilities of the true next tokens (EA4LLM, section 3).

Shapes: G members of all perturbations, B samples, T the longest sample, H hidden size.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from es_lite.scoring.device import DeviceLogSumExp, DeviceScratch
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.perturb import Perturbation, Scratch, Weights
from es_lite.weights.layout import Layer, Tensor
from es_lite.weights.stored import Part

VOCABULARY_BLOCK = 2048
"""Rows of the head that are perturbed and multiplied at a time; sections of a stream are multiples of it."""


Tile = tuple[torch.Tensor, RunningLogSumExp | DeviceLogSumExp]
"""A micro-batch of a member at the head: its hidden states that have a next token, [n, H], and their log-sum-exp."""


class Doorway:
    """What the doors share in one pass: the weights, the perturbations, and the shape of the batch."""

    def __init__(self, weights: Weights, scratch: Scratch | DeviceScratch, lanes: Lanes, micro_batch: int) -> None:
        self.weights = weights
        self.scratch = scratch
        self.lanes = lanes
        self.micro_batch = micro_batch
        self.perturbations: Sequence[Perturbation] = ()
        self.lengths = np.zeros(0, np.int32)
        """Lengths of the samples, int32 [B], longest first."""
        self.targets = np.zeros((0, 0), np.int32)
        """Tokens of the samples, int32 [B, T]."""
        self.log_probabilities = np.zeros((0, 0))
        """What the head's door leaves: mean log-probability of each member's samples, float64 [G, B]."""

    @property
    def samples(self) -> int:
        return self.lengths.size

    @property
    def members(self) -> int:
        return sum(perturbation.members for perturbation in self.perturbations)

    def folded(self) -> Iterator[tuple[int, Perturbation]]:
        """(first, perturbation): its members are first, first + 1, … of the G."""
        first = 0
        for perturbation in self.perturbations:
            yield first, perturbation
            first += perturbation.members

    def micro_batches(self) -> Iterator[tuple[int, int, int]]:
        """(low, high, length): samples low … high - 1, padded to a common length."""
        for low in range(0, self.samples, self.micro_batch):
            yield low, min(low + self.micro_batch, self.samples), int(self.lengths[low])


class Door(nn.Module):
    """Stands for a module that is run on perturbed tensors; any attribute else is the module's own."""

    def __init__(self, module: nn.Module, layer: Layer, tensors: dict[str, Tensor], way: Doorway) -> None:
        super().__init__()
        # Not registered: the model must not list them as its own. A copy a lane: functional_call changes a module as it runs.
        modules = [module, *(copy.deepcopy(module) for _ in range(1, way.lanes.count))]
        self.__dict__["_inside"] = (modules, layer, tensors, way)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_inside"][0][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        modules, layer, tensors, way = self._inside
        rows = way.members * way.samples
        found: dict[int, torch.Tensor] = {}  # -1: the output; else what a member gives to all its samples
        making = threading.Lock()
        wrap = False

        def shared(base: int, values: dict[str, torch.Tensor]) -> None:
            found[base] = functional_call(modules[0], values, args, kwargs).expand(way.samples, -1, -1)

        def some(lane: int, part: slice, length: int, values: dict[str, torch.Tensor]) -> None:
            nonlocal wrap
            cut_args, cut_kwargs = _cut(args, rows, part, length), _cut(kwargs, rows, part, length)
            result = functional_call(modules[lane], values, cut_args, cut_kwargs)
            if isinstance(result, tuple):
                wrap, result = True, result[0]
            out = found.get(-1)
            if out is None:
                with making:
                    out = found.setdefault(-1, result.new_zeros(rows, int(way.lengths[0]), *result.shape[2:]))
            out[part, :length] = result

        with way.weights.opened(layer):
            parts = {name: way.weights.part(tensor) for name, tensor in tensors.items()}
            for first, perturbation in way.folded():
                work = []
                for member, values in enumerate(way.scratch.tensors(perturbation, parts), start=first):
                    base = member * way.samples
                    if not _has_rows(args, rows):  # the same for all samples, such as learned positions
                        shared(base, values)
                        continue
                    for low, high, length in way.micro_batches():
                        work.append(partial(some, part=slice(base + low, base + high), length=length, values=values))
                way.lanes.run(work)
        if -1 not in found:
            return torch.cat([found[base] for base in sorted(found)])
        return (found[-1],) if wrap else found[-1]


class EmbeddingDoor(Door):
    """The embedding: only the rows that the batch uses are perturbed."""

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        modules, _, tensors, way = self._inside
        tensor = tensors["weight"]
        used, places = torch.unique(ids[: way.samples], return_inverse=True)
        rows = used.cpu().numpy()
        weights, scales = way.weights.rows(tensor, rows)
        return torch.cat(
            [
                functional_call(modules[0], {"weight": values}, (places,))
                for _, perturbation in way.folded()
                for values in way.scratch.rows(perturbation, tensor, rows, weights, scales)
            ]
        )


class HeadDoor(Door):
    """The head: blocks of the vocabulary, a running log-sum-exp, only at the positions that have a next token."""

    PROBE = torch.tensor([[[-30.0, -1.0, 0.5, 7.0, 40.0]]])
    """What the model gets for logits, so that what it does with them afterwards shows."""

    def __init__(
        self, module: nn.Module, layer: Layer, tensors: dict[str, Tensor], way: Doorway, scale: float, cap: float
    ) -> None:
        super().__init__(module, layer, tensors, way)
        self._scale = scale
        self._cap = cap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        _, layer, tensors, way = self._inside
        tiles = [self._tiles(hidden, member) for member in range(way.members)]
        bias = tensors.get("bias")
        with way.weights.opened(layer):
            for block in way.weights.blocks(tensors["weight"], VOCABULARY_BLOCK):
                first, count = block.start // block.tensor.width, block.data.size // block.tensor.width
                for member, perturbation in way.folded():
                    offsets: list[torch.Tensor | None] = [None] * perturbation.members
                    if bias:  # first: what the scratch gives is valid until its next call
                        whole = way.weights.part(bias)
                        some = Part(bias, first, whole.data[first : first + count])
                        offsets = [offset.clone() for offset in way.scratch.block(perturbation, some)]
                    work = []
                    for j, matrix in enumerate(way.scratch.block(perturbation, block)):
                        for tile in tiles[member + j]:
                            work.append(partial(self._logits, tile=tile, matrix=matrix, offset=offsets[j], first=first))
                    way.lanes.run(work)
        lengths = way.lengths.astype(np.int64) - 1
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        way.log_probabilities = np.stack(
            [np.add.reduceat(np.concatenate([r.log_probabilities() for _, r in member]), starts) / lengths for member in tiles]
        )
        return self.PROBE.to(hidden.device)

    def _logits(
        self,
        lane: int,
        tile: Tile,
        matrix: torch.Tensor,
        offset: torch.Tensor | None,
        first: int,
    ) -> None:
        """A micro-batch's logits of a block of the vocabulary, and on into its log-sum-exp."""
        states, running = tile
        logits = nn.functional.linear(states, matrix, offset)
        if self._cap:
            logits = self._cap * torch.tanh(logits / self._cap)
        elif self._scale != 1:
            logits = logits * self._scale
        running.update(logits, first, self._inside[3].lanes.threads)

    def _tiles(self, hidden: torch.Tensor, member: int) -> list[Tile]:
        """The member's micro-batches."""
        way = self._inside[3]
        tiles = []
        for low, high, length in way.micro_batches():
            counts = np.arange(length - 1) < way.lengths[low:high, None] - 1
            rows = slice(member * way.samples + low, member * way.samples + high)
            states = hidden[rows, : length - 1][torch.from_numpy(counts).to(hidden.device)]
            targets = way.targets[low:high, 1:length][counts]
            tiles.append((states, way.scratch.log_sum_exp(targets)))
        return tiles


def _has_rows(args: tuple, rows: int) -> bool:
    return any(isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) for value in args)


def _cut(value: Any, rows: int, part: slice, length: int) -> Any:
    """The same arguments for the samples `part`, cut to `length` tokens.

    Tensors: [rows or 1, T, ...] states and positions, [rows or 1, heads or 1, T, T] masks.
    """
    if isinstance(value, torch.Tensor):
        if value.dim() and value.shape[0] == rows:
            value = value[part]
        if value.dim() == 4:
            return value[..., :length, :length]
        return value[:, :length] if value.dim() > 1 else value
    if isinstance(value, tuple):
        return tuple(_cut(item, rows, part, length) for item in value)
    if isinstance(value, dict):
        return {name: _cut(item, rows, part, length) for name, item in value.items()}
    return value
