"""The head, the last linear map from hidden states to logits, evaluated in blocks of the vocabulary.

No [tokens, vocabulary] tensor is ever made: each block of logits goes into a running log-sum-exp or greatest logit, and is
dropped.

Shapes: G members of all perturbations, B samples, T the longest sample, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from es_lite.errors import UserError
from es_lite.model.layout import ANOTHER, Layer, Tensor
from es_lite.scoring.device import DeviceGreatest, DeviceLogSumExp
from es_lite.scoring.factors import LowRankFactors, MemberRows
from es_lite.scoring.greatest import RunningGreatest
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.proxies import ScoringState
from es_lite.scoring.sequences import SequenceRows, SequenceTile
from es_lite.scoring.tiles import PerturbationGroup, SampleRows, Tile
from es_lite.weights.parts import Part

VOCABULARY_BLOCK = 2048
"""Rows of the head that are perturbed and multiplied at a time; sections of a stream are multiples of it."""


@dataclass(frozen=True)
class LogitTransform:
    """What the model does with its logits: logits·scale, or cap·tanh(logits/cap) if cap is not 0."""

    scale: float
    cap: float

    PROBE = torch.tensor([[[-30.0, -1.0, 0.5, 7.0, 40.0]]])

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LogitTransform":
        """Determined by giving the model known logits. Raises UserError if it does anything else with them."""
        names = {id(module): name for name, module in model.named_modules()}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        body_name = names[id(embedding)].partition(".")[0]
        body = model.get_submodule(body_name)
        hidden = torch.zeros(1, 1, model.config.get_text_config().hidden_size, device="meta")
        known = {body_name: _Body(body, hidden), names[id(head)]: KnownLogits(cls.PROBE, head.weight)}
        try:
            for name, module in known.items():
                model.set_submodule(name, module)
            with torch.inference_mode():
                logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits
        except Exception as error:  # whatever its own code raises
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            name = type(model).__name__
            raise UserError(f"{name}: es_lite cannot find out what it does with its logits ({reason}); {ANOTHER}") from None
        finally:
            model.set_submodule(body_name, body)
            model.set_submodule(names[id(head)], head)
        config = model.config.get_text_config().to_dict()
        caps = [value for key, value in config.items() if "cap" in key and isinstance(value, int | float) and value > 0]
        scale = float(logits[..., -1].flatten()[0] / cls.PROBE[0, 0, -1])
        for transform in (cls(scale, 0.0), *(cls(1.0, float(cap)) for cap in caps)):
            if transform.explains(logits):
                return transform
        raise UserError(f"{type(model).__name__}: changes its logits in a way that es_lite does not know; {ANOTHER}")

    def explains(self, logits: torch.Tensor) -> bool:
        """Whether a model made these logits of `PROBE`."""
        tolerance = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
        expected = self(self.PROBE).to(logits.device)
        return logits.shape == expected.shape and torch.allclose(logits.float(), expected, rtol=tolerance)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.cap:
            return self.cap * torch.tanh(logits / self.cap)
        return logits * self.scale if self.scale != 1 else logits


class _Body(nn.Module):
    """In place of a model's body, and of any part of it: whichever is called returns the same hidden states."""

    def __init__(self, body: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self.__dict__["replaced"], self.__dict__["hidden"] = body, hidden

    def forward(self, *_: Any, **__: Any) -> "_BodyOutput":
        return _BodyOutput((self.hidden,))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["replaced"], name)
        return self if isinstance(value, nn.Module) else value


class _BodyOutput(tuple):
    """A body's output of whatever kind: hidden states, and nothing else that a model may read of it."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, _: str) -> None:
        return None


class KnownLogits(nn.Module):
    """In place of a model's head: returns known logits."""

    def __init__(self, logits: torch.Tensor, weight: torch.Tensor) -> None:
        """weight: what the model may ask for the type of."""
        super().__init__()
        self.__dict__["logits"], self.__dict__["weight"] = logits, weight

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.__dict__["logits"]
        return logits


class HeadInput(nn.Module):
    """Replaces the model's head: keeps its input, and returns known logits (`LogitTransform.PROBE`)."""

    def __init__(self, compute: torch.dtype) -> None:
        super().__init__()
        self._hidden: list[torch.Tensor] = []
        self.__dict__["weight"] = torch.empty(0, dtype=compute)  # some models ask for its type

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self._hidden.append(hidden)
        return LogitTransform.PROBE.to(hidden)

    def take(self) -> torch.Tensor:
        """Returns the head's input, and keeps it no longer."""
        return self._hidden.pop()


@dataclass(frozen=True)
class Positions:
    """The positions of a tile that are scored, or continued, at the head: their hidden states, [n, H], member by member, and what
    their logits are added to."""

    tile: Tile | SequenceTile
    states: torch.Tensor
    running: RunningLogSumExp | DeviceLogSumExp | RunningGreatest | DeviceGreatest
    projected: torch.Tensor | None
    """The states projected on B of the head's low-rank perturbations (`LowRankFactors.project`)."""
    members: MemberRows
    """How the positions belong to the tile's members."""


class Head:
    """The head under perturbed weights."""

    def __init__(self, layer: Layer, tensors: dict[str, Tensor], after: LogitTransform, state: ScoringState) -> None:
        """tensors: "weight" and, if it has one, "bias"."""
        self._layer = layer
        self._matrix = tensors["weight"]
        self._bias = tensors.get("bias")
        self.after = after
        self._state = state

    def log_probabilities(self, hidden: torch.Tensor, tokens: np.ndarray) -> np.ndarray:
        """Log-probability of each of the samples' true next tokens, sample after sample: float64 [G, scored tokens].

        hidden: [G·B, T, H]; tokens: int32 [B, T], the samples.
        """
        state = self._state
        assert isinstance(state.rows, SampleRows)
        groups = [(group, self._scored(group, state.rows, hidden, tokens)) for group in state.groups()]
        self._add_logits(groups)
        return np.concatenate([self._values(group, positions) for group, positions in groups])

    def greatest(self, hidden: torch.Tensor) -> np.ndarray:
        """The token with the greatest logit for each row, the first of equal ones; -1 if a logit is not a number: int64 [R].

        hidden: [R, T, H]; the last position of each row is continued.
        """
        state = self._state
        assert isinstance(state.rows, SequenceRows)
        groups = [(group, self._continued(group, state.rows, hidden)) for group in state.groups()]
        self._add_logits(groups)
        found = np.empty(state.rows.count, np.int64)
        for _, positions in groups:
            for part in positions:
                assert isinstance(part.tile, SequenceTile) and isinstance(part.running, RunningGreatest | DeviceGreatest)
                found[part.tile.rows] = part.running.tokens()
        return found

    def _add_logits(self, groups: Sequence[tuple[PerturbationGroup, Sequence[Positions]]]) -> None:
        """Adds the logits of all positions, in blocks of the vocabulary."""
        state = self._state
        with state.weights.opened(self._layer):
            for block in state.weights.blocks(self._matrix, VOCABULARY_BLOCK):
                base = {"": block}
                for group, positions in groups:
                    offsets = self._offsets(group, block)
                    if group.perturbations[0].factored:
                        state.lanes.run(self._shared(group, positions, base, offsets))
                    else:
                        state.lanes.run(self._full(group, positions, block, offsets))
                    state.passed(len(group.perturbations) * block.data.size)

    def _full(
        self, group: PerturbationGroup, positions: Sequence[Positions], block: Part, offsets: torch.Tensor | None
    ) -> list[Callable[[int], None]]:
        """A block of the vocabulary, with the perturbed matrix of each member."""
        (perturbation,) = group.perturbations
        matrices = self._state.scratch.block(perturbation, block)

        def logits(lane: int, part: Positions) -> None:
            member = part.tile.members.start
            offset = None if offsets is None else offsets[member]
            self._add(part, nn.functional.linear(part.states, matrices[member], offset), block)

        return [partial(logits, part=part) for part in positions]

    def _shared(
        self,
        group: PerturbationGroup,
        positions: Sequence[Positions],
        base: Mapping[str, Part],
        offsets: torch.Tensor | None,
    ) -> list[Callable[[int], None]]:
        """The same with the unperturbed matrix for all members, and low-rank corrections. base: the block, by any name."""
        ((name, block),) = base.items()
        scratch, width = self._state.scratch, block.tensor.width
        first, rows = block.start // width, block.data.size // width
        matrix = scratch.base(base)[name]
        factors = scratch.factors(group.perturbations, block.tensor, first, rows)

        def logits(lane: int, part: Positions) -> None:
            members = part.tile.members
            values = nn.functional.linear(part.states, matrix)
            if factors and part.projected is not None:
                factors[part.tile.perturbations].add(values, part.projected, part.members, self._state.lanes.threads)
            if offsets is not None:
                values.add_(part.members.repeated(offsets[members.start : members.stop], values.shape[0]))
            self._add(part, values, block)

        return [partial(logits, part=part) for part in positions]

    def _add(self, part: Positions, logits: torch.Tensor, block: Part) -> None:
        """Adds a tile's logits for a block of the vocabulary to its log-sum-exp or its greatest logit."""
        first = block.start // block.tensor.width
        part.running.update(self.after(logits), first, self._state.lanes.threads)

    def _offsets(self, group: PerturbationGroup, block: Part) -> torch.Tensor | None:
        """The bias of the block's rows for each member of the group, [members, rows]; None if there is no bias."""
        if self._bias is None:
            return None
        first, count = block.start // block.tensor.width, block.data.size // block.tensor.width
        whole = self._state.weights.part(self._bias)
        some = {"": Part(self._bias, first, whole.data[first : first + count])}
        return torch.stack([own[""] for p in group.perturbations for own in self._state.scratch.kept(p, some)])

    def _scored(self, group: PerturbationGroup, rows: SampleRows, hidden: torch.Tensor, tokens: np.ndarray) -> list[Positions]:
        """The scored positions of the group's tiles."""
        state, found, factors = self._state, [], self._factors(group)
        for tile in rows.tiles(group, apart=not group.perturbations[0].factored):
            scored = np.arange(tile.length - 1) < rows.lengths[tile.samples, None] - 1
            mask = torch.from_numpy(np.tile(scored, (len(tile.members), 1))).to(hidden.device)
            states = tile.cut(hidden)[:, : tile.length - 1][mask]
            targets = np.tile(tokens[tile.samples, 1 : tile.length][scored], len(tile.members))
            members = MemberRows(tile.signs)
            projected = factors[tile.perturbations].project(states, members, state.lanes.threads) if factors else None
            found.append(Positions(tile, states, state.scratch.log_sum_exp(targets), projected, members))
        return found

    def _continued(self, group: PerturbationGroup, rows: SequenceRows, hidden: torch.Tensor) -> list[Positions]:
        """The last positions of the rows of the group's tiles."""
        state, found, factors = self._state, [], self._factors(group)
        for tile in rows.tiles(group, apart=not group.perturbations[0].factored):
            states, members = hidden[tile.rows, -1], MemberRows(tile.signs, tile.counts)
            projected = factors[tile.perturbations].project(states, members, state.lanes.threads) if factors else None
            found.append(Positions(tile, states, state.scratch.greatest(tile.count), projected, members))
        return found

    def _factors(self, group: PerturbationGroup) -> LowRankFactors | None:
        """Low-rank factors of the head, of which only B is needed before its logits."""
        if not group.perturbations[0].factored:
            return None
        return self._state.scratch.factors(group.perturbations, self._matrix, rows=0)

    def _values(self, group: PerturbationGroup, positions: Sequence[Positions]) -> np.ndarray:
        """The log-probabilities of all scored positions, float64 [members, positions]."""
        found: list[list[np.ndarray]] = [[] for _ in range(group.members)]
        for part in positions:
            members = part.tile.members
            assert not isinstance(part.running, RunningGreatest | DeviceGreatest)
            for member, values in zip(members, np.split(part.running.log_probabilities(), len(members)), strict=True):
                found[member].append(values)
        return np.stack([np.concatenate(values) for values in found])
