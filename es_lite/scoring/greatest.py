"""The greatest logit of each row over blocks of the vocabulary, so no [rows, vocabulary] tensor is ever made."""

import numpy as np
import torch

from es_lite.algorithm.jit import Threads


class RunningGreatest:
    """The greatest logit of each row, fed block by block, and its token: the first of equal ones."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._greatest = torch.full((rows,), -torch.inf, device=device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._broken = torch.zeros(rows, dtype=torch.bool, device=device)

    def update(self, logits: torch.Tensor, first: int, _: Threads) -> None:
        """Adds the logits of vocabulary entries first, first + 1, …: [rows, block]."""
        values, places = logits.max(dim=1)
        values = values.to(torch.float32)
        self._broken |= values.isnan()  # which the greatest is if any is
        greater = values > self._greatest
        self._greatest = torch.where(greater, values, self._greatest)
        self._tokens = torch.where(greater, places + first, self._tokens)

    def tokens(self) -> np.ndarray:
        """The token of each row, or -1 if one of its logits is not a number: int64 [rows]."""
        return torch.where(self._broken, -1, self._tokens).cpu().numpy()
