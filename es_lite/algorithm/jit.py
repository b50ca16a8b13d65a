"""How kernels are compiled, and how their work is divided among threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba

CHUNK = 2048
"""Elements that a kernel processes at a time: a multiple of 8; its buffers (28 KiB) fit a first-level cache."""

jit = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
"""Plain IEEE arithmetic: no fastmath. Compiled code is cached next to the module, or in the user's cache folder."""


class Threads:
    """Divides the elements of a kernel call among threads; their number does not change a bit of the result."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def each(self, size: int, work: Callable[[int, int], None], least: int = 16 * CHUNK) -> None:
        """Calls work(low, high) for ranges that cover 0 … size; a size below twice `least` is not divided."""
        if self._pool is None or size < 2 * least:
            work(0, size)
            return
        share = max(least, -(-size // self.count))
        list(self._pool.map(lambda low: work(low, min(low + share, size)), range(0, size, share)))
