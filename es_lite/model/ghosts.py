"""Ghosts: parameters that take no memory, on which a model's forward shows what depends on what before anything is loaded.

A ghost is a single number, seen as a tensor of some shape. A product with a ghost or a row of one would read all of it, so linear
maps and embeddings are replaced by functions of their shapes and their input, which keep tokens apart as these do. All else
(attention, norms, positions, masks, what is given to blocks and what they return) is the model's own code.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

GROUPED = [f for f in (getattr(functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f]
"""Products of experts: [tokens of all experts, inputs] and [experts, inputs, outputs]."""

VALUE = 0.5

ABOUT = {getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "is_meta")}
"""What may be asked of a parameter without using it."""


def ghost(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of this shape whose elements are all the same number, at one place in memory."""
    return torch.tensor(VALUE, dtype=dtype).expand(*shape)


def ghost_rows(ids: torch.Tensor, width: int) -> torch.Tensor:
    """In place of an embedding: a vector for each id, [..., width]."""
    return torch.sin((ids[..., None] + 1) * 0.37 * torch.arange(1, width + 1))


class GhostProducts(TorchFunctionMode):
    """Within it, products with ghosts and rows of ghosts are replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()
        """Identities of the tensors that functions were given."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function not in ABOUT:
            self.used.update(id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))
        weight: Any = args[1] if len(args) > 1 else kwargs.get("weight")
        if function is torch.addmm and _is_ghost(args[2]):  # Conv1D
            return args[0] + _product(args[1], *args[2].shape)
        if _is_ghost(weight):
            if function is functional.linear:
                return _linear(*args, **kwargs)
            if function in GROUPED:
                return _product(args[0], *weight.shape[1:])
            if function is functional.embedding:
                if args[0].max() >= weight.shape[0]:
                    raise IndexError(f"it has {weight.shape[0]} rows, and the text needs row {args[0].max()}")
                return ghost_rows(args[0], weight.shape[1]).to(weight.dtype)
        return function(*args, **kwargs)


class OwnForward:
    """A model's own forward on ghosts."""

    def __init__(self, model: PreTrainedModel) -> None:
        """model: a `layout.skeleton`, which is not changed."""
        self._model = copy.deepcopy(model)
        for module in self._model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(ghost(parameter.shape), requires_grad=False)
        self._states: list[torch.Tensor] = []
        self._model.get_output_embeddings().register_forward_pre_hook(lambda _, args: self._states.append(args[0]))

    @torch.inference_mode()
    def states(self, tokens: np.ndarray) -> torch.Tensor:
        """The head's input for a text, int32 [T]: [T, H]. Raises whatever the model's code does."""
        with GhostProducts():
            self._model(input_ids=_ids(tokens), use_cache=False)
        return self._states.pop()[0]

    @torch.inference_mode()
    def next_token(self, tokens: np.ndarray) -> int:
        """The token with the greatest logit after a text, int32 [T]."""
        with GhostProducts():
            logits = self._model(input_ids=_ids(tokens), use_cache=False).logits
        self._states.clear()
        return int(logits[0, -1].argmax())

    @torch.inference_mode()
    def unused(self, tokens: np.ndarray) -> set[str]:
        """The names of the parameters that a text does not pass, such as those for images."""
        with GhostProducts() as products:
            self._model(input_ids=_ids(tokens), use_cache=False)
        return {name for name, parameter in self._model.named_parameters() if id(parameter) not in products.used}


def _ids(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tokens.astype(np.int64))[None]


def _is_ghost(tensor: object) -> bool:
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or any(tensor.stride()) or tensor.is_meta:
        return False
    return tensor[(0,) * tensor.dim()].item() == VALUE


def _waves(count: int, rate: float) -> torch.Tensor:
    return torch.sin(rate * torch.arange(1, count + 1))


def _product(x: torch.Tensor, inputs: int, outputs: int) -> torch.Tensor:
    """In place of a linear map, two features of the input in each output: [..., outputs]."""
    left = torch.stack([_waves(inputs, 0.7), _waves(inputs, 1.9)]) * (2 / inputs) ** 0.5
    right = torch.stack([_waves(outputs, 1.3), _waves(outputs, 2.3)])
    first, second = ((x.float() * row).sum(-1, keepdim=True) for row in left)
    return (first * right[0] + second * right[1]).to(x.dtype)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = _product(input, weight.shape[1], weight.shape[0])
    return y if bias is None else y + bias
