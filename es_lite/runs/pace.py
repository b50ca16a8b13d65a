"""How long steps take: as estimated before the first, then as measured; and the time budget of a run."""

import statistics
import time
from collections import deque

from es_lite.quantities import duration

MEASURED = 5
"""The next step is expected to take the median of this many steps before it."""

SHARE, SECONDS = 0.05, 5.0
"""The estimate is corrected when this share of the first step's scoring is done, and it took this long: not before, since a
process's first work is slow."""

NOTICEABLE = 1.25
"""A correction by less than this factor is not worth a line."""


class Pace:
    def __init__(self, score_seconds: float, update_seconds: float, minutes: float) -> None:
        """The estimates for a step; minutes: the budget of this command, 0: none."""
        self._began = time.monotonic()
        self._estimate = score_seconds + update_seconds
        self._update_seconds = update_seconds
        self._minutes = minutes
        self._measured: deque[float] = deque(maxlen=MEASURED)
        self._corrected = False

    @property
    def step_seconds(self) -> float:
        return statistics.median(self._measured) if self._measured else self._estimate

    def outlook(self, steps: int) -> str:
        """How long a step and the remaining steps will take, in words."""
        return f"a step takes about {duration(self.step_seconds)} on this machine, {self.rest(steps)}"

    def rest(self, steps: int) -> str:
        """How long the remaining steps will take, in words."""
        return f"the remaining {steps} steps about {duration(steps * self.step_seconds)}"

    def correct(self, share: float, seconds: float) -> bool:
        """`share` of a step's scoring took `seconds`. True if that changes the estimate noticeably; once, in the first step."""
        if self._corrected or self._measured or share < SHARE or seconds < SECONDS:
            return False
        self._corrected = True
        before, self._estimate = self._estimate, seconds / share + self._update_seconds
        return not 1 / NOTICEABLE < self._estimate / max(before, 1e-9) < NOTICEABLE

    def stepped(self, seconds: float) -> None:
        """A step is done."""
        self._measured.append(seconds)

    @property
    def exhausted(self) -> bool:
        """The next step would exceed the budget. The first step of a command never does, so that resuming makes progress."""
        spent = time.monotonic() - self._began
        return bool(self._minutes and self._measured) and spent + self.step_seconds > 60 * self._minutes
