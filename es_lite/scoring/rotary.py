"""Rotary positions whose frequencies depend on the longest text of a forward: those that are cut off alone must be scored alone.

LongRoPE has other frequencies for texts longer than the model was first trained with, "dynamic" ones for each length beyond it.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

KINDS = ("longrope", "dynamic")


class LengthDependence:
    """Which samples may be scored in one forward, so that each sees the positions that it would see alone."""

    def __init__(self, model: nn.Module, config: PretrainedConfig) -> None:
        self._modules = [module for module in model.modules() if _kinds(getattr(module, "rope_type", None))]
        self._before = [_state(module) for module in self._modules]
        self._kinds = {kind for module in self._modules for kind in _kinds(module.rope_type)}
        self._limit = longest_unchanged(config)

    def alike(self, lengths: np.ndarray) -> Iterator[slice]:
        """Slices of samples, int32 [B], longest first, that have the same frequencies."""
        if not self._modules:
            yield slice(0, lengths.size)
            return
        beyond = np.where(lengths > self._limit, lengths, 0)
        classes = beyond if "dynamic" in self._kinds else beyond > 0
        starts = [0, *(np.flatnonzero(np.diff(classes)) + 1).tolist(), lengths.size]
        for low, high in itertools.pairwise(starts):
            yield slice(low, high)

    def reset(self) -> None:
        """Forgets the lengths of earlier forwards."""
        for module, before in zip(self._modules, self._before, strict=True):
            for name, value in before.items():
                if isinstance(value, torch.Tensor) and name in module._buffers:
                    device = module._buffers[name].device  # type: ignore[union-attr]
                    module._buffers[name] = value.clone().to(device)
                else:
                    setattr(module, name, copy.copy(value))


def longest_unchanged(config: PretrainedConfig) -> int:
    """The longest text whose positions are those of all shorter ones; 0 if the model has no such limit."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    limits = []
    for own in nested:
        if _kinds(own.get("rope_type")):
            limits.append(own.get("original_max_position_embeddings") or text.max_position_embeddings)
    return min(limits, default=0)


def _kinds(rope_type: Any) -> list[str]:
    """Those of a rotary embedding's types that depend on the length; there may be one for each kind of layer."""
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return [kind for kind in KINDS if any(isinstance(each, str) and kind in each for each in types)]


def _state(module: nn.Module) -> dict[str, Any]:
    """What a rotary embedding changes as it meets longer texts."""
    found: dict[str, Any] = {name: value.clone() for name, value in module._buffers.items() if value is not None}
    return found | {name: value for name, value in vars(module).items() if "max_seq_len_cached" in name or "scaling" in name}
