"""Schedules of α and σ."""

import pytest

from es_lite.algorithm.schedule import decayed


def test_every_0_is_off():
    assert {decayed(0.5, 0.9, 0, step) for step in (0, 1, 10, 10**6)} == {0.5}


def test_the_factor_applies_every_n_steps_but_not_at_step_0():
    assert [decayed(8.0, 0.5, 3, step) for step in range(8)] == [8, 8, 8, 4, 4, 4, 2, 2]


@pytest.mark.parametrize(("step", "times"), [(0, 0), (99, 0), (100, 1), (250, 2), (10_000, 100)])
def test_the_value_is_a_function_of_the_step_alone(step, times):
    assert decayed(1e-3, 0.99, 100, step) == pytest.approx(1e-3 * 0.99**times, rel=1e-14)


def test_every_1_applies_the_factor_at_each_step():
    assert [decayed(1.0, 0.5, 1, step) for step in range(4)] == [1, 0.5, 0.25, 0.125]


def test_a_factor_of_1_changes_nothing():
    assert decayed(0.3, 1.0, 1, 10**6) == 0.3
