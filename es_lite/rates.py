"""How fast this machine is, measured here and now, and what that makes of a plan."""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from es_lite.algorithm import kernels
from es_lite.weights.rawio import open_file, write_fully

if TYPE_CHECKING:
    from es_lite.plan import Plan

DISK_BYTES = 256 * 2**20
"""Written and read back where the layers will be."""


def estimate_seconds(plan: "Plan", run_dir: Path) -> tuple[float, str]:
    """Seconds of a step, with the rates that they come from in words."""
    gemm, noise = gemm_rate(plan.threads, plan.compute), noise_rate()
    lanes = plan.workers * plan.threads
    compute = plan.flops / (0.5 * gemm * plan.workers) + plan.noise_elements / (noise * lanes)
    words = f"{gemm / 1e9:.0f} GFLOP/s a worker, half of it reached; {noise / 1e6:.0f} M noise elements/s a thread"
    if not plan.direct:
        return compute, words
    read, write = disk_rates(run_dir)
    disk = plan.read_bytes / read + plan.written_bytes / write
    words += f"; disk {read / 1e9:.1f} GB/s read, {write / 1e9:.1f} written, {disk:.0f} s beside {compute:.0f} s of computation"
    return max(compute, disk), words


def gemm_rate(threads: int, compute: str) -> float:
    """FLOP/s of this process on 2048×1024×4096."""
    torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[compute]
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
    return 2 * 2048 * 1024 * 4096 / _fastest(lambda: torch.nn.functional.linear(a, b))


def noise_rate() -> float:
    """Elements a second of one thread, into bfloat16."""
    weights, out = np.zeros(2**22, np.uint16), np.empty(2**22, np.uint16)
    return out.size / _fastest(lambda: kernels.perturb(out, None, weights, seed=0, step=0, pair=0, tensor=0, sigma=1e-3))


def disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second that a plain direct read and write reach on the disk of `folder` (or of where it will be)."""
    place = folder.absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.is_dir())
    size = 16 * 2**20
    view = memoryview(mmap.mmap(-1, size))
    with tempfile.TemporaryDirectory(prefix=".es_lite-", dir=existing) as temporary:
        path = Path(temporary) / "rate"

        def each(flags: int, act: Callable[[int, int], object]) -> float:
            descriptor = open_file(path, flags, direct=True)
            start = time.perf_counter()
            for offset in range(0, DISK_BYTES, size):
                act(descriptor, offset)
            os.fsync(descriptor)
            seconds = time.perf_counter() - start
            os.close(descriptor)
            return DISK_BYTES / seconds

        write = each(os.O_WRONLY | os.O_CREAT, lambda descriptor, offset: write_fully(descriptor, view, offset))
        read = each(os.O_RDONLY, lambda descriptor, offset: os.preadv(descriptor, [view], offset))
    return read, write


def _fastest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
