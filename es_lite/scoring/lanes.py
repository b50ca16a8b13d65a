"""Concurrent computations on the same weights in one process: the tiles of a layer."""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from es_lite.algorithm.jit import Threads


class Lanes:
    """`count` lanes of `threads` threads each. Their number does not change a bit of the results."""

    def __init__(self, count: int, threads: int) -> None:
        self.count = count
        self.threads = Threads(threads)
        """For kernels within a lane."""
        self.all_threads = self.threads if count == 1 else Threads(count * threads)
        """For kernels that all lanes wait for."""
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._pool = None
        torch.set_num_threads(threads)
        if count > 1:
            for lane in range(count):
                self._free.put(lane)
            self._pool = ThreadPoolExecutor(count, "lane", torch.set_num_threads, (threads,))

    def run(self, work: Sequence[Callable[[int], None]]) -> None:
        """Calls each with the number of a lane that it has to itself; returns when all are done."""
        if self._pool is None:
            for call in work:
                call(0)
            return
        futures = [self._pool.submit(self._call, call) for call in work]
        wait(futures)  # for all, also if one raises: they use what the caller then frees
        for future in futures:
            future.result()

    def _call(self, call: Callable[[int], None]) -> None:
        lane = self._free.get()
        try:
            with torch.inference_mode():
                call(lane)
        finally:
            self._free.put(lane)
