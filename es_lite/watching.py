"""Measures something again and again in the background, such as the memory of all processes."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Self

from es_lite.system import pss_bytes


class Watcher:
    """Calls `look` repeatedly, in a background thread, while the `with` block runs."""

    def __init__(self, name: str, look: Callable[[], object], every_seconds: float, share: float) -> None:
        """share: of a core, used at most."""
        self._look = look
        self._every_seconds, self._share = every_seconds, share
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        seconds = 0.0
        while not self._stop.wait(seconds):
            began = time.perf_counter()
            with contextlib.suppress(Exception):  # a failed measurement must not end the run
                self._look()
            seconds = max(self._every_seconds, (time.perf_counter() - began) / self._share)


class PeakPss(Watcher):
    """The highest PSS of a changing set of processes.

    Attributes:
        peak_bytes: the highest PSS measured so far; last_bytes: the last.
    """

    def __init__(self, pids: Callable[[], list[int]], every_seconds: float = 0.5) -> None:
        super().__init__("peak-pss", self.sample, every_seconds, share=0.02)  # the kernel walks every page table
        self.peak_bytes = self.last_bytes = 0
        self._pids = pids
        self._lock = threading.Lock()

    def sample(self) -> int:
        """Measures the PSS now."""
        now = pss_bytes(self._pids())
        with self._lock:
            self.last_bytes, self.peak_bytes = now, max(self.peak_bytes, now)
        return now
