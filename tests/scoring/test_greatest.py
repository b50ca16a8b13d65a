"""The greatest logit of each row over blocks of the vocabulary: the first of equal ones, and logits that are not numbers."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from es_lite.algorithm.jit import Threads
from es_lite.scoring.device import DeviceGreatest
from es_lite.scoring.greatest import RunningGreatest

NAN, INF = float("nan"), float("inf")


def greatest(logits: torch.Tensor, *blocks: int, threads: int = 1) -> list[int]:
    """The tokens that are found if the logits come in blocks of these sizes, by the kernel and, equally, by torch operations."""
    found = [in_blocks(kind, logits, blocks, Threads(threads)) for kind in (RunningGreatest, on_cpu)]
    assert found[0] == found[1]
    return found[0]


def on_cpu(rows: int) -> DeviceGreatest:
    return DeviceGreatest(rows, torch.device("cpu"))


def in_blocks(kind: Callable, logits: torch.Tensor, blocks: Sequence[int], threads: Threads) -> list[int]:
    running, first = kind(logits.shape[0]), 0
    for block in logits.split(blocks or logits.shape[1], dim=1):
        running.update(block, first, threads)
        first += block.shape[1]
    found = running.tokens()
    assert found.dtype == np.int64 and found.shape == (logits.shape[0],)
    return found.tolist()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [(100,), (50, 50), (99, 1), (1, 99), (30, 30, 40)], ids=str)
def test_blocks_find_what_the_whole_row_has(compute, blocks):
    """Of random logits, of which bfloat16 makes many equal."""
    logits = torch.randn(200, 100, generator=torch.Generator().manual_seed(1)).mul(3).to(compute)
    assert greatest(logits, *blocks) == greatest(logits, *blocks, threads=3) == logits.argmax(dim=1).tolist()


def test_of_equal_logits_the_first_counts_within_a_block_and_across_blocks():
    rows = [[1, 3, 3, 3, 0, 3], [0, 1, 2, 3, 3, 3], [5, 5, 5, 5, 5, 5], [-0.0, 0, -0.0, 0, -1, 0]]
    logits = torch.tensor(rows, dtype=torch.float32)
    for blocks in ((6,), (3, 3), (1, 5), (2, 2, 2), (1, 1, 1, 1, 1, 1)):
        assert greatest(logits, *blocks) == [1, 3, 0, 0]


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("blocks", [(6,), (3, 3), (1, 4, 1)], ids=str)
def test_a_logit_that_is_not_a_number_breaks_its_row_alone(place, blocks):
    """Wherever it is, and whatever else there is."""
    logits = torch.tensor([[0, 1, 2, 3, 4, 5.0]]).repeat(4, 1)
    logits[1, place] = NAN
    logits[2] = torch.tensor([INF, -INF, 0, -INF, INF, 9])
    logits[2, place] = NAN
    assert greatest(logits, *blocks) == [5, -1, -1, 5]


def test_infinite_logits_are_numbers():
    logits = torch.tensor([[-INF, -INF, -INF, -INF], [-INF, -INF, -5, -INF], [0, INF, 9, INF], [-INF, -1e38, -INF, -2e38]])
    for blocks in ((4,), (2, 2), (1, 1, 1, 1), (3, 1)):
        assert greatest(logits, *blocks) == [0, 2, 1, 1]  # of a row of -inf alone, the first
