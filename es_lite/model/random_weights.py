"""Random θ₀, a function of the run's seed."""

import copy
import hashlib
import math

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise import gaussian, philox
from es_lite.algorithm.noise.place import INITIALISATION, Place
from es_lite.errors import UserError
from es_lite.model.buffers import persistent_buffers, stored
from es_lite.model.initialisation import Drawn, Initialisation, Stretch
from es_lite.model.layout import Layout, Tensor


class Random:
    """θ₀ as the architecture initialises it: its own deviations, ranges and constants, drawn from the run's seed.

    What is drawn of a tensor comes from (seed, INITIALISATION, pair 0, its position among the layout's tensors).
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, seed: int, threads: Threads) -> None:
        """model: a `layout.skeleton`. Raises UserError if it is not known how one of the tensors is initialised."""
        self._seed = seed
        self._threads = threads
        initialisation = Initialisation(model, seed)
        self._stretches = {tensor.name: initialisation.of(tensor.name) for tensor in layout.tensors}
        self._numbers = {tensor.name: number for number, tensor in enumerate(layout.tensors)}
        digest = hashlib.sha256(f"{philox.VERSION} 2 {seed} {layout.structure()}".encode())
        for name, stretches in self._stretches.items():
            for stretch in stretches:
                how = repr(stretch.how) if isinstance(stretch.how, Drawn) else stretch.how.numbers.tobytes().hex()
                digest.update(f"{name} {stretch.start} {stretch.count} {how}\n".encode())
        for name, value in persistent_buffers(model).items():
            digest.update(f"{name} {value.dtype}".encode() + stored(value))
        self._fingerprint = digest.hexdigest()

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        out = np.empty(count, np.float32)
        place = Place(self._seed, INITIALISATION, 0, self._numbers[tensor.name])
        for stretch in self._stretches[tensor.name]:
            first, last = max(start, stretch.start), min(start + count, stretch.start + stretch.count)

            def part(low: int, high: int, stretch: Stretch = stretch, first: int = first) -> None:
                own = first - stretch.start
                out[first - start + low : first - start + high] = stretch.how.values(place, own + low, high - low)

            if first < last:
                self._threads.each(last - first, part)
        return out

    def fingerprint(self) -> str:
        return self._fingerprint


class FirstRandom:
    """θ₀ of the first version, which runs that began with it go on with: matrices N(0, initializer_range²), vectors constant.

    A matrix is initializer_range·ε(seed, INITIALISATION, pair 0, its position among the layout's tensors).
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, seed: int, threads: Threads) -> None:
        self._seed = seed
        self._threads = threads
        config = model.config.get_text_config()
        self._deviation = getattr(config, "initializer_range", 0.02)
        self._constants = {t.name: _initial_constant(model, t.name) for t in layout.tensors if len(t.shape) < 2}
        drawn_from = f"{philox.VERSION} {seed} {self._deviation} {sorted(self._constants.items())} {layout.structure()}"
        self._fingerprint = hashlib.sha256(drawn_from.encode()).hexdigest()
        self._numbers = {tensor.name: number for number, tensor in enumerate(layout.tensors)}

    def read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        if tensor.name in self._constants:
            return np.full(count, self._constants[tensor.name], np.float32)
        out = np.empty(count, np.float32)
        place = Place(self._seed, INITIALISATION, 0, self._numbers[tensor.name])

        def part(low: int, high: int) -> None:
            gaussian.fill(out[low:high], place, self._deviation, start=start + low)

        self._threads.each(count, part)
        return out

    def fingerprint(self) -> str:
        return self._fingerprint


def _initial_constant(model: PreTrainedModel, name: str) -> float:
    """The value to which the architecture initialises a vector: mostly 1 or 0."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        return 0.0  # the bias of a linear map
    fresh: nn.Module = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in fresh.parameters(recurse=False):
            parameter.fill_(math.nan)
        model._init_weights(fresh)
    value = float(fresh.get_parameter(attribute).flatten()[0])
    if not math.isfinite(value):
        raise UserError(
            f"{type(model).__name__}: es_lite does not know how {name} is initialised; give model.path instead of model.config"
        )
    return value


VERSIONS: dict[int, type[FirstRandom] | type[Random]] = {1: FirstRandom, 2: Random}
"""By the version that a journal's header names."""

NEWEST = 2
