"""Is σ of a useful size? Advice where rounding swallows it, or where the perturbed models collapse."""

from collections.abc import Sequence

import numpy as np

from es_lite.algorithm import formats, kernels
from es_lite.weights.layerfile import FileReader, LayerFile

SAMPLED = 4096
"""Elements looked at in each tensor."""

LEAST_MOVED = 0.5
MOST_LOST_NATS = 0.5


def share_moved(files: Sequence[LayerFile], sigma: float, seed: int) -> float:
    """Share of the perturbed weights that σ changes in bfloat16, estimated from each tensor's first elements in its file."""
    moved, perturbed = 0.0, 0
    for file in files:
        with FileReader(file) as reader:
            for tensor in file.layer.tensors:
                if tensor.sigma == 0:
                    continue
                values = reader.part(tensor, 0, min(SAMPLED, tensor.size)).float32()
                weights = np.empty(values.size, np.uint16)
                formats.to_bf16(weights, values)
                out = np.empty_like(weights)
                kernels.perturb(out, None, weights, seed=seed, step=0, pair=0, tensor=tensor.number, sigma=sigma * tensor.sigma)
                moved += tensor.size * float(np.mean(out != weights))
                perturbed += tensor.size
    return moved / max(1, perturbed)


def rounding_advice(moved: float, sigma: float) -> str | None:
    """What to say where most perturbations are rounded away; `moved` is from `share_moved`."""
    if moved >= LEAST_MOVED:
        return None
    return (
        f"es.sigma = {sigma:g} moves only {moved:.0%} of the bf16 weights, the rest rounds back to where it was, so scores "
        'mostly tell of rounding: raise es.sigma (a tenth of the weights\' own size is a lot), or set workers.compute = "fp32"'
    )


def collapse_advice(centre: float, scores: np.ndarray, sigma: float) -> str | None:
    """What to say where the members score far below θ itself on the same samples; centre: θ's score, scores: float64 [N]."""
    if not np.isfinite(centre):
        return "the unperturbed model's own score is not finite: the model, or the type it is computed in, is broken"
    finite = scores[np.isfinite(scores)]
    lost = centre - float(finite.mean()) if finite.size else float("inf")
    if lost <= MOST_LOST_NATS:
        return None
    return (
        f"es.sigma = {sigma:g} is too large: perturbed models score {lost:.2f} nats a token below the unperturbed one "
        f"({centre:.2f}), where they tell little of its neighbourhood: lower es.sigma, by 2 to 4 at a time, until the loss is "
        "under 0.1"
    )
