"""The record of a step: coefficients and decay from scores, and the noise pairs that contribute."""

import dataclasses

import numpy as np
import pytest
from plain import EVERY_KIND

from es_lite.algorithm import shaping
from es_lite.algorithm.noise import gaussian
from es_lite.algorithm.record import Record

SCORES = np.array([-3.25, -3.5, -2.0, -9.75, -3.0, -1.25])
OPTIONS = {
    "seed": 2**64 - 1,
    "noise": gaussian,
    "sigma": 0.125,
    "alpha": 0.3,
    "scale": "standard",
    "antithetic": False,
    "weight_decay": 0.0,
    "anchor": 0.0,
}


def record(kind: str = "zscore", **changes) -> Record:
    return Record.from_utilities(4, shaping.utilities(SCORES, kind), **OPTIONS | changes)


@pytest.mark.parametrize("kind", ["zscore", "rank"])
def test_standard_coefficients_are_alpha_over_n_times_the_utilities(kind):
    expected = 0.3 / 6 * shaping.utilities(SCORES, kind)
    assert np.allclose(record(kind).coefficients, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", ["zscore", "rank"])
def test_nes_coefficients_are_divided_by_sigma_too(kind):
    expected = 0.3 / (6 * 0.125) * shaping.utilities(SCORES, kind)
    assert np.allclose(record(kind, scale="nes").coefficients, expected, rtol=1e-7, atol=0)


def test_it_holds_everything_that_the_step_needs():
    made = record(antithetic=True)
    assert (made.step, made.seed, made.sigma, made.antithetic, made.decay) == (4, 2**64 - 1, 0.125, True, 0.0)
    assert len(made.coefficients) == 6


@EVERY_KIND
def test_it_names_its_noise(noise):
    made = record(noise=noise)
    assert (made.kind, made.rank) == (noise.NAME, noise.RANK) and made.noise == noise


@pytest.mark.parametrize(("kind", "rank"), [("cauchy", 0), ("lowrank", 0), ("gaussian", 1)])
def test_a_record_of_noise_that_does_not_exist_cannot_be_applied(kind, rank):
    with pytest.raises(ValueError, match=f"'{kind}'"):
        _ = dataclasses.replace(record(), kind=kind, rank=rank).noise


def test_coefficients_and_decay_are_float32_values_as_python_numbers():
    made = record(weight_decay=0.1)
    for value in (*made.coefficients, made.decay):
        assert type(value) is float and value == float(np.float32(value))


@pytest.mark.parametrize("scale", ["standard", "nes"])
def test_the_decay_is_alpha_times_lambda_whatever_the_scale(scale):
    assert record(weight_decay=0.1, scale=scale).decay == float(np.float32(0.3 * 0.1))


def test_the_decay_towards_theta_0_is_a_number_of_its_own():
    made = record(anchor=0.1)
    assert (made.decay, made.anchor) == (0, float(np.float32(0.3 * 0.1)))


def test_a_score_that_is_not_finite_has_coefficient_0_and_counts_in_n():
    scores = np.array([-3.25, np.nan, -2.0, -np.inf])
    made = Record.from_utilities(0, shaping.utilities(scores, "zscore"), **OPTIONS)
    assert made.coefficients[1] == made.coefficients[3] == 0
    assert np.allclose(made.coefficients[::2], [-0.3 / 4, 0.3 / 4], rtol=1e-6)


def with_coefficients(coefficients, antithetic) -> Record:
    return Record(0, 1, 0.1, antithetic, 0.0, tuple(coefficients))


def test_without_antithetic_sampling_a_member_is_its_own_pair():
    pairs, coefficients = with_coefficients([0.5, -1.5, 2.0], False).pairs()
    assert pairs.dtype == np.uint32 and coefficients.dtype == np.float32
    assert pairs.tolist() == [0, 1, 2]
    assert coefficients.tolist() == [0.5, -1.5, 2.0]


def test_the_coefficient_of_an_antithetic_pair_is_the_difference_in_float32():
    values = np.array([0.1, -0.7, 1e-8, 1.0], np.float32)
    pairs, coefficients = with_coefficients(values.tolist(), True).pairs()
    assert pairs.tolist() == [0, 1]
    assert coefficients.tolist() == [values[0] - values[1], values[2] - values[3]]
    assert coefficients.dtype == np.float32


@pytest.mark.parametrize(
    ("coefficients", "antithetic", "expected"),
    [([0.0, 1.0, -0.0, 2.0], False, [1, 3]), ([1.0, 1.0, 3.0, 2.0, 0.0, 0.0], True, [1]), ([0.0, 0.0], False, [])],
)
def test_pairs_with_the_coefficient_0_are_left_out(coefficients, antithetic, expected):
    pairs, kept = with_coefficients(coefficients, antithetic).pairs()
    assert pairs.tolist() == expected and kept.size == len(expected) and kept.all()


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().sigma = 1.0
