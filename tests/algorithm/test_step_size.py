"""α from the estimates: towards a multiple of the step that gains most, in bounded steps, and to 0 in the last part of a run."""

from dataclasses import replace

import pytest

from es_lite.algorithm.estimate import Averages, Estimate
from es_lite.algorithm.step_size import CLOSE, FALL, FURTHEST, LAST_PART, MULTIPLE, NEAR, OF_PAIR, RISE, TRUST, StepSize

ALIKE = Estimate(slope=1.0, gain=0.5, seen=1.0, scatter=2.0, agreed=0.5, squares=0.25, pairs=10**9, curvature=10.0)
"""Of which the greedy step is 0.5/(2·2.5) = 0.1."""
FAR = 100.0
"""A σ that bounds nothing."""


def alphas(start: float, steps: int, found: Estimate = ALIKE, sigma: float = FAR) -> list[float]:
    return alphas_of(start, [found] * steps, sigma)


def alphas_of(start: float, estimates: list[Estimate], sigma: float = FAR) -> list[float]:
    """One for each of these steps, which are the whole run."""
    averages, step_size, out = Averages(), StepSize(start, len(estimates)), []
    for step, found in enumerate(estimates):
        averages.add(found)
        out.append(step_size.next(step, found, averages, sigma))
    return out


@pytest.mark.parametrize("start", [1e-3, 0.1, 1.0, 50.0])
def test_it_comes_to_the_multiple_of_the_step_that_gains_most_from_anywhere(start):
    found = alphas(start, 1000)
    assert found[50] == pytest.approx(0.1 * MULTIPLE, rel=1e-6)
    assert found[700] == pytest.approx(0.1 * MULTIPLE, rel=1e-6)


def test_a_run_that_was_shortened_to_nothing_is_read():
    """Its journal has steps, whose estimates are gone through."""
    averages, step_size = Averages(), StepSize(1e-3, 0)
    averages.add(ALIKE)
    assert [step_size.next(step, ALIKE, averages, FAR) for step in range(1, 3)] == [0.0, 0.0]


def test_it_rises_and_falls_by_bounded_factors():
    """Above what is close to σ."""
    up, down = alphas(1e-3, 1000, sigma=0.008), alphas(1e6, 1000, sigma=1e9)
    assert [up[step + 1] / up[step] for step in range(3)] == pytest.approx([RISE] * 3)
    assert [down[step] / down[step + 1] for step in range(5)] == pytest.approx([FALL] * 5)
    assert up[0] == pytest.approx(RISE * 1e-3) and down[0] == pytest.approx(1e6 / FALL)


@pytest.mark.parametrize("start", [1e-9, 1e-4])
def test_what_is_close_to_sigma_is_reached_at_once(start: float):
    """However small the first α is."""
    found = alphas(start, 1000, sigma=0.01)
    assert found[0] == pytest.approx(CLOSE * 0.01 / ALIKE.squares**0.5)
    assert found[1] == pytest.approx(RISE * found[0])


def test_it_rises_no_further_than_the_curvature_was_measured_for():
    averages, step_size = Averages(), StepSize(1e-3, 1000)
    sigma = 0.008  # nothing of what follows is close to it
    averages.add(ALIKE)
    assert step_size.next(0, ALIKE, averages, sigma) == pytest.approx(RISE * 1e-3) and step_size.asks
    unmeasured = replace(ALIKE, curvature=None)
    for step in range(1, 10):
        averages.add(unmeasured)
        assert step_size.next(step, unmeasured, averages, sigma) == pytest.approx(RISE * 1e-3) and step_size.asks
    averages.add(ALIKE)
    assert step_size.next(10, ALIKE, averages, sigma) == pytest.approx(RISE**2 * 1e-3) and step_size.asks


def test_it_falls_in_a_straight_line_to_0_over_the_last_part_of_a_run_that_gains_no_more():
    found = alphas_of(0.1, [ALIKE] * 300 + [replace(ALIKE, gain=0.01, slope=0.02)] * 700)
    first = round(1000 * (1 - LAST_PART)) + 1
    assert found[first - 1] == pytest.approx(found[first], rel=0.01)
    for step in range(first, 1000):
        assert found[step] == pytest.approx(found[first] * (1000 - step) / (1000 - first))


def test_it_does_not_fall_while_steps_gain_as_much_as_ever():
    assert alphas(0.1, 1000)[-1] == pytest.approx(0.1 * MULTIPLE)


def test_it_falls_later_the_more_steps_still_gain():
    """Half of what they gained so far on average leaves about half of the last part."""
    less = replace(ALIKE, gain=ALIKE.gain * 0.6, slope=ALIKE.slope * 0.6)  # 0.36 times as much, in half of the steps
    found = alphas_of(0.1, [ALIKE] * 500 + [less] * 500)
    falling = [step for step in range(700, 1000) if found[step] < found[step - 1]]
    assert falling == list(range(falling[0], 1000))
    assert 1000 * (1 - 0.6 * LAST_PART) < falling[0] < 1000 * (1 - 0.4 * LAST_PART)


@pytest.mark.parametrize(("pairs", "bound"), [(4, NEAR), (16, NEAR), (36, 6 * OF_PAIR), (10**9, FURTHEST)])
def test_no_step_goes_further_than_the_scores_say_anything_of(pairs: int, bound: float):
    """Nor does the first, whatever the recipe begins with; that far, once the curvature was measured often enough."""
    found = alphas(100.0, 1000, replace(ALIKE, pairs=pairs, curvature=1e-3), sigma=1e-3)
    sigma = 1e-3 / ALIKE.squares**0.5
    assert found[:20] == pytest.approx([min(bound, TRUST * (pairs * times) ** 0.5) * sigma for times in range(1, 21)])
    assert found[20:100] == pytest.approx([bound * sigma] * 80)


def test_without_a_gain_it_falls():
    found = alphas(0.1, 1000, replace(ALIKE, gain=-0.1, agreed=-0.1))
    assert found[:3] == pytest.approx([0.1 / FALL, 0.1 / FALL**2, 0.1 / FALL**3])


def test_where_perturbations_cost_nothing_it_rises_as_long_as_there_is_a_gain_and_it_is_trusted():
    for curvature in (-1.0, 0.0):
        found = alphas(
            0.1,
            1000,
            Estimate(slope=1.0, gain=0.5, seen=1.0, scatter=2.0, agreed=0.5, squares=0.25, pairs=10**9, curvature=curvature),
            sigma=1.0,
        )
        assert found[:2] == pytest.approx([0.1 * RISE, 0.1 * RISE**2])
        assert found[100] == pytest.approx(FURTHEST / 0.25**0.5)


def test_scores_that_say_nothing_leave_it():
    assert alphas(0.1, 1000, Estimate())[:3] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs(steps):
    found = alphas(0.1, steps)
    assert len(found) == steps and all(alpha > 0 for alpha in found)
