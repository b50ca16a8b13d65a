"""The head, the last linear map from hidden states to logits, evaluated in blocks of the vocabulary.

No [tokens, vocabulary] tensor is ever made: each block of logits is added to a running log-sum-exp and discarded.

Shapes: G members of all perturbations, B samples, T the longest sample, H hidden size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from es_lite.errors import UserError
from es_lite.model.layout import Layer, Tensor
from es_lite.scoring.device import DeviceLogSumExp
from es_lite.scoring.logsumexp import RunningLogSumExp
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.proxies import ScoringState
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

        class Body(nn.Module):
            def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
                return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=torch.zeros(1, 1, 1))

        class Head(nn.Module):
            def forward(self, _: torch.Tensor) -> torch.Tensor:
                return cls.PROBE

        body, head = model.base_model, model.get_output_embeddings()
        head_name = next(name for name, module in model.named_modules() if module is head)
        setattr(model, model.base_model_prefix, Body())
        setattr(model, head_name, Head())
        with torch.inference_mode():
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits
        setattr(model, model.base_model_prefix, body)
        setattr(model, head_name, head)
        scale = float(logits[0, 0, -1] / cls.PROBE[0, 0, -1])
        if torch.allclose(logits, cls.PROBE * scale, rtol=1e-5):
            return cls(scale, 0.0)
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None) or 0.0
        if cap and torch.allclose(logits, cap * torch.tanh(cls.PROBE / cap), rtol=1e-5):
            return cls(1.0, cap)
        raise UserError(f"{type(model).__name__}: changes its logits in a way that es_lite does not know")

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.cap:
            return self.cap * torch.tanh(logits / self.cap)
        return logits * self.scale if self.scale != 1 else logits


class HeadInput(nn.Module):
    """Replaces the model's head: keeps its input, and returns a single 0 as the logits."""

    def __init__(self) -> None:
        super().__init__()
        self._hidden: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self._hidden.append(hidden)
        return hidden.new_zeros(1, 1, 1)

    def take(self) -> torch.Tensor:
        """Returns the head's input, and keeps it no longer."""
        return self._hidden.pop()


@dataclass(frozen=True)
class ScoredPositions:
    """The scored positions of a member's micro-batch at the head: their hidden states, [n, H], and log-sum-exp."""

    states: torch.Tensor
    running: RunningLogSumExp | DeviceLogSumExp


class Head:
    """The head under perturbed weights."""

    def __init__(self, layer: Layer, tensors: dict[str, Tensor], after: LogitTransform, state: ScoringState) -> None:
        """tensors: "weight" and, if it has one, "bias"."""
        self._layer = layer
        self._matrix = tensors["weight"]
        self._bias = tensors.get("bias")
        self._after = after
        self._state = state

    def log_probabilities(self, hidden: torch.Tensor, tokens: np.ndarray) -> np.ndarray:
        """Mean log-probability of each sample's true next tokens (EA4LLM, section 3): float64 [G, B].

        hidden: [G·B, T, H]; tokens: int32 [B, T], the samples.
        """
        state = self._state
        members = [self._positions(hidden, tokens, member) for member in range(state.members)]
        with state.weights.opened(self._layer):
            for block in state.weights.blocks(self._matrix, VOCABULARY_BLOCK):
                first = block.start // block.tensor.width
                for member, perturbation in state.folded():
                    # Before the matrix: the scratch's results are valid until its next call.
                    offsets = self._offsets(perturbation, block)
                    state.lanes.run(
                        [
                            partial(self._logits, positions=part, matrix=matrix, offset=offsets[j], first=first)
                            for j, matrix in enumerate(state.scratch.block(perturbation, block))
                            for part in members[member + j]
                        ]
                    )
                    state.passed(block.data.size)
        counts = state.lengths.astype(np.int64) - 1
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        values = [np.concatenate([part.running.log_probabilities() for part in member]) for member in members]
        return np.stack([np.add.reduceat(value, starts) / counts for value in values])

    def _offsets(self, perturbation: Perturbation, block: Part) -> list[torch.Tensor | None]:
        """For each member: the bias of the block's rows, or None."""
        if self._bias is None:
            return [None] * perturbation.members
        first, count = block.start // block.tensor.width, block.data.size // block.tensor.width
        whole = self._state.weights.part(self._bias)
        some = Part(self._bias, first, whole.data[first : first + count])
        return [offset.clone() for offset in self._state.scratch.block(perturbation, some)]

    def _logits(
        self, lane: int, positions: ScoredPositions, matrix: torch.Tensor, offset: torch.Tensor | None, first: int
    ) -> None:
        """Adds a micro-batch's logits for a block of the vocabulary to its log-sum-exp."""
        logits = self._after(nn.functional.linear(positions.states, matrix, offset))
        positions.running.update(logits, first, self._state.lanes.threads)

    def _positions(self, hidden: torch.Tensor, tokens: np.ndarray, member: int) -> list[ScoredPositions]:
        """The member's micro-batches."""
        state, found = self._state, []
        for part in state.micro_batches(member):
            scored = np.arange(part.length - 1) < state.lengths[part.samples, None] - 1
            states = hidden[part.rows, : part.length - 1][torch.from_numpy(scored).to(hidden.device)]
            targets = tokens[part.samples, 1 : part.length][scored]
            found.append(ScoredPositions(states, state.scratch.log_sum_exp(targets)))
        return found
