"""How kernels are compiled, and how their work is divided among threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba

from es_lite.compiled import temporary_cache

CHUNK = 2048
"""Elements that a kernel processes at a time: a multiple of 8; its buffers (28 KiB) fit a first-level cache."""

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}


def jit(function: Any) -> Any:
    """Compiles a kernel, in plain IEEE arithmetic: no fastmath.

    Compiled code is cached next to the module, or in the user's cache folder. Where neither can be written, as in a container
    under another user, it is cached in a temporary folder for this command and its workers or, if there is none, not at all.
    """
    for _ in range(2):
        try:
            return numba.njit(cache=True, **_OPTIONS)(function)
        except RuntimeError:  # no place for the cache
            if not temporary_cache():
                break
    return numba.njit(**_OPTIONS)(function)


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
