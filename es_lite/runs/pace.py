"""How long steps take: as estimated before the first, then as measured; and the time budget of a run."""

import statistics
import time
from collections import deque

from es_lite.quantities import count, duration

MEASURED = 5
"""A step is expected to take the median of this many steps before it."""

SHARE, SECONDS = 0.05, 5.0
"""The estimate is corrected when this share of the first step's scoring is done, after at least this long: a process is slow at
first."""

NOTICEABLE = 1.25
"""A correction by less than this factor is not reported."""

CORRECTING_STEP = 2
"""After this many steps of a command, the last reported estimate is compared with the measurements for the last time."""


class Pace:
    def __init__(self, score_seconds: float, update_seconds: float, minutes: float, began: float) -> None:
        """The estimates for a step; minutes: the budget of this command, 0: none; began: its start (time.monotonic)."""
        self._began = began
        self._estimate = score_seconds + update_seconds
        self._update_seconds = update_seconds
        self._minutes = minutes
        self._measured: deque[float] = deque(maxlen=MEASURED)
        self._said = self._estimate
        self._early = False

    @property
    def step_seconds(self) -> float:
        return statistics.median(self._measured) if self._measured else self._estimate

    def outlook(self, steps: int) -> str:
        """How long a step and the remaining steps will take, in words."""
        return f"a step takes about {duration(self.step_seconds)} on this machine, {self.rest(steps)}"

    def rest(self, steps: int) -> str:
        """How long the remaining steps will take, in words."""
        return f"the remaining {count(steps, 'step')} about {duration(steps * self.step_seconds)}"

    def scored(self, share: float, seconds: float) -> bool:
        """`share` of a step's scoring took `seconds`. Whether to report a corrected estimate: at most once, in the first step."""
        if self._early or self._measured or share < SHARE or seconds < SECONDS:
            return False
        self._early = True
        self._estimate = seconds / share + self._update_seconds
        return self._noticeable()

    def stepped(self, seconds: float) -> bool:
        """A step took `seconds`. Whether to report a corrected estimate: at most once, after the second step."""
        self._measured.append(seconds)
        return len(self._measured) == CORRECTING_STEP and self._noticeable()

    def _noticeable(self) -> bool:
        noticeable = not 1 / NOTICEABLE < self.step_seconds / max(self._said, 1e-9) < NOTICEABLE
        if noticeable:
            self._said = self.step_seconds
        return noticeable

    @property
    def exhausted(self) -> bool:
        """Whether the next step would exceed the budget; never a command's first step, so resuming makes progress."""
        spent = time.monotonic() - self._began
        return bool(self._minutes and self._measured) and spent + self.step_seconds > 60 * self._minutes
