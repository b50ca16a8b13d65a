"""The greatest logit of each row over blocks of the vocabulary, so no [rows, vocabulary] tensor is ever made."""

import numpy as np
import torch

from es_lite.algorithm.formats import wide
from es_lite.algorithm.jit import Threads, jit
from es_lite.scoring.arrays import as_array

LANES = 64
"""Elements whose maxima are found side by side."""


@jit
def _update(greatest, tokens, broken, logits, first):
    """See RunningGreatest.update."""
    lanes, strange = np.empty(LANES, np.float32), np.empty(LANES, np.uint32)
    for row in range(logits.shape[0]):
        own = logits[row]
        lanes[:] = np.float32(-np.inf)
        strange[:] = np.uint32(0)
        whole = own.size // LANES * LANES
        for low in range(0, whole, LANES):
            part = own[low : low + LANES]
            for k in range(LANES):
                value = wide(part[k])
                lanes[k] = value if value > lanes[k] else lanes[k]
                strange[k] |= np.uint32(value != value)
        for k in range(whole, own.size):
            value = wide(own[k])
            lanes[0] = max(lanes[0], value)
            strange[0] |= np.uint32(value != value)
        top = lanes[0]
        for k in range(LANES):
            top = max(top, lanes[k])
            broken[row] |= strange[k] != 0
        if top > greatest[row]:
            place = 0
            while wide(own[place]) != top:
                place += 1
            greatest[row], tokens[row] = top, first + place


class RunningGreatest:
    """The greatest logit of each row, fed block by block, and its token: the first of equal ones."""

    def __init__(self, rows: int) -> None:
        self._greatest = np.full(rows, -np.inf, np.float32)
        self._tokens = np.zeros(rows, np.int64)
        self._broken = np.zeros(rows, bool)

    def update(self, logits: torch.Tensor, first: int, threads: Threads) -> None:
        """Adds the logits of vocabulary entries first, first + 1, …: [rows, block], float32 or bfloat16."""
        values = as_array(logits)

        def part(low: int, high: int) -> None:
            some = slice(low, high)
            _update(self._greatest[some], self._tokens[some], self._broken[some], values[some], first)

        threads.each(len(values), part, least=64)

    def tokens(self) -> np.ndarray:
        """The token of each row, or -1 if one of its logits is not a number: int64 [rows]."""
        return np.where(self._broken, -1, self._tokens)
