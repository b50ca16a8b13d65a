"""Persistent buffers: what a model's files hold beside its parameters, such as statistics. Part of θ₀, and never perturbed."""

import torch
from transformers import PreTrainedModel


def persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's own memory of each, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def stored(buffer: torch.Tensor) -> bytes:
    """The buffer's bytes, whatever its type; numpy has no bfloat16."""
    return buffer.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
