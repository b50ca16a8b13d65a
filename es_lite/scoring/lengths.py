"""What in a model depends on the longest text of a forward, so that not all samples can be scored in one.

LongRoPE has other frequencies for texts longer than the model was first trained with, "dynamic" ones for each length beyond it.
An index that chooses the tokens to attend to (DeepSeek V3.2) chooses among equal ones by how many there are, padding included.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from es_lite.model.configuration import size_of

KINDS = ("longrope", "dynamic")


class LengthDependence:
    """Which samples may be scored in one forward, so that each sees what it would see alone."""

    def __init__(self, model: nn.Module, config: PretrainedConfig) -> None:
        self._modules = [module for module in model.modules() if _kinds(getattr(module, "rope_type", None))]
        self._before = [_state(module) for module in self._modules]
        self._kinds = {kind for module in self._modules for kind in _kinds(module.rope_type)}
        self._limit = longest_unchanged(config)
        self._each_apart = "dynamic" in self._kinds or chosen_tokens(config) > 0

    def alike(self, lengths: np.ndarray) -> Iterator[slice]:
        """Slices of samples, int32 [B], longest first, for which nothing differs."""
        beyond = np.where(lengths > self._limit, lengths, 0) if self._limit else np.zeros_like(lengths)
        classes = beyond if self._each_apart else beyond > 0
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
    """How long a text can be before its length changes how its earlier tokens are read; 0 if it never does."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    limits = [chosen] if (chosen := chosen_tokens(config)) else []
    for own in nested:
        if _kinds(own.get("rope_type")):
            limits.append(own.get("original_max_position_embeddings") or text.max_position_embeddings)
    return min(limits, default=0)


def chosen_tokens(config: PretrainedConfig) -> int:
    """How many tokens an index chooses at most; 0 if the model has none. Up to so many, all are."""
    return size_of(config, "index_topk")


def _kinds(rope_type: Any) -> list[str]:
    """Those of a rotary embedding's types that depend on the length; there may be one for each kind of layer."""
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return [kind for kind in KINDS if any(isinstance(each, str) and kind in each for each in types)]


def _state(module: nn.Module) -> dict[str, Any]:
    """What a rotary embedding changes as it meets longer texts."""
    found: dict[str, Any] = {name: value.clone() for name, value in module._buffers.items() if value is not None}
    return found | {name: value for name, value in vars(module).items() if "max_seq_len_cached" in name or "scaling" in name}
