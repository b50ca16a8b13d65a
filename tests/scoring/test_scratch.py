"""Perturbed tensors: the same bits whole, by rows, by blocks and with any number of threads, and those of numpy."""

import numpy as np
import pytest
import torch
from architectures import BOTH, Tiny, config_of

from es_lite.algorithm.jit import Threads
from es_lite.scoring.scratch import Scratch
from es_lite.weights.parts import Part


def scratch_bits(tiny: Tiny, compute: torch.dtype, threads: int) -> dict[str, list[bytes]]:
    """Bits of each tensor for each member, by name; rows and blocks are compared on the way."""
    scratch = Scratch(compute, Threads(threads))
    found = {}
    for tensor in tiny.layout.tensors:
        part = tiny.working.part(tensor)
        whole = [member["x"].clone() for member in scratch.tensors(BOTH, {"x": part})]
        if len(tensor.shape) == 2:
            rows = np.arange(tensor.shape[0])
            by_rows = scratch.rows(BOTH, tensor, rows, *tiny.working.rows(tensor, rows))
            assert all(torch.equal(a, b) for a, b in zip(whole, by_rows, strict=True))
            block = Part(tensor, 3 * tensor.width, part.data[3 * tensor.width : 9 * tensor.width], part.scales)
            assert all(torch.equal(a[3:9], b) for a, b in zip(whole, scratch.block(BOTH, block), strict=True))
        found[tensor.name] = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in whole]
    return found


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_threads_rows_and_blocks_make_the_same_tensors(compute):
    tiny = Tiny(config_of("qwen3", vocab_size=3001))  # an embedding large enough to be divided among threads
    one = scratch_bits(tiny, compute, 1)
    assert one == scratch_bits(tiny, compute, 2)
    for member, sign in enumerate(BOTH.signs):
        for name, expected in tiny.perturbed(BOTH, sign).items():
            assert one[name][member] == expected.to(compute).contiguous().view(torch.uint8).numpy().tobytes()
