"""Advice if σ is so small that rounding removes it, or so large that perturbed models collapse."""

import contextlib
from collections.abc import Sequence

import numpy as np

from es_lite.algorithm import formats
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.place import Place
from es_lite.fitness.base import Fitness
from es_lite.model.layout import Tensor
from es_lite.weights.layer_file import FileReader, LayerFile

GROUPS, ROWS, ELEMENTS = 8, 16, 4096
"""What is examined of a tensor: groups of consecutive rows, the least rows of each, and the least elements of all together."""

SMALLEST_SHARE_MOVED = 0.5


def share_moved(files: Sequence[LayerFile], noise: NoiseKind, sigma: float, seed: int) -> float:
    """Share of the perturbed weights that σ changes in bfloat16, estimated from some rows of each tensor.

    Under low-rank noise a linear map's weights stay as they are, and what is rounded is its outputs; but whether σ is large
    enough for bfloat16 is told as well by the weights as they would be.
    """
    moved, perturbed = 0.0, 0
    for file in files:
        with contextlib.closing(FileReader(file)) as reader:
            for tensor in file.layer.tensors:
                if tensor.sigma_factor == 0 or not tensor.size:
                    continue
                place, changed, examined = Place(seed, 0, 0, tensor.number), 0, 0
                for start, count in examined_rows(tensor):
                    weights = np.empty(count, np.uint16)
                    formats.to_bf16(weights, reader.part(tensor, start, count).float32())
                    out = np.empty_like(weights)
                    noise.perturb(out, None, weights, place, sigma * tensor.sigma_factor, tensor.shape, start=start)
                    changed += int(np.count_nonzero(out != weights))
                    examined += count
                moved += tensor.size * changed / examined
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
        "they were, so scores mostly measure rounding: raise es.sigma (a tenth of the size of the weights is a lot), or set "
        'workers.compute = "fp32"'
    )


def collapse_advice(fitness: Fitness, centre: float, scores: np.ndarray, sigma: float) -> str | None:
    """Advice if members score far below θ on the same items, else None; centre: θ's score; scores: float64 [N]."""
    if not np.isfinite(centre):
        return "the unperturbed model's own score is not finite: the model is broken, or it cannot be computed in this type"
    finite = scores[np.isfinite(scores)]
    lost = centre - float(finite.mean()) if finite.size else float("inf")
    if lost <= fitness.largest_loss:
        return None
    return (
        f"es.sigma = {sigma:g} is too large: perturbed models score {lost:.2f} {fitness.unit} below the unperturbed one "
        f"({centre:.2f}), so far from it that they say little about how to improve it: lower es.sigma, by a factor of 2 to 4 at "
        f"a time, until the difference is below {fitness.largest_loss / 5:g}"
    )


def tied_advice(fitness: Fitness, score: float) -> str:
    """Advice if all members score the same."""
    if fitness.generates:
        return (
            f"all members earn the same ({score:g}), so the step moves nothing: take easier prompts, more of them "
            "(fitness.samples), a reward that also pays for part of the way, or a larger es.sigma"
        )
    return (
        f"all members score the same ({score:g}), so the step moves nothing: es.sigma changes nothing (too small, or 0 for all "
        "that matters), or the model has collapsed (es.alpha or es.sigma was far too large): change them and start again"
    )
