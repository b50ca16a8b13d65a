"""Where a tensor's ε comes from, and the numbers reserved for other uses of the same generator."""

from typing import NamedTuple

INITIALISATION = 2**32 - 1
"""The step whose noise random initial weights are drawn from; no training step reaches it."""

ROUNDING = 2**32 - 1
"""The pair whose random bits round a stochastic update; no member's pair reaches it."""


class Place(NamedTuple):
    """The noise of one tensor, in one pair of one step: ε is a pure function of this and the element's index."""

    seed: int
    """64 bits: the key of the noise."""
    step: int
    pair: int
    tensor: int

    @property
    def key(self) -> tuple[int, int]:
        """The two 32-bit words of the seed, low word first."""
        return self.seed & 0xFFFFFFFF, self.seed >> 32
