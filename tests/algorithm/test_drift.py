"""The distance from θ₀ that follows from records, compared with the real one."""

import math

import numpy as np
import pytest
from layers import ALONE, Arrays, layout_of, records
from plain import EVERY_KIND

from es_lite.algorithm.drift import Drift
from es_lite.algorithm.noise.kinds import NoiseKind
from es_lite.algorithm.record import Record
from es_lite.weights.parts import Part


def real(history: list[Record], decayed: bool = False) -> float:
    """The root mean square of θ_t - θ₀. decayed: of θ_t - θ₀·Π(1 - δ)."""
    theta_0, squares = Arrays(layout_of("untied")), 0.0
    for tensor in layout_of("untied").tensors:
        start = theta_0.values[tensor.name].copy()
        found = start.copy()
        Part(tensor, 0, found).advance(history, ALONE, theta_0.read)
        kept = math.prod(1 - record.decay * tensor.decay_factor for record in history) if decayed else 1.0
        squares += float(np.sum((found.astype(np.float64) - kept * start) ** 2))
    return math.sqrt(squares / layout_of("untied").size)


def drift(history: list[Record]) -> float:
    found = Drift(layout_of("untied").factor_shares())
    for record in history:
        found.add(record)
    return found.rms


def test_it_is_0_at_first():
    assert drift([]) == 0


@EVERY_KIND
def test_it_is_the_real_distance_on_a_small_model(noise: NoiseKind):
    """Of which some groups are frozen or have factors of their own."""
    random = np.random.default_rng(0)
    history = [
        Record(step, 3, 1e-2, True, 0.0, tuple(map(float, random.standard_normal(8).astype(np.float32))), noise.NAME, noise.RANK)
        for step in range(30)
    ]
    assert drift(history) == pytest.approx(real(history), rel=0.03)


def test_decays_make_it_smaller_as_they_do_the_real_distance():
    """Steps of all kinds, every third without decay."""
    anchored, decayed, plain = records(12, anchored=True), records(12), records(12)
    assert drift(anchored) == pytest.approx(real(anchored), rel=0.03)
    assert drift(decayed) == pytest.approx(real(decayed, decayed=True), rel=0.03)
    plain = [Record(r.step, r.seed, r.sigma, r.antithetic, 0.0, r.coefficients, r.kind, r.rank) for r in plain]
    assert drift(anchored) < 0.8 * drift(plain)


def test_the_shares_of_the_parameters_add_up_to_1():
    shares = layout_of("untied").factor_shares()
    assert sum(shares.values()) == pytest.approx(1) and len(shares) == 3
