"""Tensors of the compute type as the arrays that kernels take, and back; both share memory. bfloat16 is seen as bits, uint16."""

import numpy as np
import torch


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """float32 or, of bfloat16, uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """float32 or, of uint16, bfloat16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
