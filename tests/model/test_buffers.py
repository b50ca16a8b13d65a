"""The bytes of persistent buffers, of whatever type."""

import pytest
import torch

from es_lite.model.buffers import stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_a_buffers_bytes_are_those_of_its_elements_in_order(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    assert stored(values) == values.flatten().view(torch.uint8).numpy().tobytes()
    if len(shape) == 2:
        assert stored(values.T.contiguous().T) == stored(values)
