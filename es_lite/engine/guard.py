"""The memory guard: how much is left under every limit, watched while a run is under way."""

from collections.abc import Callable

from es_lite import system
from es_lite.watching import Watcher

SHORT, CRITICAL = 0.02, 0.008
"""Shares of a limit: with less left, a worker is stopped after its task (short), or immediately (critical)."""

LEAST_SHORT, LEAST_CRITICAL = 48 * 2**20, 16 * 2**20
"""Fewer bytes left are short or critical whatever the limit."""

EVERY_SECONDS = 0.2


class Guard(Watcher):
    """Watches the cgroups, the machine's memory and the recipe's own limit.

    Attributes:
        short: so little is left that one worker should be stopped.
        critical: so little is left that the kernel may kill processes at any moment.
        reason: in words, which limit is nearest and what it leaves.
    """

    def __init__(self, limit_bytes: int, used_bytes: Callable[[], int]) -> None:
        """limit_bytes: the recipe's memory.limit, 0 if there is none; used_bytes: what the run's processes use of it."""
        super().__init__("memory-guard", self.measure, EVERY_SECONDS, share=0.5)
        self.short = self.critical = False
        self.reason = ""
        self._limit = limit_bytes
        self._used = used_bytes
        self._kills = system.oom_kills()

    def measure(self) -> None:
        """Measures now, and sets the attributes."""
        limits = [(left, left.bytes + used) for left, used in system.memory_usage()]
        if self._limit:
            limits.append((system.MemoryLimit(max(0, self._limit - self._used()), "memory.limit of the recipe"), self._limit))
        # The limit that is nearest to being short.
        left, total = min(limits, key=lambda pair: pair[0].bytes / max(LEAST_SHORT, SHORT * pair[1]))
        self.reason = f"{left.bytes / 2**20:.0f} MiB left of {total / 2**20:.0f} ({left.source})"
        self.critical = left.bytes < max(LEAST_CRITICAL, CRITICAL * total)
        self.short = left.bytes < max(LEAST_SHORT, SHORT * total)

    def killed(self) -> bool:
        """Whether the kernel has killed a process of this cgroup for lack of memory since the last call."""
        before, self._kills = self._kills, system.oom_kills()
        return self._kills > before
