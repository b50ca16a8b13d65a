"""Measures this machine's speed, and estimates a step's duration."""

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from es_lite import system
from es_lite.algorithm.noise.kinds import kind_of
from es_lite.algorithm.noise.place import Place
from es_lite.engine.base import Execution
from es_lite.files import open_file, write_fully

DISK_BYTES = 256 * 2**20
"""Bytes written and read back to measure a disk."""

MATRIX, ROWS = 2**20, 512
"""Scoring is measured on matrices of at most this many elements, and this many rows of hidden states: a few megabytes."""

ENOUGH_SECONDS = 0.3
"""A measurement is not repeated after this long."""


@dataclass(frozen=True)
class Work:
    """What a step does."""

    flops: float
    """Operations of scoring's matrix products, at most."""
    scoring_noise: int
    """Noise elements drawn while scoring; likewise in the update."""
    update_noise: int
    read_bytes: int
    """Read from the layers' files (from the disk, or from its cache if memory has room)."""
    written_bytes: int
    hidden: int
    """Width of the model's hidden states, and of its MLPs."""
    intermediate: int
    rows: int
    """Tokens that pass a layer together."""


@dataclass(frozen=True)
class Estimate:
    score_seconds: float
    update_seconds: float
    rates: str
    """The measured rates, in words."""

    @property
    def step_seconds(self) -> float:
        return self.score_seconds + self.update_seconds


def estimate(work: Work, execution: Execution, noise: str, run_dir: Path) -> Estimate:
    """A step's duration on this machine; measuring takes about a second. noise: its kind."""
    scoring, drawing = scoring_rate(work, execution), noise_rate(noise)
    system.trim_memory()
    lanes = execution.workers * execution.threads
    words = f"scoring {scoring / 1e9:.0f} GFLOP/s per worker, noise {drawing / 1e6:.0f} M elements/s per thread"
    perturbing = drawing * lanes
    if execution.device != "cpu":
        perturbing = device_noise_rate(noise, execution.device)
        words += f" and {perturbing / 1e6:.0f} on the device"
    score = work.flops / (scoring * execution.workers) + work.scoring_noise / perturbing
    update = work.update_noise / (drawing * lanes)
    if execution.direct:
        try:
            read, write = disk_rates(run_dir)
        except OSError as error:
            return Estimate(score, update, f"{words}; the disk could not be measured ({error.strerror})")
        disk = work.read_bytes / read + work.written_bytes / write
        words += (
            f"; disk {read / 1e9:.1f} GB/s read, {write / 1e9:.1f} written: {disk:.0f} s for transfers, "
            f"{score + update:.0f} s for computation, at the same time"
        )
        score = max(score, disk - update)
    return Estimate(score, update, words)


def scoring_rate(work: Work, execution: Execution) -> float:
    """FLOP/s of one worker, measured on an MLP of the model's width with norm and activation."""
    torch.set_num_threads(execution.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[execution.compute]
    device = torch_device(execution.device)
    width, rows = min(work.hidden, MATRIX // 64), min(work.rows, ROWS)
    inner = max(1, min(work.intermediate, MATRIX // width))
    states = torch.randn(rows, width, device=device).to(dtype)
    gate, up, down = (torch.randn(shape, device=device).to(dtype) for shape in ((inner, width), (inner, width), (width, inner)))

    def mlp() -> None:
        normed = functional.rms_norm(states.float(), (width,)).to(dtype)
        inside = functional.silu(functional.linear(normed, gate)) * functional.linear(normed, up)
        (states + functional.linear(inside, down))[0, 0].item()  # waits for a GPU

    with torch.inference_mode():
        rate = 6 * rows * width * inner / _fastest(mlp)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the workers need it
    return rate


def noise_rate(noise: str) -> float:
    """Elements per second that one thread perturbs, in bfloat16."""
    weights, out = np.zeros(2**21, np.uint16), np.empty(2**21, np.uint16)
    kind, place = kind_of(noise), Place(0, 0, 0, 0)
    return out.size / _fastest(
        lambda: kind.perturb(out, None, weights, place, 1e-3, (2**11, 2**10))
    )


def device_noise_rate(noise: str, device: str) -> float:
    """Elements per second that a device draws."""
    kind, place = kind_of(noise), Place(0, 0, 0, 0)
    elements = torch.arange(2**20, device=torch_device(device))
    return elements.numel() / _fastest(lambda: kind.epsilon_on_device(elements, place)[0].item())  # item() waits for a GPU


def torch_device(device: str) -> torch.device:
    """The device that workers.device means."""
    return torch.device("cuda" if device == "cuda" else "cpu")


def disk_rates(folder: Path) -> tuple[float, float]:
    """(read, write): bytes per second past the page cache on the disk of `folder`, which need not exist. Raises OSError."""
    place = folder.absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.is_dir())
    path, size = existing / f".es_lite-{os.getpid()}", 16 * 2**20
    view = memoryview(mmap.mmap(-1, size))
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT, direct=True)
    path.unlink()  # it vanishes with the process, whatever happens

    def rate(act: Callable[[int], object]) -> float:
        start = time.perf_counter()
        for offset in range(0, DISK_BYTES, size):
            act(offset)
        os.fsync(descriptor)
        return DISK_BYTES / (time.perf_counter() - start)

    try:
        write = rate(lambda offset: write_fully(descriptor, view, offset))
        read = rate(lambda offset: os.preadv(descriptor, [view], offset))
    finally:
        os.close(descriptor)
    return read, write


def _fastest(work: Callable[[], object]) -> float:
    seconds: list[float] = []
    while len(seconds) < 4 and sum(seconds[1:]) < ENOUGH_SECONDS:  # the first one warms up
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
