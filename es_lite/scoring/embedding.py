"""The proxy of the token embedding, of whose matrix only the rows that a batch uses are perturbed."""

from typing import Any

import torch
from torch.func import functional_call

from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.proxies import Proxy
from es_lite.scoring.sequences import SequenceRows


class EmbeddingProxy(Proxy):
    """The token embedding: only the rows that the batch uses are perturbed. It may own more, such as a norm."""

    @property
    def weight(self) -> torch.Tensor:
        """For modules that ask for its type or device, or take rows of it for what is not in a text; no numbers."""
        state, shape = self.wrapped.state, self.wrapped.tensors["weight"].shape
        return torch.full((), torch.nan, dtype=state.compute, device=state.scratch.device).expand(shape)

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        state, tensor = self.wrapped.state, self.wrapped.tensors["weight"]
        if isinstance(state.rows, SequenceRows):
            return self._sequences(ids, state.rows)
        used, positions = torch.unique(ids[: state.rows.samples], return_inverse=True)
        rows = used.cpu().numpy()
        weights, scales = state.weights.rows(tensor, rows)
        return torch.cat(
            [
                functional_call(self.wrapped.modules[0], {"weight": values, **others}, (positions,))
                for perturbation in state.perturbations
                for values, others in zip(
                    state.scratch.rows(perturbation, tensor, rows, weights, scales), self._others(perturbation), strict=True
                )
            ]
        )

    def _others(self, perturbation: Perturbation) -> list[dict[str, torch.Tensor]]:
        """For each member: what it owns beside its matrix."""
        state = self.wrapped.state
        parts = {name: state.weights.part(tensor) for name, tensor in self.wrapped.tensors.items() if name != "weight"}
        return state.scratch.kept(perturbation, parts)

    def _sequences(self, ids: torch.Tensor, rows: SequenceRows) -> torch.Tensor:
        """For sequences that are generated: every member has tokens of its own."""
        state, tensor = self.wrapped.state, self.wrapped.tensors["weight"]
        output = rows.output()
        every, places = torch.unique(ids, return_inverse=True)
        weights, scales = state.weights.rows(tensor, every.cpu().numpy())
        for group in state.groups():
            for tile in rows.tiles(group, apart=not group.perturbations[0].factored):
                parts = places[tile.rows, -tile.length :].split(tile.counts)
                made = []
                for member, part in zip(tile.members, parts, strict=True):
                    perturbation = group.perturbations[member // group.perturbations[0].members]
                    used, positions = torch.unique(part, return_inverse=True)
                    some = used.cpu().numpy()
                    values = state.scratch.rows(
                        perturbation, tensor, every.cpu().numpy()[some], weights[some], scales[some] if scales.size else scales
                    )
                    own = values[member % perturbation.members]
                    others = self._others(perturbation)[member % perturbation.members]
                    made.append(functional_call(self.wrapped.modules[0], {"weight": own, **others}, (positions,)))
                output.put(tile, torch.cat(made))
        return output.result()
