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
from es_lite.algorithm import formats
from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.lowrank import LowRank
from es_lite.algorithm.noise.place import Place
from es_lite.engine.base import Execution
from es_lite.files import open_file, write_fully
from es_lite.scoring.factors import LowRankFactors, MemberRows

DISK_BYTES = 256 * 2**20
"""Bytes written and read back to measure a disk."""

MATRIX, ROWS = 2**20, 512
"""Scoring is measured on matrices of at most this many elements, and this many rows of hidden states: a few megabytes."""

ALONE = MemberRows(signs=(1,))
"""Rows of one member."""

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
    converted: int
    """Elements converted to the compute type for all members together."""
    size: int
    """Parameters."""
    pairs: int
    """Whose noise the update sums."""
    rounded: int
    """Elements that the update rounds stochastically."""
    redrawn: int
    """Elements of a random θ₀ that an anchored update draws again."""
    read_bytes: int
    """Read from the layers' files and, by an anchored update, θ₀'s (from the disk, or from its cache if memory has room)."""
    written_bytes: int
    hidden: int
    """Width of the model's hidden states, and of its MLPs."""
    intermediate: int
    rows: int
    """Tokens that pass a layer together."""


@dataclass(frozen=True)
class StepTime:
    score_seconds: float
    update_seconds: float
    rates: str
    """The measured rates, in words."""

    @property
    def step_seconds(self) -> float:
        return self.score_seconds + self.update_seconds


def step_time(work: Work, execution: Execution, noise: NoiseKind, run_dir: Path) -> StepTime:
    """A step's duration on this machine; measuring takes about a second, and longer if the disk is measured too."""
    scoring, drawing = scoring_rate(work, execution, noise.RANK), noise_rate(noise)
    summing, converting, rounding = sum_seconds(noise, work.pairs), conversion_rate(), noise_rate(gaussian)
    system.trim_memory()
    lanes = execution.workers * execution.threads
    words = f"scoring {scoring / 1e9:.0f} GFLOP/s per worker, noise {drawing / 1e6:.0f} M elements/s per thread"
    perturbing = drawing * lanes
    if execution.device != "cpu":
        perturbing = device_noise_rate(noise, execution.device)
        words += f" and {perturbing / 1e6:.0f} on the device"
    score = work.flops / (scoring * execution.workers) + work.scoring_noise / perturbing + work.converted / (converting * lanes)
    update = (work.size * summing + (work.rounded + work.redrawn) / rounding) / lanes
    if execution.direct:
        try:
            read, write = disk_rates(run_dir)
        except OSError as error:
            return StepTime(score, update, f"{words}; the disk could not be measured ({error.strerror})")
        disk = work.read_bytes / read + work.written_bytes / write
        words += (
            f"; disk {read / 1e9:.1f} GB/s read, {write / 1e9:.1f} written: {disk:.0f} s for transfers, "
            f"{score + update:.0f} s for computation, at the same time"
        )
        score = max(score, disk - update)
    return StepTime(score, update, words)


def scoring_rate(work: Work, execution: Execution, rank: int) -> float:
    """FLOP/s of one worker, measured on an MLP of the model's width with norm and activation.

    rank: of the noise; its corrections count as time, not as FLOP.
    """
    torch.set_num_threads(execution.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[execution.compute]
    device, threads = torch_device(execution.device), Threads(execution.threads)
    kernels = execution.device == "cpu"
    width, rows = min(work.hidden, MATRIX // 64), min(work.rows, ROWS)
    inner = max(1, min(work.intermediate, MATRIX // width))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    states, shapes = random(rows, width), ((inner, width), (inner, width), (width, inner))
    matrices = [random(*shape) for shape in shapes]
    factors = [LowRankFactors(random(1, shape[1], rank), random(1, rank, shape[0]), kernels) for shape in shapes]

    def linear(which: int, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, matrices[which])
        if rank:
            factors[which].add(y, factors[which].project(x, ALONE, threads), ALONE, threads)
        return y

    def mlp() -> None:
        normed = functional.rms_norm(states.float(), (width,)).to(dtype)
        inside = functional.silu(linear(0, normed)) * linear(1, normed)
        (states + linear(2, inside))[0, 0].item()  # waits for a GPU

    with torch.inference_mode():
        rate = 6 * rows * width * inner / _fastest(mlp)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the workers need it
    return rate


def noise_rate(noise: NoiseKind) -> float:
    """Elements of noise per second that one thread draws for a perturbation, applied to bfloat16 if they are drawn in full."""
    shape, place = (2**11, 2**10), Place(0, 0, 0, 0)
    if isinstance(noise, LowRank):
        many = (2**20 // noise.RANK, 2**20 // noise.RANK)
        return noise.drawn(many) / _fastest(lambda: noise.factors(place, many))
    weights, out = np.zeros(2**21, np.uint16), np.empty(2**21, np.uint16)
    return out.size / _fastest(lambda: noise.perturb(out, None, weights, place, 1e-3, shape))


def sum_seconds(noise: NoiseKind, pairs: int) -> float:
    """Seconds that one thread takes per parameter for the update's sum over so many pairs."""
    shape, place, some = (2**10, 2**10), Place(0, 0, 0, 0), min(pairs, 8)
    out = np.empty(noise.block(shape), np.float32)
    numbers, coefficients = np.arange(some, dtype=np.uint32), np.ones(some, np.float32)
    seconds = _fastest(lambda: noise.weighted_sum(out, place, numbers, coefficients, shape))
    return seconds / out.size * pairs / some


def conversion_rate() -> float:
    """Elements per second that one thread converts from int8 to bfloat16."""
    stored, out, scales = np.zeros(2**21, np.int8), np.empty(2**21, np.uint16), np.ones(2**11, np.float32)
    return out.size / _fastest(lambda: formats.dequantise(out, stored, scales=scales, width=2**10, start=0))


def device_noise_rate(noise: NoiseKind, device: str) -> float:
    """Elements of noise per second that a device draws."""
    place, there = Place(0, 0, 0, 0), torch_device(device)
    if isinstance(noise, LowRank):
        many = (2**20 // noise.RANK, 2**10)
        seconds = _fastest(lambda: noise.factors_on_device(place, many, there)[0][0, 0].item())  # item() waits for a GPU
        return noise.drawn(many) / seconds
    elements = torch.arange(2**20, device=there)
    return elements.numel() / _fastest(lambda: noise.epsilon_on_device(elements, place, (2**20,))[0].item())


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
