"""Advice if σ is so small that rounding removes it, or so large that perturbed models collapse."""

import contextlib
from collections.abc import Sequence

import numpy as np

from es_lite.algorithm import formats
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.noise.place import Place
from es_lite.fitness.base import Fitness
from es_lite.weights.layer_file import FileReader, LayerFile

SAMPLED = 4096
"""Elements of each tensor that are examined."""

SMALLEST_SHARE_MOVED = 0.5


def share_moved(files: Sequence[LayerFile], noise: NoiseKind, sigma: float, seed: int) -> float:
    """Share of the perturbed weights that σ changes in bfloat16, estimated from the first elements of each tensor."""
    moved, perturbed = 0.0, 0
    for file in files:
        with contextlib.closing(FileReader(file)) as reader:
            for tensor in file.layer.tensors:
                if tensor.sigma_factor == 0:
                    continue
                rows = -(-min(SAMPLED, tensor.size) // max(1, tensor.width))
                values = reader.part(tensor, 0, rows * tensor.width).float32()[:SAMPLED]
                weights = np.empty(values.size, np.uint16)
                formats.to_bf16(weights, values)
                out, place = np.empty_like(weights), Place(seed, 0, 0, tensor.number)
                noise.perturb(out, None, weights, place, sigma * tensor.sigma_factor, tensor.shape)
                moved += tensor.size * float(np.mean(out != weights))
                perturbed += tensor.size
    return moved / max(1, perturbed)


def rounding_advice(moved: float, sigma: float) -> str | None:
    """Advice if most perturbations are rounded away, else None; moved: from `share_moved`."""
    if moved >= SMALLEST_SHARE_MOVED:
        return None
    return (
        f"es.sigma = {sigma:g} changes only {moved:.0%} of the bf16 weights; the others round back to what they were, so scores "
        'mostly measure rounding: raise es.sigma (a tenth of the size of the weights is a lot), or set workers.compute = "fp32"'
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
