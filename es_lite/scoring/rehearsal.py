"""A rehearsal of scoring, before anything is loaded: the proxied forward compared with the model's own, on `model.ghosts`.

Two forwards that agree on ghosts do the same with the same weights; and a state that changes with a later token shows that the
model is not causal.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from es_lite.algorithm.jit import Threads
from es_lite.data.batch import Batch
from es_lite.errors import UserError
from es_lite.model.ghosts import GhostProducts, OwnForward, ghost, ghost_rows
from es_lite.model.layout import Layer, Layout, Tensor
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.scratch import Scratch
from es_lite.weights.parts import Part

LENGTHS = (7, 4, 4)
"""Of the samples: the second begins as the first does, the third is another."""

TOLERANCE = 1e-3
"""Relative to the greatest magnitude; a product of other rows has other last bits."""


def rehearse(model: PreTrainedModel, layout: Layout, perturbation: Perturbation) -> None:
    """Raises UserError if scores would not be those of the model's own forward, or if the model is not causal.

    model: a `layout.skeleton`, which is not changed. perturbation: any of the kind of noise that is to be used, with a σ.
    """
    name, tokens = type(model).__name__, _tokens(model.config.get_text_config().vocab_size)
    own = OwnForward(model)
    try:
        expected = [own.states(row[:length]) for row, length in zip(tokens, LENGTHS, strict=True)]
    except Exception as error:  # whatever its own code raises
        raise UserError(f"{name}: does not run on the tokens of a text alone: {_reason(error)}") from None
    if any(states.shape[:-1] != (length,) for states, length in zip(expected, LENGTHS, strict=True)):
        raise UserError(f"{name}: does not have one hidden state for each token of a text, which es_lite needs")
    if not _agree(expected[1], expected[0][: LENGTHS[1]]):
        raise UserError(
            f"{name}: is not causal as it is configured: what it makes of a token depends on later ones, so it gives no "
            "log-probabilities of a text; take a model that predicts the next token"
        )
    try:
        found = _proxied(model, layout, perturbation, tokens)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name}: es_lite cannot run it layer by layer: {_reason(error)}; take a model of another architecture"
        ) from None
    for member in found:
        if not all(_agree(states[:length], own) for states, own, length in zip(member, expected, LENGTHS, strict=True)):
            raise UserError(
                f"{name}: layer by layer, it does not compute what it does as a whole, so its scores would be wrong; take a "
                "model of another architecture"
            )


def _tokens(vocabulary: int) -> np.ndarray:
    """int32 [samples, the longest]; none is among the first ten, where tokens of special meaning are."""
    random = np.random.default_rng(0)
    tokens = random.integers(min(10, vocabulary // 2), vocabulary, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    tokens[1] = tokens[0]
    return tokens


def _proxied(model: PreTrainedModel, layout: Layout, perturbation: Perturbation, tokens: np.ndarray) -> torch.Tensor:
    """The head's input for all members and samples, [members, samples, T, H]."""
    proxied = PerturbedModel(
        copy.deepcopy(model),
        layout,
        _GhostWeights(),
        torch.float32,
        Lanes(1, 1),
        micro_batch=2,
        tile_members=perturbation.members,
        scratch=_GhostScratch(),
    )
    with GhostProducts():
        states = proxied.head_input([perturbation], Batch(tokens, np.array(LENGTHS, np.int32)))
    return states.unflatten(0, (perturbation.members, len(LENGTHS)))


def _agree(states: torch.Tensor, others: torch.Tensor) -> bool:
    return states.shape == others.shape and bool((states - others).abs().max() <= TOLERANCE * others.abs().max())


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


class _GhostWeights:
    """`Weights` without memory."""

    def passing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def opened(self, layer: Layer) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def part(self, tensor: Tensor) -> Part:
        return Part(tensor, 0, np.broadcast_to(np.uint16(0), tensor.size))

    def rows(self, tensor: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.broadcast_to(np.uint16(0), (rows.size, tensor.width)), np.empty(0, np.float32)

    def blocks(self, tensor: Tensor, rows: int) -> Iterator[Part]:
        yield self.part(tensor)


class _GhostScratch(Scratch):
    """`Scratch` in which the perturbed tensors of all members are the same ghosts."""

    def __init__(self) -> None:
        super().__init__(torch.float32, Threads(1))

    def tensors(self, perturbation: Perturbation, parts: Mapping[str, Part]) -> list[dict[str, torch.Tensor]]:
        return [self.base(parts) for _ in perturbation.signs]

    def kept(self, perturbation: Perturbation, parts: Mapping[str, Part]) -> list[dict[str, torch.Tensor]]:
        return self.tensors(perturbation, parts)

    def base(self, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
        return {name: ghost(part.tensor.shape) for name, part in parts.items()}

    def factors(self, *_: Any, **__: Any) -> None:
        return None

    def rows(
        self, perturbation: Perturbation, tensor: Tensor, rows: np.ndarray, weights: np.ndarray, scales: np.ndarray
    ) -> list[torch.Tensor]:
        return [ghost_rows(torch.from_numpy(rows), tensor.width) for _ in perturbation.signs]
