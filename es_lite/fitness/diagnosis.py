"""Advice if σ is too small or too large, if all members score the same, and on how to spend a step's time."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from es_lite.algorithm import formats
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.place import Place
from es_lite.fitness.base import Fitness
from es_lite.model.layout import Tensor
from es_lite.model.source import Source
from es_lite.weights.layer_file import FileReader, LayerFile

GROUPS, ROWS, ELEMENTS = 8, 16, 4096
"""What is examined of a tensor: groups of consecutive rows, the least rows of each, and the least elements of all together."""

SMALLEST_SHARE_MOVED = 0.5

MOST_TIED, MOST_SIGNAL = 0.5, 0.7
"""Above these, a step's time is better spent on more items, or on more members."""


def share_moved(files: Sequence[LayerFile], noise: NoiseKind, sigma: float, seed: int) -> float:
    """Share of the perturbed weights that σ changes in bfloat16, estimated from some rows of each tensor.

    Under low-rank noise a linear map's weights stay as they are, and what is rounded is its outputs; but whether σ is large
    enough for bfloat16 is told as well by the weights as they would be.
    """
    examined: list[Examined] = []
    for file in files:
        with contextlib.closing(FileReader(file)) as reader:
            examined += _examined(file.layer.tensors, lambda *rows, reader=reader: reader.part(*rows).float32())
    return _share_moved(examined, noise, sigma, seed)


def least_sigma(tensors: Sequence[Tensor], theta_0: Source, noise: NoiseKind, seed: int) -> float:
    """The least σ, a power of two, that changes most of θ₀'s perturbed weights in bfloat16; 0 if none does."""
    examined = list(_examined(tensors, theta_0.read))
    for exponent in range(-24, 1):
        if _share_moved(examined, noise, 2.0**exponent, seed) >= SMALLEST_SHARE_MOVED:
            return 2.0**exponent
    return 0.0


Examined = tuple[Tensor, int, np.ndarray]
"""Weights of a tensor from an element on, as bfloat16 bits, uint16 [n]."""


def _examined(tensors: Sequence[Tensor], read: Callable[[Tensor, int, int], np.ndarray]) -> Iterator[Examined]:
    """What is examined of the perturbed tensors. read: float32 [count] of a tensor from an element on."""
    for tensor in tensors:
        for start, count in examined_rows(tensor) if tensor.sigma_factor and tensor.size else ():
            weights = np.empty(count, np.uint16)
            formats.to_bf16(weights, read(tensor, start, count))
            yield tensor, start, weights


def _share_moved(examined: Sequence[Examined], noise: NoiseKind, sigma: float, seed: int) -> float:
    moved, perturbed = 0.0, 0
    for _, group in itertools.groupby(examined, key=lambda rows: rows[0].name):
        changed, count = 0, 0
        for tensor, start, weights in group:
            out, place = np.empty_like(weights), Place(seed, 0, 0, tensor.number)
            noise.perturb(out, None, weights, place, sigma * tensor.sigma_factor, tensor.shape, start=start)
            changed += int(np.count_nonzero(out != weights))
            count += weights.size
        moved += tensor.size * changed / count
        perturbed += tensor.size
    return moved / max(1, perturbed)


def examined_rows(tensor: Tensor) -> list[tuple[int, int]]:
    """(start, count) of the elements that are examined: groups of whole rows, from the first to the last; or all elements.

    Many rows, as all elements of a row share what low-rank noise draws for it; groups of them, as reads are slow.
    """
    rows = max(ROWS, -(-ELEMENTS // (GROUPS * tensor.width)))
    if GROUPS * rows >= tensor.rows:
        return [(0, tensor.size)]
    return [(group * (tensor.rows - rows) // (GROUPS - 1) * tensor.width, rows * tensor.width) for group in range(GROUPS)]


def rounding_advice(moved: float, sigma: float) -> str | None:
    """Advice if most perturbations are rounded away, else None; moved: from `share_moved`."""
    if moved >= SMALLEST_SHARE_MOVED:
        return None
    return (
        f"es.sigma = {sigma:g} is too small for bf16, in which only {moved:.0%} of the perturbed weights would differ from what "
        "they were, so scores mostly measure rounding: in another run, raise es.sigma (a tenth of a typical weight is a lot "
        'already), or set workers.compute = "fp32"'
    )


def collapse_advice(fitness: Fitness, centre: float, scores: np.ndarray, sigma: float) -> str | None:
    """Advice if members score far below θ on the same items, else None; centre: θ's score; scores: float64 [N]."""
    if not np.isfinite(centre):
        return 'the unperturbed model\'s own score is not finite: the model is broken, or it needs workers.compute = "fp32"'
    finite = scores[np.isfinite(scores)]
    lost = centre - float(finite.mean()) if finite.size else float("inf")
    if lost <= fitness.largest_loss:
        return None
    return (
        f"es.sigma = {sigma:g} is too large: perturbed models score {lost:.2f} {fitness.unit} below the unperturbed one "
        f"({centre:.2f}), so far from it that they say little about how to improve it: in another run, lower es.sigma, by a "
        f"factor of 2 to 4 at a time, until the difference is below {fitness.largest_loss / 5:g}"
    )


def tied_advice(fitness: Fitness, score: float) -> str:
    """Advice if all members score the same."""
    if fitness.generates:
        return (
            f"all members earn the same ({score:g}), so the step moves nothing: take easier prompts, more of them "
            "(fitness.samples), a reward that also pays for part of the way, or a larger es.sigma"
        )
    return (
        f"all members score the same ({score:g}), so the step moves nothing: es.sigma changes nothing (it is too small, or "
        "es.groups makes it 0), or the model has collapsed (es.alpha or es.sigma was far too large): change them and start again"
    )


def budget_advice(signal: float | None, tied: float, samples: int, population: int) -> str | None:
    """Advice if the same time is better spent on more items or on more members, else None.

    signal: the share of the spread of scores that items agree on; tied: the share of members whose score equals another's.
    """
    if tied >= MOST_TIED:
        return (
            f"{tied:.0%} of the members have the score of another one, so the step cannot tell them apart: take more items "
            f"(fitness.samples = {2 * samples}), or a reward with more shades, even if there are fewer members (es.population)"
        )
    if signal is not None and signal >= MOST_SIGNAL and samples > 2:
        return (
            f"items agree on {signal:.0%} of the spread of the scores: with half the items (fitness.samples = {samples // 2}) "
            f"and twice the members (es.population = {2 * population}), a step takes about as long and learns more"
        )
    return None
